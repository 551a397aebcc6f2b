"""The evaluation: which samples are missing, batch after batch of them, and the report."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from evals.command_line import EXIT_FAULT, EvaluationError, say
from evals.models import EvalModel
from evals.niah import NiahSettings
from evals.niah.controls import check_controls, window_of
from evals.niah.haystacks import PROSE, read_source
from evals.niah.plan import Batch, Forecast, Planner, measure
from evals.niah.records import Identity, RecordFile
from evals.niah.runner import Runner
from evals.niah.samples import MAIN, SampleBuilder, SampleKey
from evals.niah.summary import write_report
from evals.niah.templates import BY_NAME, TASKS, read_words
from evals.report import seconds_text

_FILE, _FILE_OF_RANK = "niah.jsonl", "niah.rank-{}.jsonl"
Value = TypeVar("Value")


@dataclass(frozen=True)
class Team:
    """This process among those of torchrun; alone without it."""

    rank: int = 0
    """From 0; 0 plans and reports."""
    size: int = 1
    """Processes."""

    @classmethod
    def here(cls) -> "Team":
        """The processes that torch.distributed runs with."""
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else cls()

    def told(self, value: Value | None) -> Value:
        """What process 0 says; the others' values do not count."""
        said = [value]
        if self.size > 1:
            dist.broadcast_object_list(said, src=0)
        assert said[0] is not None
        return said[0]

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            dist.all_gather_object([None] * self.size, self.rank)


def evaluate(model: EvalModel, settings: NiahSettings) -> dict[str, Any] | None:
    """Runs the samples that OUTPUT/niah.jsonl lacks and writes the report on all of this model's.

    Under torchrun each process runs a share of the samples into a file of its own, which process 0 takes over.

    Args:
        model: The model; every process has one.
        settings: What to run.

    Returns:
        The report, as in OUTPUT/niah.json; None in processes other than the first.

    Raises:
        EvaluationError: A length is too short, results cannot be read or written, logits are not finite, or a budget
            is too small for any sample.
    """
    team = Team.here()
    if team.rank == 0:
        return _lead(team, model, settings)
    _follow(team, model, settings)
    return None


def make_builder(model: EvalModel, settings: NiahSettings) -> SampleBuilder:
    """Builds the samples that the settings ask for.

    Raises:
        EvaluationError: The text cannot be read, or the tokenizer cannot be spliced.
    """
    text = PROSE if settings.text is None else read_source(settings.text)
    window = window_of(model.config) or 0
    return SampleBuilder(
        model.tokenizer.processor,
        settings.max_new_tokens,
        fill=settings.fill,
        text=text,
        window=window,
        words=read_words(settings.words),
    )


def _lead(team: Team, model: EvalModel, settings: NiahSettings) -> dict[str, Any]:
    """Process 0: plans, runs its share, and reports on everyone's results."""
    with ExitStack() as stack:
        try:
            check_controls(settings.controls, model.config)
            builder = make_builder(model, settings)
            names = list(_names(settings))
            for name in names:
                builder.check(name)
            identities = _identities(model, settings, builder)
            results = stack.enter_context(RecordFile(settings.output / _FILE))
            for left in sorted(settings.output.glob(_FILE_OF_RANK.format("*"))):
                results.absorb(left)  # of a run that was stopped
            others = sum(record.identity != identities.get(record.task) for record in results.records)
            if others:
                say(f"{results.path}: {others} results of other weights, tokenizers, texts or settings are left out")
            there = {record.name for record in results.of(identities)}
            plan = _plan(model, settings, builder, names, there, team.size)
        except EvaluationError as fault:
            team.told(fault)
            raise
        team.told(plan)
        Runner(model, settings, builder, identities, results).run(plan.shares[0], plan.forecast, plan.seconds[0])
        team.wait()
        for rank in range(1, team.size):
            results.absorb(settings.output / _FILE_OF_RANK.format(rank))
        if not (records := results.of(identities)):
            raise EvaluationError(
                f"--budget {settings.budget}: not one sample of {min(settings.lengths):,} tokens fits into it; "
                "give more minutes or a smaller length"
            )
        return write_report(model, settings, records, identities, plan.grid)


def _follow(team: Team, model: EvalModel, settings: NiahSettings) -> None:
    """Another process: runs the share that process 0 gives it."""
    plan: Plan | EvaluationError = team.told(None)
    if isinstance(plan, EvaluationError):
        sys.exit(EXIT_FAULT)  # process 0 says why
    builder = make_builder(model, settings)
    identities = _identities(model, settings, builder)
    with RecordFile(settings.output / _FILE_OF_RANK.format(team.rank)) as results:
        runner = Runner(model, settings, builder, identities, results, quiet=True)
        runner.run(plan.shares[team.rank], plan.forecast, plan.seconds[team.rank])
    team.wait()


@dataclass(frozen=True)
class Plan:
    """What each process runs."""

    shares: list[list[Batch]]
    """Batches of each process."""
    seconds: list[float]
    """What the trials promise each of them."""
    forecast: Forecast | None
    """From the trials; None where nothing is missing."""
    grid: dict[int, tuple[int, int]] | None
    """Depths and samples of each length, where a budget chose them."""


def _plan(
    model: EvalModel,
    settings: NiahSettings,
    builder: SampleBuilder,
    names: Sequence[SampleKey],
    there: set[SampleKey],
    ranks: int,
) -> Plan:
    """Measures the model's pace, fits the grid into the budget and divides what is missing; says the time first."""
    missing = [name for name in names if name not in there]
    if not missing:
        return Plan([[] for _ in range(ranks)], [0.0] * ranks, None, None)
    planner = Planner(builder, settings.batch, settings.max_new_tokens)
    trial = max(planner.batches(n for n in missing if n.length == missing[0].length), key=lambda b: len(b.names))
    samples = [builder.build(name) for name in trial.names]
    forecast = measure(model.stream, samples, settings.piece, model.tokenizer.processor.eos_id())
    grid = None
    if settings.budget is not None:
        names, grid = planner.fit(names, lambda name: name not in there, forecast, 60 * settings.budget * ranks)
        missing = [name for name in names if name not in there]
        for length, (depths, count) in grid.items():
            say(f"length {length:,}: " + (f"{depths} depths x {count} samples" if depths else "not run, too long"))
    shares = planner.divide(planner.batches(missing), ranks, forecast)
    seconds = [planner.seconds(share, forecast) for share in shares]
    tokens = sum(name.length for name in missing)
    spread = f" in {ranks} processes" if ranks > 1 else ""
    say(f"{len(missing)} samples, {tokens:,} tokens{spread}: about {seconds_text(max(seconds))} left")
    return Plan(shares, seconds, forecast, grid)


def _names(settings: NiahSettings) -> Iterator[SampleKey]:
    for control in (MAIN, *dict.fromkeys(settings.controls)):
        for length in sorted(set(settings.lengths)):
            for task in dict.fromkeys(settings.tasks):
                for depth in settings.depth_percents:
                    for sample in range(settings.samples):
                        yield SampleKey(TASKS[task].name, length, depth, sample, settings.seed, control)


def _identities(model: EvalModel, settings: NiahSettings, builder: SampleBuilder) -> dict[str, Identity]:
    """What results must have in common to be counted together, by task."""
    found = {}
    for task in BY_NAME:
        source, digests = builder.source(task), (model.checkpoint_sha256, model.tokenizer.sha256)
        found[task] = Identity(
            *digests, settings.max_new_tokens, settings.fill, source.label, source.sha256, builder.words.name
        )
    return found
