"""Intervals, plots, files and measurements."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from evals import measure
from evals.report import heat_maps, loss_plot, table, wilson_interval, write_bytes, write_figure, write_json
from titans_mcore.memory import MemoryState


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        # Newcombe (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 0.8389, 1.0),
    ],
)
def test_wilson_interval_equals_published_values(successes: int, trials: int, low: float, high: float) -> None:
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)


def test_wilson_interval_knows_nothing_without_trials() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_table_aligns_columns() -> None:
    assert table(("a", "long"), [["123", "4"]]) == "  a  long\n123     4"


def test_heat_map_shows_n_in_each_cell_that_was_run_and_the_trained_length(tmp_path: Path) -> None:
    cells = {(1024, 0.0): (1.0, 3), (1024, 100.0): (0.5, 2), (4096, 0.0): (0.0, 7)}
    figure = heat_maps({"title": cells}, [1024, 4096], [0.0, 100.0], 2048)
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == ["1.00\nn=3", "0.50\nn=2", "0.00\nn=7", "trained length 2,048"]
    assert list(figure.axes[0].lines[0].get_xdata()) == [0.5, 0.5]  # between the columns
    drawn = np.ma.filled(figure.axes[0].images[0].get_array(), np.nan)
    np.testing.assert_array_equal(drawn, [[1.0, 0.0], [0.5, math.nan]])
    write_figure(tmp_path / "map.png", figure)
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_a_point_of_few_tokens_is_not_drawn_unless_there_are_no_others() -> None:
    tokens = (10, 255, 256, 9_000)
    buckets = [
        {"last": 2**n, "tokens": n_tokens, "loss": 1.0, "interval": (0.5, 2.0)} for n, n_tokens in enumerate(tokens)
    ]
    for drawn, given in (([4, 8], buckets), ([1, 2], buckets[:2])):
        axes = loss_plot("title", {"model": given}, None).axes[0]
        assert list(axes.lines[0].get_xdata()) == drawn
        assert len(axes.collections) == 1  # the interval


def test_failed_write_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "report.json"
    write_json(file, {"old": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(file, {"loss": math.nan})
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        write_bytes(file, b"new")
    assert '"old"' in file.read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_peak_memory_is_the_systems_record_which_a_reset_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, clear = tmp_path / "status", tmp_path / "clear_refs"
    monkeypatch.setattr(measure, "_STATUS", status)
    monkeypatch.setattr(measure, "_CLEAR", clear)
    status.write_text("VmPeak:\t  900 kB\nVmHWM:\t  300 kB\nVmRSS:\t  200 kB\n")
    peak = measure.PeakMemory(torch.device("cpu"))
    assert clear.read_text() == "5"  # proc(5): resets the peak resident set size
    assert peak.bytes() == 300 * 1024


def test_state_bytes_sums_blocks() -> None:
    block = MemoryState([torch.zeros(2, 3, 4, 5)], [torch.zeros(2, 3, 4, 5)])
    assert measure.state_bytes([block, block]) == 2 * 2 * 120 * 4
    assert measure.state_bytes(None) == 0
