"""Runs in a process of its own, without this project: what a user of exported folders may do with them.

Called as `python -P alone.py PROBE OUTPUT FOLDER...`; PROBE is titans_mcore/hf/probe.py, whose block on imports is
used. For each folder it writes OUTPUT/NAME.safetensors (logits) and OUTPUT/NAME.json (findings).
"""

import json
import runpy
import sys
from pathlib import Path


def examine(folder: Path, output: Path) -> dict:
    import torch
    import transformers
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    def load(path: Path, **kwargs):
        return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, **kwargs).eval()

    model, tokenizer = load(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    tokens = torch.tensor(json.loads((output / "tokens.json").read_text()))
    with torch.no_grad():
        logits = model(tokens).logits
    save_file({"logits": logits.contiguous()}, output / f"{folder.name}.safetensors")

    copy = output / f"{folder.name}-copy"
    model.save_pretrained(copy)
    tokenizer.save_pretrained(copy)
    again = load(copy, dtype=torch.float32)
    half = load(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        half_output = half(tokens, use_cache=True)
    states = []
    for layer in half_output.cache.layers:
        memory = getattr(layer.state, "memory", None) or getattr(layer.state, "written", None)
        memory = getattr(memory, "memory", memory)
        if memory is not None and hasattr(memory, "weights"):
            states += [str(w.dtype) for w in memory.weights + memory.momentum]
    start = tokenizer("the memory", return_tensors="pt")
    text = tokenizer.decode(model.generate(**start, max_new_tokens=4, do_sample=False)[0])
    return {
        "transformers": transformers.__version__,
        "same_state": {n: torch.equal(p, again.state_dict()[n]) for n, p in model.state_dict().items()},
        "same_logits": torch.equal(again(tokens).logits, logits),
        "copied_code": sorted(file.name for file in copy.glob("*.py")),
        "tied": model.lm_head.weight is model.model.embedding.weight,
        "variant": AutoConfig.from_pretrained(folder, trust_remote_code=True).variant,
        "half_dtypes": sorted({str(p.dtype) for p in half.parameters()}),
        "half_state_dtypes": sorted(set(states)),
        "half_error": float((half_output.logits.float() - logits).abs().max()),
        "text": text,
        "generated": generated(model, tokenizer),
        "continued": continued(model, tokens, output / f"{folder.name}.cache"),
        "modules": sorted(name for name, module in sys.modules.items() if module is not None and "titans" in name),
    }


def generated(model, tokenizer) -> dict[str, bool]:
    """For each way to generate, whether a left-padded batch gets what its rows get alone."""
    import torch

    texts = ["the", "the memory of a model learns at test time", "surprise tells"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    width, found = batch.input_ids.shape[1], {}
    ways = {
        "greedy": {},
        "without_cache": {"use_cache": False},
        "beams": {"num_beams": 3},
        "pieces": {"prefill_chunk_size": 4},
    }
    for name, how in ways.items():
        together = model.generate(**batch, max_new_tokens=6, do_sample=False, **how)[:, width:]
        alone = []
        for text in texts:
            row = tokenizer(text, return_tensors="pt")
            beams = {key: value for key, value in how.items() if key == "num_beams"}
            alone.append(model.generate(**row, max_new_tokens=6, do_sample=False, **beams)[0, row.input_ids.shape[1] :])
        ended = [torch.equal(ours[: len(row)], row) for ours, row in zip(together, alone, strict=True)]
        found[name] = all(ended)
    torch.manual_seed(0)
    found["sampling"] = model.generate(**batch, max_new_tokens=6, do_sample=True).shape[1] <= width + 6
    return found


def continued(model, tokens, file: Path) -> dict[str, float]:
    """For each name of a cache, the largest difference of a logit when one is saved and several tokens continue it."""
    import torch

    with torch.no_grad():
        whole = model(tokens).logits
        found = {}
        for name in ("cache", "past_key_values"):
            cache = getattr(model(tokens[:, :10], use_cache=True), name)
            cache.save(file)
            loaded = type(cache).load(file)
            found[name] = float((model(tokens[:, 10:], **{name: loaded}).logits - whole[:, 10:]).abs().max())
        return found


def main(probe: str, output: str, *folders: str) -> None:
    runpy.run_path(probe)["block_imports"]()
    for folder in map(Path, folders):
        findings = examine(folder, Path(output))
        Path(output, f"{folder.name}.json").write_text(json.dumps(findings))


if __name__ == "__main__":
    main(*sys.argv[1:])
