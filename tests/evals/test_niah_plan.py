"""The plan: every sample once, processes that end together, and a grid that fits a budget."""

from dataclasses import replace
from pathlib import Path

import pytest

from evals.command_line import EvaluationError
from evals.models import load_tokenizer
from evals.niah import NiahSettings, run
from evals.niah.plan import Forecast, Planner
from evals.niah.samples import SampleBuilder, SampleKey
from tokenization.progress import Progress

from .planted import plant

ROOM = 32


@pytest.fixture(scope="module")
def planner(tokenizer: Path) -> Planner:
    return Planner(SampleBuilder(load_tokenizer(tokenizer).processor, ROOM), batch=4, max_new_tokens=ROOM)


def grid(lengths: tuple[int, ...], depths: int, samples: int) -> list[SampleKey]:
    settings = NiahSettings(Path(), Path(), lengths=lengths, depths=depths, samples=samples)
    places = [(length, depth) for length in lengths for depth in settings.depth_percents]
    return [SampleKey("niah_single_1", *place, sample, 0) for place in places for sample in range(samples)]


def test_batches_hold_every_sample_once_in_the_order_of_the_needles(planner: Planner) -> None:
    names = grid((900, 3000), 5, 6)
    batches = planner.batches(names)
    assert sorted(map(str, names)) == sorted(str(name) for batch in batches for name in batch.names)
    assert {len(batch.names) for batch in batches} == {4, 2}
    for length in (900, 3000):
        shared = [batch.shared for batch in batches if batch.stretch.length == length]
        assert shared == sorted(shared)


def test_all_depths_of_a_haystack_cost_about_half_of_reading_every_prompt(planner: Planner) -> None:
    forecast = Forecast(one=1.0, more=1.0, step=0.0)
    batches = planner.batches(grid((8000,), 11, 8))
    whole = sum(len(batch.names) * batch.tokens for batch in batches)
    assert 0.45 < planner.seconds(batches, forecast) / whole < 0.55


@pytest.mark.parametrize("ranks", [2, 4, 11])
def test_processes_get_all_batches_and_end_at_about_the_same_time(planner: Planner, ranks: int) -> None:
    forecast = Forecast(one=1.0, more=0.5, step=0.01)
    batches = planner.batches(grid((16_000,), 11, 1))
    shares = planner.divide(batches, ranks, forecast)
    assert sorted(map(str, batches)) == sorted(str(batch) for share in shares for batch in share)
    loads = [planner.seconds(share, forecast) for share in shares]
    assert max(loads) < 1.4 * min(loads)
    assert max(loads) < 0.6 * planner.seconds(batches, forecast)
    for share in shares:
        assert [batch.shared for batch in share] == sorted(batch.shared for batch in share)


def test_a_budget_thins_out_samples_then_depths_then_lengths(planner: Planner) -> None:
    forecast = Forecast(one=1.0, more=1.0, step=0.0)
    names = grid((1000, 4000, 16_000), 11, 8)
    everything = planner.seconds(planner.batches(names), forecast)

    def fitted(seconds: float) -> dict[int, tuple[int, int]]:
        chosen, sizes = planner.fit(names, lambda name: True, forecast, seconds)
        assert planner.seconds(planner.batches(chosen), forecast) <= seconds
        for length, (depths, samples) in sizes.items():
            own = [name for name in chosen if name.length == length]
            assert len(own) == depths * samples
            assert len({name.depth for name in own}) == depths
        return sizes

    assert fitted(3 * everything) == dict.fromkeys((1000, 4000, 16_000), (11, 8))
    assert fitted(everything / 2) == {1000: (11, 8), 4000: (11, 8), 16_000: (11, 2)}
    ever_less = [fitted(everything / parts)[16_000] for parts in (2, 4, 6, 9, 12, 18, 30, 100)]
    assert [depths * samples for depths, samples in ever_less] == sorted((d * s for d, s in ever_less), reverse=True)
    assert {(11, 1), (5, 1), (3, 1), (1, 1), (0, 0)} & set(ever_less) >= {(1, 1), (0, 0)}
    assert all(depths == 11 or samples < 2 for depths, samples in ever_less)


def test_finished_samples_cost_nothing_of_a_budget(planner: Planner) -> None:
    forecast = Forecast(one=1.0, more=1.0, step=0.0)
    names = grid((1000, 4000), 5, 2)
    chosen, sizes = planner.fit(names, lambda name: name.length == 1000, forecast, 6_000.0)
    assert sizes[4000] == (5, 2)
    assert len([name for name in chosen if name.length == 4000]) == 10


def test_the_budget_of_a_run_is_in_its_report(tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "measure", lambda *_: Forecast(one=1e-5, more=0.0, step=0.0))
    settings = NiahSettings(
        Path(), tmp_path, lengths=(700, 8_000_000), depths=3, samples=2, max_new_tokens=ROOM, budget=0.2
    )
    model = plant(tokenizer, lambda value: value)
    report = run.evaluate(model, settings)
    assert report is not None
    assert report["budget_grid"]["700"] == {"depths": 3, "samples": 2}
    assert report["budget_grid"]["8000000"] == {"depths": 0, "samples": 0}
    assert "not run, the budget was too small: 8,000,000" in (tmp_path / "niah.md").read_text()
    assert report["by_length"][0]["n"] == 6
    with pytest.raises(EvaluationError, match=r"--budget 1e-06: not one sample of 700 tokens fits into it"):
        run.evaluate(model, replace(settings, output=tmp_path / "other", budget=1e-6))


def test_all_that_was_promised_is_counted_when_the_samples_have_run(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    promised, counted = list[float](), list[float]()

    class Counted(Progress):
        def __init__(self, verb: str, total: float, *, shown: bool) -> None:
            super().__init__(verb, total, shown=shown)
            promised.append(total)

        def advance(self, done: float, tokens: int) -> None:
            super().advance(done, tokens)
            counted.append(done)

    monkeypatch.setattr(run, "Progress", Counted)
    monkeypatch.setattr(run, "measure", lambda *_: Forecast(one=1.0, more=0.5, step=10.0))
    settings = NiahSettings(Path(), tmp_path, lengths=(700, 900), depths=3, samples=2, max_new_tokens=ROOM)
    run.evaluate(plant(tokenizer, lambda value: value), settings)
    assert len(promised) == 1
    assert sum(counted) == pytest.approx(promised[0])
