"""What a run leaves: the numbers add up, the table, CSV and plots say the same."""

import io
import json
from pathlib import Path

import pytest

from evals.niah import NiahSettings
from evals.niah.run import evaluate
from evals.niah.summary import FILES
from evals.report import accuracy_plot, heat_maps, markdown_table, wilson_interval

from .planted import other, plant


@pytest.fixture(scope="module")
def folder(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of a model that finds every second value."""
    output, asked = tmp_path_factory.mktemp("report"), iter(range(1000))
    model = plant(tokenizer, lambda value: value if value and next(asked) % 2 else other(value))
    settings = NiahSettings(
        Path("run"),
        output,
        ("pk", "n"),
        lengths=(600, 1200),
        depths=3,
        samples=2,
        controls=("needle_absent",),
        max_new_tokens=32,
    )
    evaluate(model, settings)
    return output


def test_every_file_is_there(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    for name in ("niah.png", "niah_by_length.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_cells_sum_up_to_lengths_and_lengths_to_the_raw_results(folder: Path) -> None:
    report = json.loads((folder / "niah.json").read_text())
    records = [json.loads(line) for line in (folder / "niah.jsonl").read_text().splitlines()]
    assert len(records) == sum(cell["n"] for cell in report["cells"]) == sum(row["n"] for row in report["by_length"])
    for row in report["by_length"]:
        own = [r for r in records if all(r[name] == row[name] for name in ("control", "task", "length"))]
        hits = sum(record["substring"] for record in own)
        assert row["accuracy"] == hits / len(own)
        assert row["interval"] == list(wilson_interval(hits, len(own)))
        assert row["seconds"] == pytest.approx(sum(record["seconds"] / record["batch"] for record in own))
        assert row["peak_bytes"] == max(record["peak_bytes"] for record in own)
        cells = [c for c in report["cells"] if all(c[name] == row[name] for name in ("control", "task", "length"))]
        assert sum(cell["accuracy"] * cell["n"] for cell in cells) == pytest.approx(hits)
    assert {row["accuracy"] for row in report["by_length"] if row["control"] == "none"} == {0.5}
    assert len({record["prompt_sha256"] for record in records if record["control"] == "none"}) == 24


def test_report_names_hashes_seeds_and_trained_length(folder: Path) -> None:
    report = json.loads((folder / "niah.json").read_text())
    page = (folder / "niah.md").read_text()
    for digest in (
        report["checkpoint_sha256"],
        report["tokenizer_sha256"],
        report["haystacks"]["niah_single_1"]["sha256"],
        report["haystacks"]["niah_single_2"]["sha256"],
    ):
        assert len(digest) == 64
        assert digest in page
    assert report["haystacks"]["niah_single_2"]["label"] == "synthetic"
    assert "- seeds: 0" in page
    assert "- trained length: 512 tokens" in page
    assert page.count("| niah_single_") == len(report["by_length"])


def test_heat_maps_of_several_tasks_stand_one_below_the_other() -> None:
    maps = {"one": {(1024, 0.0): (1.0, 3)}, "two": {(4096, 50.0): (0.25, 4)}}
    figure = heat_maps(maps, [1024, 4096], [0.0, 50.0], 2048)
    plots = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in plots] == ["one", "two"]
    assert [axes.texts[0].get_text() for axes in plots] == ["1.00\nn=3", "0.25\nn=4"]
    assert all(list(axes.lines[0].get_xdata()) == [0.5, 0.5] for axes in plots)


def test_accuracy_plot_marks_the_trained_length_and_draws_controls_dashed() -> None:
    lines = {"S-NIAH-PK": [(1024, 1.0, (0.8, 1.0)), (4096, 0.5, (0.3, 0.7))], "S-NIAH-PK, memory_off": []}
    lines["S-NIAH-PK, memory_off"] = [(1024, 0.0, (0.0, 0.2))]
    (axes,) = accuracy_plot("title", lines, 2048).axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert set(labels) == {*lines, "trained length 2,048"}
    drawn = {line.get_linestyle() for line in axes.lines if len(line.get_xdata()) and line.get_marker() == "o"}
    assert drawn == {"-", "--"}


def test_accuracy_plot_of_many_lines_names_them_beside_it_and_tells_controls_apart() -> None:
    points = [(1024, 0.5, (0.3, 0.7)), (4096, 0.5, (0.3, 0.7))]
    names = [f"task {number}{control}" for control in ("", ", one", ", other") for number in range(8)]
    figure = accuracy_plot("title", dict.fromkeys(names, points), None)
    (axes,), (legend,) = figure.axes, figure.legends
    assert axes.get_legend() is None
    assert [text.get_text() for text in legend.get_texts()] == names
    looks = [(line.get_color(), line.get_linestyle()) for line in axes.lines if line.get_marker() == "o"]
    assert len(set(looks)) == len(looks) == 24
    assert len({colour for colour, _ in looks}) == 8
    figure.savefig(io.BytesIO())  # a layout that has no room warns
    assert axes.get_position().height > 0.5


def test_tables_are_what_was_given() -> None:
    assert markdown_table(("a", "b"), [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
