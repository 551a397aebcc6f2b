"""The forecasts: what is missing is trained and tested, then the tables and the plot are written."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset

from evals.command_line import say
from evals.forecasting import OTHERS, ForecastingSettings
from evals.forecasting.data import Series, Windows, load_series
from evals.forecasting.models import build, carried_errors, errors
from evals.report import interval_text, markdown_table, settings_of, write_bytes, write_figure
from evals.trainer import seed_all, sweep, train

HORIZONS = (96, 192, 336, 720)
SETS = ("ETTm1", "ETTm2", "ETTh1", "ETTh2", "ECL", "Traffic", "Weather")
PUBLISHED = {
    "Titans memory": (".358/.387", ".261/.309", ".420/.421", ".336/.382", ".162/.261", ".415/.289", ".231/.265"),
    "SiMBA": (".383/.396", ".271/.327", ".441/.432", ".361/.391", ".169/.274", ".493/.291", ".255/.280"),
    "iTransformer": (".407/.410", ".288/.332", ".454/.447", ".383/.407", ".178/.270", ".428/.282", ".258/.278"),
    "RLinear": (".414/.407", ".286/.327", ".446/.434", ".374/.398", ".219/.298", ".626/.378", ".272/.291"),
    "PatchTST": (".387/.400", ".281/.326", ".469/.454", ".387/.407", ".205/.290", ".481/.304", ".259/.281"),
    "Crossformer": (".513/.496", ".757/.610", ".529/.522", ".942/.684", ".244/.334", ".550/.304", ".259/.315"),
    "TiDE": (".419/.419", ".358/.404", ".541/.507", ".611/.550", ".251/.344", ".760/.473", ".271/.320"),
    "TimesNet": (".400/.406", ".291/.333", ".458/.450", ".414/.427", ".192/.295", ".620/.336", ".259/.287"),
    "DLinear": (".403/.407", ".350/.401", ".456/.452", ".559/.515", ".212/.300", ".625/.383", ".265/.317"),
    "TimeXer": (".382/.397", ".274/.322", ".437/.437", ".368/.396", ".171/.270", ".466/.287", ".241/.271"),
    "CycleNet": (".379/.396", ".266/.314", ".457/.441", ".388/.409", ".168/.259", ".472/.301", ".243/.271"),
    "TQNet": (".377/.393", ".277/.323", ".441/.434", ".378/.402", ".164/.259", ".445/.276", ".242/.269"),
    "TimeMixer++": (".369/.378", ".269/.320", ".419/.432", ".339/.380", ".165/.253", ".416/.264", ".226/.262"),
}
"""What papers report: look-back 96, MSE/MAE, the mean of four horizons.

