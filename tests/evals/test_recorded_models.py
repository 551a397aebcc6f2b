"""What is kept here: small models recall far beyond their rows, and recorded results are of samples still drawn."""

import json
import shutil
from pathlib import Path

import pytest

from evals.models import load_model, load_tokenizer
from evals.niah import NiahSettings
from evals.niah.run import evaluate
from evals.niah.samples import SampleBuilder
from evals.niah.summary import NeedleResult, summarise
from evals.record_file import RecordFile

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


@pytest.mark.parametrize("file", sorted(RECALL.glob("*/niah.jsonl")), ids=lambda file: file.parent.name)
def test_recorded_results_are_read_and_are_of_the_samples_drawn_today(file: Path, tmp_path: Path) -> None:
    with RecordFile(shutil.copy(file, tmp_path / file.name), NeedleResult) as results:
        records = results.records
    assert len(records) == len(file.read_text().splitlines()) >= 40
    recorded = json.loads(file.with_suffix(".json").read_text())
    assert summarise(records)["accuracy_by_length"] == recorded["accuracy_by_length"]
    processor = load_tokenizer(RECALL / "tokenizer.model").processor
    builder = SampleBuilder(processor, records[0].max_new_tokens)
    drawn = [record for record in records if record.length <= 65_536 and record.control != "window_only"]
    assert len(drawn) >= 40
    for record in drawn:
        sample = builder.build(record.name)
        assert (sample.needle_key, sample.value, sample.sha256) == (
            record.needle_key,
            record.value,
            record.prompt_sha256,
        )
