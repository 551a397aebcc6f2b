"""The README of an exported folder: what the model is, what it was trained on and how, and how it is loaded."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tomli_w

from titans_mcore.config import TitansConfig
from titans_mcore.weights import BEGINS, MARKER, run_of


def model_card(
    config: TitansConfig, parameters: int, checkpoint: Path, max_abs_error: float | None, caveat: str | None
) -> str:
    """The text of README.md of a run's model.

    Args:
        config: Of the model.
        parameters: Tied ones counted once.
        checkpoint: Folder that was exported; what it and its run do not say is left out.
        max_abs_error: Of its proof; None when the export was not proven.
        caveat: Where the tokenizer may differ from the run's; None when nowhere.
    """
    record = _json(checkpoint / MARKER)
    heads = {part: shape for mixer in config.mixers for part, shape in mixer.heads(config).items()}
    proven = f"logits differ by at most {max_abs_error or 0.0:.3g} from the trained model's (`proof.json`)"
    rows = {
        **{f"heads of the {part}": f"{shape.number} of {shape.width}" for part, shape in heads.items()},
        "vocabulary": f"{config.vocab_size:,}",
        "made of": record.get(BEGINS),
        "trained on": f"{record['tokens']:,} tokens" if record.get("tokens") else None,
        "optimizer steps": f"{record['step']:,}" if record.get("step") else None,
        **_losses(checkpoint, record.get("step")),
        "data fingerprint": record.get("data_fingerprint"),
        "proof": "not made" if max_abs_error is None else proven,
    }
    note = f"Note: {caveat}." if caveat else ""
    return _card(config, parameters, rows, "pipeline_tag: text-generation\n", _USE, note, _training(checkpoint))


def short_card(config: TitansConfig, parameters: int, auto_class: str, inputs: Iterable[str]) -> str:
    """The text of README.md in a folder of a model that transformers has trained.

    Args:
        config: Of the blocks.
        parameters: Tied ones counted once.
        auto_class: Loads the folder.
        inputs: Names of what its forward takes.
    """
    return _card(config, parameters, {}, "", _USE_ANY.format(auto_class=auto_class, inputs=", ".join(inputs)))


def _card(config: TitansConfig, parameters: int, more: dict[str, str | None], tag: str, *sections: str) -> str:
    title = " + ".join(mixer.title for mixer in config.mixers)
    rows = {"parameters": f"{parameters:,}", "blocks x width": f"{config.num_layers} x {config.dim}", **more}
    lines = ["|  |  |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items() if value)]
    head = f"---\nlibrary_name: transformers\n{tag}tags: [titans]\n---\n# {title}"
    return "\n\n".join(section for section in (head, "\n".join(lines), *sections, _PROOF) if section) + "\n"


_USE_ANY = """The code in this folder needs torch and transformers (4.57 or later) alone:

```python
from transformers import {auto_class}

model = {auto_class}.from_pretrained("path/to/this/folder", trust_remote_code=True)
```

`model(...)` takes {inputs}."""

_USE = """The code in this folder needs torch and transformers (4.57 or later) alone:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder", trust_remote_code=True)
tokens = tokenizer(["The", "A longer prompt"], return_tensors="pt", padding=True)
print(tokenizer.batch_decode(model.generate(**tokens, max_new_tokens=50), skip_special_tokens=True))
```

What has been read is kept in a state of constant size: `cache = model(**tokens).cache` is continued by
`model(..., cache=cache)`, and kept in a file by `cache.save(file)` and `type(cache).load(file)`. Its name in older
versions of transformers, `past_key_values`, means the same.
With lm-eval, give `trust_remote_code=True` among the `--model_args`, and for tasks that score whole texts (wikitext)
`add_bos_token=False` too: there lm-eval puts a start token in front itself, the tokenizer's would be a second one."""

_PROOF = """`proof.json` holds an example and what the model answered, with which `python -m titans_mcore.hf.verify
path/to/this/folder` of the titans-mcore package compares this folder."""


def _losses(checkpoint: Path, step: int | None) -> dict[str, str | None]:
    """The losses at the checkpoint's step, where the run's metrics have them."""
    try:
        lines = (run_of(checkpoint) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        at_step = [record for record in map(json.loads, lines) if record.get("step") == step]
    except (OSError, ValueError, AttributeError):
        return {}
    names = {"step": "training loss", "heldout": "held-out loss"}
    found = [(names[record["kind"]], record["loss"]) for record in at_step if record.get("kind") in names]
    return {name: f"{loss:.6g} nats a token" for name, loss in found if isinstance(loss, float)}


def _training(checkpoint: Path) -> str:
    """The run's resolved configuration: what the checkpoint has noted, or the run's file, which may be edited."""
    noted = _json(checkpoint / MARKER).get("settings")
    try:
        settings = tomli_w.dumps(noted) if noted else (run_of(checkpoint) / "config.toml").read_text(encoding="utf-8")
    except OSError:
        return ""
    settings = settings.strip()
    return f"## Training\n\nThe configuration of the run (`pretrain.train --config`):\n\n```toml\n{settings}\n```"


def _json(file: Path) -> dict[str, Any]:
    """A file's content; empty when there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