The rows down to DLinear are table 3 of [Titans](https://arxiv.org/abs/2501.00663v1), which names no look-back: that it
is 96 follows from iTransformer's paper, where the baselines' numbers stand too. The last four are their own papers'.
"""

_VALIDATED = 512  # windows, spread over all of validation: they choose among five states, and are no result
CARRIED = "the same windows, state carried (not comparable)"
_NOT_BUDGET = ("data", "output", "systems", "horizons", "seeds", "carried", "export")


@dataclass(frozen=True)
class ForecastResult:
    """One model, tested."""

    series: str
    system: str
    horizon: int
    seed: int
    mse: float
    mae: float
    validation: float | None
    """MSE of the windows of validation that chose the weights; None where nothing was trained."""
    parameters: int
    seconds: float
    windows: int
    """Test windows."""
    budget: dict[str, Any]
    """The settings that all results of a folder share."""
    shown: dict[str, list[float]] = field(default_factory=dict)
    """Of the first seed, for the plot: past, truth and forecast of the last channel, the test's middle window."""

    @property
    def key(self) -> tuple[str, str, int, int]:
        """What it is a result of."""
        return self.series, self.system, self.horizon, self.seed


def compare(settings: ForecastingSettings) -> str:
    """Trains and tests what is missing, writes the report, and returns the tables.

    Raises:
        EvaluationError: A file or a setting does not fit, or the folder holds results of another budget.
    """
    every = [load_series(source) for source in settings.data]
    for series in every:  # all that can be wrong, before the first hour of training
        for horizon in settings.horizons:
            for part in ("train", "validation", "test"):
                series.windows(part, settings.context, horizon)
            for system in settings.systems:
                build(system, settings, len(series.channels), horizon)
    budget = {name: value for name, value in settings_of(settings).items() if name not in _NOT_BUDGET}
    wanted = (
        ((series.name, system, horizon, seed), series, system, horizon, seed, settings, budget)
        for seed, horizon, series, system in product(settings.seeds, settings.horizons, every, settings.systems)
    )
    results = sweep(settings.output / "forecasting.jsonl", ForecastResult, budget, wanted, _trained)
    return write_report(settings.output, results)


def _trained(
    series: Series, system: str, horizon: int, seed: int, settings: ForecastingSettings, budget: dict[str, Any]
) -> list[ForecastResult]:
    parts = {part: series.windows(part, settings.context, horizon) for part in ("train", "validation", "test")}
    seed_all(seed)
    model = build(system, settings, len(series.channels), horizon)
    validated, seconds = None, 0.0
    if any(parameter.requires_grad for parameter in model.parameters()):
        few = torch.linspace(0, len(parts["validation"]) - 1, _VALIDATED).long().unique().tolist()
        validated, seconds = train(
            model,
            parts["train"],
            Subset(parts["validation"], few),
            label="future_values",
            steps=settings.steps,
            batch=settings.batch,
            learning_rate=settings.learning_rate,
            seed=seed,
        )
    mse, mae = errors(model, parts["test"])
    say(f"{series.name}, {system}, horizon {horizon}, seed {seed}: MSE {mse:.3f}, MAE {mae:.3f}, {seconds:.0f} s")
    first = seed == settings.seeds[0]
    if first and settings.export and system not in OTHERS:
        from titans_mcore.hf.save import save_alone

        sample = {"past_values": parts["test"][0]["past_values"][None]}
        save_alone(model, settings.output / "models" / f"{series.name}-{system}-{horizon}", sample)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    shown = _shown(model, parts["test"]) if first else {}

    def result(name: str, pair: tuple[float, float], windows: int, shown: dict[str, list[float]]) -> ForecastResult:
        key, trained = (series.name, name, horizon, seed), (parameters, round(seconds, 1))
        return ForecastResult(*key, *pair, validated, *trained, windows, budget, shown)

    found = [result(system, (mse, mae), len(parts["test"]), shown)]
    if settings.carried and system not in OTHERS:
        empty, carried, windows = carried_errors(model, parts["test"])
        found.append(result(f"{system}, every {settings.context}th window", empty, windows, {}))
        found.append(result(f"{system}, {CARRIED}", carried, windows, {}))
    return found


@torch.inference_mode()
def _shown(model: torch.nn.Module, windows: Windows) -> dict[str, list[float]]:
    sample = windows[len(windows) // 2]
    forecast = model(past_values=sample["past_values"][None])["prediction_outputs"][0]
    lines = {"past": sample["past_values"], "truth": sample["future_values"], "forecast": forecast}
    return {name: [round(value, 3) for value in line[:, -1].tolist()] for name, line in lines.items()}


def write_report(output: Path, results: Sequence[ForecastResult]) -> str:
    """Writes forecasting.md and forecasting.png, and returns the tables."""
    text = f"{_ours_table(results)}\n\n{_paper_table(results)}\n"
    write_bytes(output / "forecasting.md", text.encode())
    write_figure(output / "forecasting.png", _figure(results))
    return text


def _ours_table(results: Sequence[ForecastResult]) -> str:
    """Every set, horizon and system: mean and half of the 95 % interval over seeds."""
    groups: dict[tuple[str, int, str], list[ForecastResult]] = {}
    for result in results:
        groups.setdefault((result.series, result.horizon, result.system), []).append(result)
    rows = []
    for (series, horizon, system), group in groups.items():
        mse, mae = ([getattr(result, name) for result in group] for name in ("mse", "mae"))
        seconds = statistics.fmean(result.seconds for result in group)
        row = [series, str(horizon), system, f"{group[0].parameters:,}", interval_text(mse), interval_text(mae)]
        rows.append([*row, str(len(group)), f"{seconds:.0f}", f"{group[0].windows:,}"])
    order = {series: place for place, series in enumerate(dict.fromkeys(result.series for result in results))}
    rows.sort(key=lambda row: (order[row[0]], int(row[1])))
    header = ["set", "horizon", "system", "parameters", "MSE", "MAE", "seeds", "seconds", "test windows"]
    return markdown_table(header, rows)


def _paper_table(results: Sequence[ForecastResult]) -> str:
    """MSE/MAE, mean of four horizons: as published, and ours where all four are there."""
    names = {name.lower(): name for name in SETS}
    found: dict[str, dict[str, dict[int, list[ForecastResult]]]] = {}
    for result in results:
        column = names.get(result.series.lower())
        if column is not None and result.horizon in HORIZONS and "," not in result.system:
            found.setdefault(result.system, {}).setdefault(column, {}).setdefault(result.horizon, []).append(result)
    rows = [[name, *cells] for name, cells in PUBLISHED.items()]
    for system, sets in found.items():
        cells = []
        for column in SETS:
            by_horizon = sets.get(column, {})
            if len(by_horizon) < len(HORIZONS):
                cells.append("-")
                continue
            means = (
                statistics.fmean(
                    statistics.fmean(getattr(result, name) for result in group) for group in by_horizon.values()
                )
                for name in ("mse", "mae")
            )
            cells.append("/".join(f"{mean:.3f}"[1:] if mean < 1 else f"{mean:.3f}" for mean in means))
        rows.append([f"here: {system}", *cells])
    return markdown_table(["MSE/MAE, mean of horizons 96, 192, 336, 720", *SETS], rows)


def _figure(results: Sequence[ForecastResult]) -> Any:
    """For every set the shortest horizon: a window's last channel, the truth, and what each system forecast."""
    from matplotlib.figure import Figure

    shown = [result for result in results if result.shown]
    shortest = {series: min(r.horizon for r in shown if r.series == series) for series in {r.series for r in shown}}
    panels = sorted(shortest)
    figure = Figure(figsize=(9, 2.4 * len(panels)), layout="constrained")
    for axes, series in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        ours = [r for r in shown if r.series == series and r.horizon == shortest[series]]
        past, truth = ours[0].shown["past"], ours[0].shown["truth"]
        axes.plot(range(-len(past), len(truth)), past + truth, color="black", linewidth=1, label="truth")
        for result in ours:
            axes.plot(range(len(truth)), result.shown["forecast"], linewidth=1, label=result.system)
        axes.axvline(0, color="grey", linestyle=":", linewidth=1)
        axes.set(title=f"{series}, last channel, middle of the test rows, seed {ours[0].seed}", ylabel="scaled value")
        axes.grid(alpha=0.3)
    axes.set(xlabel="steps from the forecast's beginning")
    axes.legend(fontsize=7, ncols=3)
    return figure
