"""What an exported folder computes, asked where this project's packages cannot be imported.

A script of its own, run as `python -P probe.py FOLDER AUTO_CLASS INPUTS.safetensors OUTPUTS.safetensors DEVICE`: it
loads the folder as a user without this project would, and gives the model its inputs by name.
"""

import importlib
import sys

BLOCKED = ("titans_mcore", "pretrain", "tokenization", "evals", "megatron", "deepspeed", "sentencepiece", "tyro")


def block_imports() -> None:
    """Makes an import of what a user of the export need not have fail, installed or not.

    Raises:
        SystemExit: The package can be imported all the same.
    """
    for name in BLOCKED:
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        importlib.import_module("titans_mcore")
    except ImportError:
        return
    raise SystemExit("titans_mcore can still be imported; the export cannot be tried without it")


def main(folder: str, auto_class: str, inputs_file: str, outputs_file: str, device: str) -> None:
    """Writes every tensor that the model, loaded by this class of transformers, gives for the inputs."""
    block_imports()
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    loader = getattr(transformers, auto_class)
    model = loader.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).to(device).eval()
    with torch.inference_mode():
        outputs = model(**load_file(inputs_file, device))
    tensors = {name: value.cpu().contiguous() for name, value in outputs.items() if isinstance(value, torch.Tensor)}
    save_file(tensors, outputs_file)


if __name__ == "__main__":
    main(*sys.argv[1:])
