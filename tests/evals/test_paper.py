"""The paper's tables: its numbers as printed, ours in the right cells, empty where nothing was run."""

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from evals.command_line import EvaluationError
from evals.harness.tasks import COLUMNS
from evals.paper import PaperSettings, published
from evals.paper.tables import OURS, PAPER, Table, ablated, write_tables

LMM = {"variant": "lmm", "memory_depth": 2, "conv_kernel": 4, "memory_momentum": True, "memory_forgetting": True}
LMM["persistent_tokens"] = 128


def harness(values: dict[str, float], **more: Any) -> dict[str, Any]:
    columns = [
        {
            "title": c.title,
            "accuracy": c.accuracy,
            "value": values.get(c.title),
            "stderr": 0.5 if c.title in values else None,
        }
        for c in COLUMNS
    ]
    return {"columns": columns, "average": {"value": None, "stderr": None}, "model": LMM, **more}


def needles(accuracy: dict[tuple[str, int], float]) -> dict[str, Any]:
    rows = [{"task": t, "length": n, "accuracy": a, "n": 500, "control": "none"} for (t, n), a in accuracy.items()]
    rows.append({"task": "niah_single_1", "length": 2048, "accuracy": 0.25, "n": 500, "control": "memory_off"})
    return {"by_length": rows, "haystacks": {"niah_single_1": {"label": "noise"}}, "model": LMM}


