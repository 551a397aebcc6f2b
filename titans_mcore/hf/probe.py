"""What an exported folder computes, asked where this project's packages cannot be imported.

A script of its own, run as `python -P probe.py FOLDER REQUEST.json ANSWERS.safetensors`: it loads the folder as a user
without this project would, reads the requested tokens whole and in pieces, and continues a text. The continuation
stands in the metadata of the answers.
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
    """Answers a request: {"prompts": [[id, ...], ...], "cut": n, "text": str, "new_tokens": n}."""
    block_imports()
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with open(request_file, encoding="utf-8") as file:
        request = json.load(file)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    answers = {}
    with torch.inference_mode():
        for index, prompt in enumerate(request["prompts"]):
            tokens = torch.tensor([prompt])
            answers[f"whole.{index}"] = model(tokens, use_cache=False).logits[0]
            pieces, cache = [], None
            for piece in tokens.split(request["cut"], 1):
                output = model(piece, past_key_values=cache, use_cache=True)
                pieces.append(output.logits[0])
                cache = output.past_key_values
            answers[f"pieces.{index}"] = torch.cat(pieces)
        start = tokenizer(request["text"], return_tensors="pt").input_ids
        full = model.generate(start, max_new_tokens=request["new_tokens"], do_sample=False)
    continuation = str(tokenizer.decode(full[0, start.shape[1] :], skip_special_tokens=True))
    answers = {name: value.contiguous() for name, value in answers.items()}
    save_file(answers, answers_file, {"continuation": continuation})


if __name__ == "__main__":
    main(*sys.argv[1:])
