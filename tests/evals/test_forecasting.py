"""Forecasting: the protocol on files of the sets' shapes and on the real ones, the baselines, the command."""

import gzip
import json
import math
import os
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor, nn

from evals.command_line import EvaluationError
from evals.forecasting import ForecastingSettings
from evals.forecasting import __main__ as forecasting
from evals.forecasting.data import Windows, load_series, scaled, splits
from evals.forecasting.models import DLinear, RepeatLast, build, errors
from evals.forecasting.run import CARRIED
from evals.trainer import seed_all, train
from tests.commands import status_of

HORIZONS = (96, 192, 336, 720)
# Rows of each set, and how many test windows there are beside the horizon.
SHAPES = {
    "ETTh1": (17_420, 2_881),
    "ETTh2": (17_420, 2_881),
    "ETTm1": (69_680, 11_521),
    "ETTm2": (69_680, 11_521),
    "weather": (52_696, 10_540),
    "electricity": (26_304, 5_261),
    "traffic": (17_544, 3_509),
}
# MSE and MAE of repeating the last value over 96 steps, computed from the files by others.
REPEATED = {
    "ETTh1": (1.294, 0.713),
    "ETTh2": (0.432, 0.422),
    "ETTm1": (1.214, 0.665),
    "ETTm2": (0.266, 0.328),
    "weather": (0.259, 0.254),
}
REAL = os.environ.get("TITANS_TIMESERIES", "")


@pytest.mark.parametrize("name", SHAPES)
def test_a_set_has_the_windows_of_the_protocol_and_each_part_its_own_targets(name: str) -> None:
    rows, windows = SHAPES[name]
    series = scaled(name, ("x",), torch.arange(rows, dtype=torch.float64)[:, None])
    lowest, highest = float(series.values[0]), float(series.values[-1])

    def row(value: Tensor) -> int:
        return round((float(value) - lowest) / (highest - lowest) * (rows - 1))

    for horizon in HORIZONS:
        assert len(series.windows("test", 96, horizon)) == windows - horizon
        for part, (begin, end) in zip(("train", "validation", "test"), splits(name, rows), strict=True):
            found = series.windows(part, 96, horizon)
            assert row(found[0]["future_values"][0]) == (begin + 96 if part == "train" else begin)
            assert row(found[len(found) - 1]["future_values"][-1]) == end - 1


@pytest.mark.skipif(not REAL, reason="TITANS_TIMESERIES names no folder with the real files")
@pytest.mark.parametrize("name", REPEATED)
def test_repeating_the_last_value_of_the_real_files_has_the_known_errors(name: str) -> None:
    file = next(path for path in sorted(Path(REAL).iterdir()) if path.name.startswith(f"{name}.csv"))
    windows = load_series(str(file)).windows("test", 96, 96)
    assert len(windows) == SHAPES[name][1] - 96
    assert errors(RepeatLast(96), windows) == pytest.approx(REPEATED[name], abs=5.1e-4)


def test_errors_are_means_over_all_windows_steps_and_channels() -> None:
    values = torch.randn(300, 2)
    windows = Windows(values, 12, 5)
    off = [values[i + 12 : i + 17] - values[i + 11] for i in range(300 - 16)]  # no multiple of the batch
    stacked = torch.stack(off).double()
    assert errors(RepeatLast(5), windows) == pytest.approx(
        (float(stacked.square().mean()), float(stacked.abs().mean()))
    )


