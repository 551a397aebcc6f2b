"""The README of an exported folder."""

import json
from pathlib import Path

from titans_mcore.config import TitansConfig
from titans_mcore.hf.proof import Proof
from titans_mcore.weights import MARKER

_NAMES = {
    "mac": "Titans, memory as context (MAC)",
    "mag": "Titans, memory as gate (MAG)",
    "mal": "Titans, memory as layer (MAL)",
    "lmm": "Titans, the long-term memory alone (LMM)",
    "transformer": "Transformer++, the attention baseline",
}


def model_card(config: TitansConfig, parameters: int, checkpoint: Path, proof: Proof | None, caveat: str | None) -> str:
    """The text of README.md.

    Args:
        config: Of the model.
        parameters: Tied ones counted once.
        checkpoint: Folder that was exported; what it does not say is left out.
        proof: None when the export was not proven.
        caveat: Where the tokenizer may differ from the run's; None when nowhere.
    """
    record = _record(checkpoint)
    rows = {
        "model": _NAMES[config.variant],
        "parameters": f"{parameters:,}",
        "blocks x width x heads": f"{config.num_layers} x {config.dim} x {config.num_heads}",
        "vocabulary": f"{config.vocab_size:,}",
        "trained on": f"{record['tokens']:,} tokens" if "tokens" in record else None,
        "optimizer steps": f"{record['step']:,}" if "step" in record else None,
        "data fingerprint": record.get("data_fingerprint"),
        "proof": _proof_line(proof),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items() if value)
    return f"""---
library_name: transformers
tags: [titans]
---
# {rows["model"]}

| | |
|---|---|
{table}

The code in this folder needs torch and transformers (4.57 or later) alone:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
tokens = tokenizer("The", return_tensors="pt")
print(tokenizer.decode(model.generate(**tokens, max_new_tokens=50)[0]))
```

Sequences of a batch must be equally long: padding is not supported.
{_note(caveat)}"""


def _note(caveat: str | None) -> str:
    return f"\nNote: {caveat}.\n" if caveat else ""


def _proof_line(proof: Proof | None) -> str:
    if proof is None:
        return "not made"
    return f"logits differ by at most {proof.max_abs_error:.3g} from the trained model's (`proof.json`)"


def _record(checkpoint: Path) -> dict:
    """What the checkpoint says about its run; empty when it does not."""
    try:
        record = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
