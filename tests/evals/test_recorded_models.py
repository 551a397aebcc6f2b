"""The small models that are kept here recall: whatever changes, they find needles far beyond their rows."""

from pathlib import Path

import pytest

from evals.models import load_model
from evals.niah import NiahSettings
from evals.niah.run import evaluate

RECALL = Path(__file__).resolve().parents[2] / "evals" / "results" / "recall"


@pytest.mark.parametrize("variant", ["mag"])
def test_a_recorded_model_finds_needles_and_without_its_memory_none(variant: str, tmp_path: Path) -> None:
    run = RECALL / variant / "run"
    settings = NiahSettings(
        checkpoint=run,
        output=tmp_path,
        lengths=(256, 4_096),
        depths=3,
        samples=2,
        controls=("memory_reset",),
        max_new_tokens=16,
    )
    report = evaluate(load_model(run), settings)
    assert report is not None
    found = {(row["control"], row["length"]): row["accuracy"] for row in report["by_length"]}
    assert found == {(c, n): c == "none" for c in ("none", "memory_reset") for n in settings.lengths}