def test_scaling_knows_the_training_rows_alone() -> None:
    values = torch.randn(200, 3, dtype=torch.float64) * torch.tensor([1.0, 5.0, 0.1]) + 3
    series, other = scaled("made", ("a", "b", "c"), values), values.clone()
    other[140:] *= 100
    rows = series.values[:140].double()
    torch.testing.assert_close(rows.mean(0), torch.zeros(3, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(rows.std(0, correction=0), torch.ones(3, dtype=torch.float64), atol=1e-6, rtol=0)
    assert torch.equal(scaled("made", ("a", "b", "c"), other).values[:140], series.values[:140])


def made(path: Path, rows: int = 400, end: str = "\n", **changed: str) -> Path:
    """Two waves; `changed` replaces the cell in line N, named lineN, of the second channel."""
    lines = ["date,first,OT"]
    for row in range(rows):
        cells = [math.sin(row / 4), math.cos(row / 7) + row % 5 / 50]
        lines.append(f"2016-07-01 {row},{cells[0]:.4f},{changed.get(f'line{row + 2}', f'{cells[1]:.4f}')}")
    path.write_bytes((end.join(lines) + end).encode())
    return path


def test_csv_files_are_read_as_they_come(tmp_path: Path) -> None:
    plain = load_series(str(made(tmp_path / "waves.csv")))
    assert (plain.name, plain.channels, plain.values.shape) == ("waves", ("first", "OT"), (400, 2))
    windows = load_series(str(made(tmp_path / "crlf.csv", end="\r\n")))
    assert torch.equal(plain.values, windows.values)
    raw = (tmp_path / "waves.csv").read_bytes()
    (tmp_path / "waves.csv.gz").write_bytes(gzip.compress(raw.replace(b"first", b"W/m\xb2")))
    packed = load_series(str(tmp_path / "waves.csv.gz"))
    assert torch.equal(plain.values, packed.values)
    assert packed.channels == ("W/m�", "OT")
    assert float(load_series(str(made(tmp_path / "sentinel.csv", line9="-9999"))).values[7, 1]) < -10  # it is kept


def test_a_set_without_a_file_comes_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = datasets.load_dataset(
        "csv", data_files=str(made(tmp_path / "waves.csv")), cache_dir=str(tmp_path / "cache")
    )
    asked = []

    def loaded(path: str, name: str) -> Any:
        asked.append((path, name))
        return table

    monkeypatch.setattr(datasets, "load_dataset", loaded)
    assert torch.equal(load_series("weather").values, load_series(str(tmp_path / "waves.csv")).values)
    assert asked == [("thuml/Time-Series-Library", "weather")]


def says(source: Path | str, *, horizon: int = 8) -> str:
    with pytest.raises(EvaluationError) as caught:
        load_series(str(source)).windows("test", 96, horizon)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_each_fault_of_a_file_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no such file; give a CSV file, or one of ETTh1" in says("nowhere.csv")
    assert "line 5, column OT: a value is missing" in says(made(tmp_path / "a.csv", line5=""))
    assert "line 7, column OT: a value is missing" in says(made(tmp_path / "b.csv", line7="NaN"))
    assert "line 9, column OT: 'high' is no number" in says(made(tmp_path / "c.csv", line9="high"))
    assert "line 9, column OT: 'inf' is no number" in says(made(tmp_path / "d.csv", line9="inf"))
    assert "line 4: has 4 columns, the header 3" in says(made(tmp_path / "e.csv", line4="1,2"))
    constant = {f"line{row}": "1" for row in range(2, 402)}
    assert "f: column OT is constant in the training rows" in says(made(tmp_path / "f.csv", **constant))
    assert "test has 176 rows with the 96 in front; a horizon of 90 needs 186" in says(
        made(tmp_path / "g.csv"), horizon=90
    )
    assert "ETTh9 has 400 rows; its split needs 14,400" in says(made(tmp_path / "ETTh9.csv"))
    (tmp_path / "h.csv").write_text("date,OT\n")
    assert "has no rows of numbers" in says(tmp_path / "h.csv")
    (tmp_path / "i.csv.gz").write_text("date,OT\n")
    assert "i.csv.gz: cannot be read" in says(tmp_path / "i.csv.gz")

    def missing(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(datasets, "load_dataset", missing)
    assert "thuml/Time-Series-Library cannot be read (no network at all)" in says("ETTh1")


def test_dlinear_is_linear_in_a_moving_average_and_the_rest() -> None:
    torch.manual_seed(0)
    model, past = DLinear(30, 4), torch.randn(2, 30, 3)
    padded = torch.cat([past[:, :1].expand(-1, 12, -1), past, past[:, -1:].expand(-1, 12, -1)], 1)
    trend = torch.stack([padded[:, step : step + 25].mean(1) for step in range(30)], 1)
    expected = torch.einsum("btc,ft->bfc", trend, model.trend.weight) + model.trend.bias[:, None]
    expected = expected + torch.einsum("btc,ft->bfc", past - trend, model.rest.weight) + model.rest.bias[:, None]
    torch.testing.assert_close(model(past)["prediction_outputs"], expected)


class Recorder(nn.Module):
    """One weight, and the batches it saw while training."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.weight, self.seen = nn.Parameter(torch.tensor(start)), list[Tensor]()

    def forward(self, past_values: Tensor, future_values: Tensor) -> dict[str, Tensor]:
        if self.training:
            self.seen.append(past_values.clone())
        return {"loss": (past_values.mean(1) * self.weight - future_values.mean(1)).square().mean()}


def test_every_system_sees_the_same_batches_of_a_seed_and_keeps_its_best_weights() -> None:
    windows, budget = Windows(torch.randn(80, 1), 6, 2), {"label": "future_values", "steps": 10, "batch": 4}
    models, seeds, found = [Recorder(0.0), Recorder(9.0), Recorder(0.0)], (1, 1, 2), []
    for model, seed in zip(models, seeds, strict=True):
        seed_all(seed)
        torch.randn(len(found))  # what a model draws for its weights must not matter
        found.append(train(model, windows, windows, learning_rate=3.0, seed=seed, **budget)[0])
    first, same, other = (torch.stack(model.seen) for model in models)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    for model, best in zip(models, found, strict=True):
        samples = [windows[index] for index in range(len(windows))]
        loss = model(*(torch.stack([sample[name] for sample in samples]) for name in samples[0]))["loss"]
        assert float(loss) == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("system", ["lmm", "dlinear", "patchtst", "patchtsmixer"])
def test_a_system_learns_a_wave(system: str, tmp_path: Path) -> None:
    series = load_series(str(made(tmp_path / "waves.csv")))
    settings = ForecastingSettings(
        ("waves.csv",), tmp_path, context=32, patch_length=8, patch_stride=8, dim=16, layers=1, batch=16
    )
    seed_all(0)
    model, parts = (
        build(system, settings, 2, 8),
        [series.windows(part, 32, 8) for part in ("train", "validation", "test")],
    )
    train(model, *parts[:2], label="future_values", steps=40, batch=16, learning_rate=1e-2, seed=0)
    assert errors(model, parts[2])[0] < 0.5 * errors(RepeatLast(8), parts[2])[0]


def test_the_command_prints_the_papers_table_with_ours_beside_and_goes_on_where_it_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, output = made(tmp_path / "weather.csv", 1200), tmp_path / "out"
    words = ["--data", data, "--output", output, "--systems", "repeat", "lmm", "--horizons", 4, 8, "--steps", 2]
    words += ["--batch", 4, "--context", 16, "--patch-length", 4, "--patch-stride", 4, "--dim", 8, "--layers", 1]
    words += ["--carried"]
    assert status_of(forecasting.main, *words, "--seeds", 0) == 0
    out = capsys.readouterr().out
    assert "| Titans memory | .358/.387 | .261/.309 | .420/.421 |" in out
    assert "| here: lmm |" not in out  # none of the paper's horizons was run
    lines = (output / "forecasting.jsonl").read_text().splitlines()
    assert len(lines) == 8  # two systems, two horizons, and of ours two more
    rows = {json.loads(line)["system"]: json.loads(line) for line in lines if json.loads(line)["horizon"] == 4}
    assert rows["lmm"]["windows"] == 240 - 4 + 1
    assert [row["windows"] for row in rows.values()][2:] == [15, 15]
    assert rows["lmm, every 16th window"]["mse"] != rows[f"lmm, {CARRIED}"]["mse"]
    assert (output / "forecasting.png").read_bytes().startswith(b"\x89PNG")
    assert status_of(forecasting.main, *words, "--seeds", 0, 1) == 0
    again = (output / "forecasting.jsonl").read_text().splitlines()
    assert again[:8] == lines
    assert [json.loads(line)["seed"] for line in again] == [0] * 8 + [1] * 8
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| weather | 8 | lmm |"))
    values = [json.loads(line)["mse"] for line in again if '"lmm"' in line and json.loads(line)["horizon"] == 8]
    assert f"{sum(values) / 2:.3f} ± {12.706 * abs(values[0] - values[1]) / 2:.3f}" in row
    words[words.index("--steps") + 1] = 3
    assert status_of(forecasting.main, *words, "--seeds", 0) == 2
    assert "has results with --steps 2, not 3; give another folder" in capsys.readouterr().err


def test_faults_are_found_before_any_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = made(tmp_path / "waves.csv", 1200)

    def fault(*words: object) -> str:
        assert status_of(forecasting.main, "--data", data, "--output", tmp_path / "out", *words) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        return lines[0]

    assert "--systems lstm: variant is 'lstm'; it must be one of" in fault("--systems", "dlinear", "lstm")
    assert "waves: validation has 216 rows with the 96 in front; a horizon of 300 needs 396" in fault(
        "--horizons", 8, 300
    )
    assert "--carried needs a causal model" in fault("--carried", "--frame", "einfft")
    assert "--patch-length 97 is longer than --context 96" in fault("--patch-length", 97)
    assert "--seeds 1 1 is empty or names one twice" in fault("--seeds", 1, 1)
    assert "--learning-rate is 0.0" in fault("--learning-rate", 0)
    assert not (tmp_path / "out").exists()
