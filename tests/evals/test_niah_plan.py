"""The plan: every sample once, and processes that end together."""

from pathlib import Path

import pytest

from evals.models import load_tokenizer
from evals.niah import NiahSettings, run
from evals.niah.plan import STEP, Planner
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
    batches = planner.batches(grid((8000,), 11, 8))
    whole = sum(len(batch.names) * batch.tokens for batch in batches)
    reading = planner.work(batches) - len(batches) * STEP * ROOM
    assert 0.45 < reading / whole < 0.55


@pytest.mark.parametrize("ranks", [2, 4, 11])
def test_processes_get_all_batches_and_end_at_about_the_same_time(planner: Planner, ranks: int) -> None:
    batches = planner.batches(grid((16_000,), 11, 1))
    shares = planner.divide(batches, ranks)
    assert sorted(map(str, batches)) == sorted(str(batch) for share in shares for batch in share)
    loads = [planner.work(share) for share in shares]
    assert max(loads) < 1.4 * min(loads)
    assert max(loads) < 0.6 * planner.work(batches)
    for share in shares:
        assert [batch.shared for batch in share] == sorted(batch.shared for batch in share)


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
    settings = NiahSettings(Path(), tmp_path, lengths=(700, 900), depths=3, samples=2, max_new_tokens=ROOM)
    run.evaluate(plant(tokenizer, lambda value: value), settings)
    assert len(promised) == 1
    assert sum(counted) == pytest.approx(promised[0])
