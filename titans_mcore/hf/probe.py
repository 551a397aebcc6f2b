"""What an exported folder computes, asked where this project's packages cannot be imported.

A script of its own, run as `python -P probe.py FOLDER REQUEST.json ANSWERS.safetensors`: it loads the folder as a user
without this project would, reads the requested tokens whole, in pieces and one by one, and continues them and a text.
What is no tensor stands in the metadata of the answers. Run as `python -P probe.py FOLDER AUTO_CLASS INPUTS.safetensors
OUTPUTS.safetensors`, it gives a model that is no language model its inputs by name.
"""

import importlib
import json
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


def main(folder: str, request_file: str, answers_file: str) -> None:
    """Answers a request.

    It is {"prompts": [[id, ...], ...], "followers": [[id, ...], ...], "cut": n, "text": str, "new_tokens": n,
    "device": str}; followers are the tokens that are decoded one by one behind each prompt.
    """
    block_imports()
    import torch
    import transformers
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with open(request_file, encoding="utf-8") as file:
        request = json.load(file)
    device = request["device"]
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    answers, generated = {}, []
    with torch.inference_mode():
        for index, (prompt, followers) in enumerate(zip(request["prompts"], request["followers"], strict=True)):
            tokens = torch.tensor([prompt], device=device)
            answers[f"whole.{index}"] = model(tokens, use_cache=False).logits[0]
            cache = sys.modules[type(model).__module__].TitansCache(len(model.model.layers))
            answers[f"pieces.{index}"] = _stream(model, tokens.split(request["cut"], 1), cache)
            behind = torch.tensor([followers], device=device)
            decoded = _stream(model, behind[:, :-1].split(1, 1), cache)
            answers[f"decoded.{index}"] = torch.cat([answers[f"pieces.{index}"][-1:], decoded])
            count = {"max_new_tokens": len(followers), "min_new_tokens": len(followers)}
            # Without a mask, generate() takes tokens of the padding's id for padding, and a prompt may hold them.
            full = model.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=False, **count)
            generated.append(full[0, len(prompt) :].tolist())
        start = tokenizer(request["text"], return_tensors="pt").to(device)
        full = model.generate(**start, max_new_tokens=request["new_tokens"], do_sample=False)
    continuation = tokenizer.decode(full[0, start.input_ids.shape[1] :], skip_special_tokens=True)
    words = {
        "continuation": str(continuation),
        "generated": json.dumps(generated),
        "transformers": transformers.__version__,
    }
    save_file({name: value.cpu().contiguous() for name, value in answers.items()}, answers_file, words)


def answer(folder: str, auto_class: str, inputs_file: str, outputs_file: str) -> None:
    """Writes every tensor that the model, loaded by this class of transformers, gives for the inputs."""
    block_imports()
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    model = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True).eval()
    with torch.inference_mode():
        outputs = model(**load_file(inputs_file))
    tensors = {name: value.contiguous() for name, value in outputs.items() if isinstance(value, torch.Tensor)}
    save_file(tensors, outputs_file)


def _stream(model, pieces, cache):
    """Logits of pieces (1, T) read one after the other, (all T, V); the cache is brought forward."""
    import torch

    found = [torch.empty(0, model.config.vocab_size, device=model.device)]
    for piece in pieces:
        if piece.shape[1]:
            # Folders that were exported before transformers 5.24 know the cache by this name alone.
            found.append(model(piece, past_key_values=cache).logits[0])
    return torch.cat(found)


if __name__ == "__main__":
    (answer if len(sys.argv) == 5 else main)(*sys.argv[1:])