def write(folder: Path, **reports: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for kind, report in reports.items():
        (folder / f"{kind}.json").write_text(json.dumps(report))
    return folder


def tables(tmp_path: Path, *models: str) -> dict[str, Table]:
    return {table.key: table for table in write_tables(PaperSettings(models, tmp_path / "out"))}


def ours(table: Table, label: str) -> dict[str, float | None]:
    (row,) = (row for row in table.rows if row.source == OURS and row.label == label)
    return dict(zip(table.columns, row.cells, strict=True))


WRONG_AVERAGES = {("760M", "TTT"), ("400M", "Gated DeltaNet-H2"), ("1.3B", "Gated DeltaNet-H1")}


def test_the_papers_rows_agree_with_each_other() -> None:
    for size, block in published.LANGUAGE.items():
        for name, row in block.rows.items():
            assert len(row) == len(COLUMNS) + 1
            # Slips of the papers are kept.
            slip = (size, name) in WRONG_AVERAGES
            assert row[-1] == pytest.approx(fmean(row[2:-1]), abs=2.1 if slip else 0.02), name
    for needles in published.NIAH.values():
        assert {len(row) for row in needles.rows.values()} == {len(needles.columns)}
    titans = published.NIAH["niah"].rows["Titans LMM"]
    assert fmean(titans) == pytest.approx(published.ABLATION["LMM"][1], abs=0.01)


def test_a_model_stands_beside_the_published_ones_of_its_size_and_name(tmp_path: Path) -> None:
    samba = {"variant": "mamba+transformer", "num_layers": 24, "dim": 1024, "tie_embeddings": False}
    write(tmp_path / "small", harness={**harness({"PIQA": 66.0}), "model": samba}, niah={**needles({}), "model": samba})
    found = tables(tmp_path, f"small={tmp_path / 'small'}")
    labels = [row.label for row in found["language_400m"].rows]
    assert labels[labels.index("Samba") + 1] == "small"
    for size in ("340m", "760m", "1.3b"):
        assert {row.source for row in found[f"language_{size}"].rows} == {PAPER}, size
    for key in published.NIAH:
        assert set(ours(found[key], "small").values()) == {None}
    notes = " ".join(found["language_400m"].notes)
    assert "400M parameters, 15B tokens" in notes
    assert "arxiv.org/abs/2412.06464" in " ".join(found["niah_short"].notes)


def test_results_stand_in_their_cells_and_what_was_not_run_is_empty(tmp_path: Path) -> None:
    some = {("niah_single_1", 2048): 0.984, ("niah_single_3", 16384): 0.0, ("niah_single_1", 1024): 0.5}
    write(tmp_path / "run" / "eval", harness=harness({"Wiki ppl": 30.0, "PIQA": 70.25}), niah=needles(some))
    found = tables(tmp_path, f"mine={tmp_path / 'run'}")
    language = ours(found["language_760m"], "mine")
    assert {title for title, value in language.items() if value is not None} == {"Wiki ppl", "PIQA"}
    niah = ours(found["niah"], "mine")
    assert {cell: value for cell, value in niah.items() if value is not None} == {"PK 2K": 98.4, "W 16K": 0.0}
    assert ours(found["ablation"], "mine") == {"ppl": None, "long context": None}
    page = (tmp_path / "out" / "paper.md").read_text()
    (line,) = (line for line in page.splitlines() if line.startswith("| mine | ours | 30.00"))
    assert line == "| mine | ours | 30.00 ± 0.50 |  |  | 70.25 ± 0.50 |  |  |  |  |  |  |  |"
    assert "| Titans LMM | paper | 20.04 |" in page
    above = page[: page.index(line)].rstrip().splitlines()[-1]
    assert above.startswith("| Titans LMM | paper"), "ours is not beside the paper's row of its variant"


def test_ablation_needs_both_perplexities_and_all_twelve_cells(tmp_path: Path) -> None:
    every = {(task, length): 0.5 for task in published.NIAH_TASKS for length in published.NIAH_LENGTHS}
    linear = {**LMM, "memory_depth": 1}
    whole = {**harness({"Wiki ppl": 30.0, "LMB ppl": 20.0}), "model": linear}
    write(tmp_path / "a", harness=whole, niah={**needles(every), "model": linear})
    found = tables(tmp_path, f"a={tmp_path / 'a'}")["ablation"]
    assert ours(found, "a") == {"ppl": 25.0, "long context": 50.0}
    labels = [(row.label, row.source) for row in found.rows]
    assert labels[labels.index(("linear memory", PAPER)) + 1] == ("a", OURS)


def test_a_model_is_the_one_line_of_the_ablation_that_it_leaves_out() -> None:
    assert ablated(LMM) == "LMM"
    changes = {"memory_depth": 1, "conv_kernel": 1, "memory_momentum": False, "memory_forgetting": False}
    names = [ablated({**LMM, name: value}) for name, value in {**changes, "persistent_tokens": 0}.items()]
    assert names == list(published.ABLATION)[1:]
    assert ablated({**LMM, **changes}) is None
    assert ablated({**LMM, "variant": "mac"}) is None
    assert ablated({}) is None


def test_results_of_different_weights_are_pointed_out(tmp_path: Path) -> None:
    write(tmp_path / "a", harness=harness({}, checkpoint_sha256="1"), niah={**needles({}), "checkpoint_sha256": "2"})
    tables(tmp_path, f"a={tmp_path / 'a'}")
    assert "**a** has results of different weights" in (tmp_path / "out" / "paper.md").read_text()


def test_faults_are_one_sentence(tmp_path: Path) -> None:
    for models, fault in (
        (("mac",), "--models mac: give NAME=FOLDER"),
        (("=x",), "--models =x: give NAME=FOLDER"),
        (("a=x", "a=y"), "--models a a; give every model a name of its own"),
        ((), "--models is empty"),
    ):
        with pytest.raises(EvaluationError, match=fault):
            PaperSettings(models, tmp_path)
    with pytest.raises(EvaluationError, match="no such folder"):
        tables(tmp_path, f"a={tmp_path / 'nowhere'}")
    with pytest.raises(EvaluationError, match=r"no harness.json or niah.json in .*; run an evaluation"):
        tables(tmp_path, f"a={tmp_path}")
    write(tmp_path, niah={"something": "else"})
    with pytest.raises(EvaluationError, match=r"niah.json has no 'by_length'; delete it"):
        tables(tmp_path, f"a={tmp_path}")
    (tmp_path / "niah.json").write_text("{")
    with pytest.raises(EvaluationError, match=r"niah.json is not JSON"):
        tables(tmp_path, f"a={tmp_path}")
