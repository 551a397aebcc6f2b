"""The README of an exported folder: what the model is, what it was trained on and how, and what was measured."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tomli_w

from titans_mcore.config import TitansConfig
from titans_mcore.hf.proof import Proof
from titans_mcore.weights import BEGINS, MARKER

_ABOUT_THE_REPORT = ("settings", "model", "tokenizer", "checkpoint", "seconds")
_MOST_ROWS = 24  # of one report


def model_card(config: TitansConfig, parameters: int, checkpoint: Path, proof: Proof | None, caveat: str | None) -> str:
    """The text of README.md.

    Args:
        config: Of the model.
        parameters: Tied ones counted once.
        checkpoint: Folder that was exported; what it and its run do not say is left out.
        proof: None when the export was not proven.
        caveat: Where the tokenizer may differ from the run's; None when nowhere.
    """
    record = _json(checkpoint / MARKER)
    heads = {part: shape for mixer in config.mixers for part, shape in mixer.heads(config).items()}
    rows = {
        "model": " + ".join(mixer.title for mixer in config.mixers),
        "parameters": f"{parameters:,}",
        "blocks x width": f"{config.num_layers} x {config.dim}",
        **{f"heads of the {part}": f"{shape.number} of {shape.width}" for part, shape in heads.items()},
        "vocabulary": f"{config.vocab_size:,}",
        "made of": record.get(BEGINS),
        "trained on": f"{record['tokens']:,} tokens" if record.get("tokens") else None,
        "optimizer steps": f"{record['step']:,}" if record.get("step") else None,
        "data fingerprint": record.get("data_fingerprint"),
        "proof": _proof_line(proof),
    }
    sections = [
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [titans]\n---\n# {rows['model']}",
        _table(("", ""), [(name, value) for name, value in rows.items() if value]),
        _USE,
        f"Note: {caveat}." if caveat else "",
        _results(checkpoint),
        _training(checkpoint),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def short_card(config: TitansConfig, parameters: int, auto_class: str, inputs: Iterable[str]) -> str:
    """The text of README.md in a folder of a model that transformers has trained.

    Args:
        config: Of the blocks.
        parameters: Tied ones counted once.
        auto_class: Loads the folder.
        inputs: Names of what its forward takes.
    """
    title = " + ".join(mixer.title for mixer in config.mixers)
    rows: list[tuple[str, ...]] = [
        ("parameters", f"{parameters:,}"),
        ("blocks x width", f"{config.num_layers} x {config.dim}"),
    ]
    return "\n\n".join(
        [
            f"---\nlibrary_name: transformers\ntags: [titans]\n---\n# {title}",
            _table(("", ""), rows),
            _USE_ANY.format(auto_class=auto_class, inputs=", ".join(inputs)),
        ]
    )


_USE_ANY = """The code in this folder needs torch and transformers (4.57 or later) alone:

```python
from transformers import {auto_class}

model = {auto_class}.from_pretrained("path/to/this/folder", trust_remote_code=True)
```

`model(...)` takes {inputs}; `proof.json` holds an example and what the model answered, with which `python -m
titans_mcore.hf.verify path/to/this/folder` of the titans-mcore package compares this folder.
"""

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
`add_bos_token=False` too: there lm-eval puts a start token in front itself, and the tokenizer's would be a second one.
`proof.json` holds logits of the trained model, with which `python -m titans_mcore.hf.verify path/to/this/folder` of the
titans-mcore package compares this folder."""


def _proof_line(proof: Proof | None) -> str:
    if proof is None:
        return "not made"
    return f"logits differ by at most {proof.max_abs_error:.3g} from the trained model's (`proof.json`)"


def _results(checkpoint: Path) -> str:
    """What the run and its evaluations have measured of this very checkpoint."""
    rows = [("the run", name, value) for name, value in _losses(checkpoint).items()]
    for file in sorted((_run_of(checkpoint) / "eval").rglob("*.json")):
        report = _json(file)
        if Path(str(report.get("checkpoint", ""))).name == checkpoint.name:
            rows += [(file.stem, name, value) for name, value in _numbers(report)[:_MOST_ROWS]]
    if not rows:
        return ""
    return "## Results\n\n" + _table(("measured by", "what", "value"), [(a, b, f"{value:.6g}") for a, b, value in rows])


def _losses(checkpoint: Path) -> dict[str, float]:
    """The losses in nats a token at the checkpoint's step, where the run's metrics have them."""
    step, found = _json(checkpoint / MARKER).get("step"), {}
    try:
        lines = (_run_of(checkpoint) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        at_step = [record for record in map(json.loads, lines) if record.get("step") == step]
    except (OSError, ValueError, AttributeError):
        return {}
    for record in at_step:
        name = {"step": "training loss", "heldout": "held-out loss"}.get(record.get("kind", ""))
        if name and isinstance(record.get("loss"), float):
            found[name] = record["loss"]
    return found


def _numbers(report: dict[str, Any]) -> list[tuple[str, float]]:
    """The numbers of an evaluation's report, and those of its tables by key."""
    found = []
    for name, value in report.items():
        if name.startswith(_ABOUT_THE_REPORT):
            continue
        parts = value.items() if isinstance(value, dict) else [("", value)]
        found += [
            (f"{name} {key}".strip(), number)
            for key, number in parts
            if isinstance(number, int | float) and not isinstance(number, bool)
        ]
    return found


def _training(checkpoint: Path) -> str:
    """The run's resolved configuration: what the checkpoint has noted, or the run's file, which may be edited."""
    noted = _json(checkpoint / MARKER).get("settings")
    try:
        settings = tomli_w.dumps(noted) if noted else (_run_of(checkpoint) / "config.toml").read_text(encoding="utf-8")
    except OSError:
        return ""
    settings = settings.strip()
    return f"## Training\n\nThe configuration of the run (`pretrain.train --config`):\n\n```toml\n{settings}\n```"


def _run_of(checkpoint: Path) -> Path:
    """RUN for RUN/checkpoints/step-N, or the folder beside a checkpoint that lies elsewhere."""
    parent = checkpoint.absolute().parent
    return parent.parent if parent.name == "checkpoints" else parent


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _json(file: Path) -> dict[str, Any]:
    """A file's content; empty when there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
