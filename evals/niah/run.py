"""The evaluation: which samples are missing, what each stretch of the plan reads once, batch by batch, the report."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from evals.command_line import EXIT_FAULT, EvaluationError, say
from evals.measure import PeakMemory, Watch, state_bytes
from evals.models import EvalModel
from evals.niah import NiahSettings
from evals.niah.controls import check_controls, controlled, window_of, without_memory
from evals.niah.generate import answer, read, repeat, value_losses
from evals.niah.haystacks import PROSE, read_source
from evals.niah.plan import STEP, Batch, Planner, Stretch
from evals.niah.samples import MAIN, Sample, SampleBuilder, SampleKey
from evals.niah.summary import FILL, NeedleIdentity, NeedleResult, write_report
from evals.niah.templates import TASKS, read_words, score, with_keys
from evals.record_file import RecordFile, counted
from tokenization.progress import Progress

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
        EvaluationError: A length is too short, results cannot be read or written, or logits are not finite.
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
            results = stack.enter_context(RecordFile(settings.output / _FILE, NeedleResult))
            for left in sorted(settings.output.glob(_FILE_OF_RANK.format("*"))):
                results.absorb(left)  # of a run that was stopped
            tasks = {name.task for name in names} | {record.task for record in results.records}
            identities = _identities(model, settings, builder, tasks)
            others = sum(not record.belongs_to(identities.get(record.task)) for record in results.records)
            if others:
                say(f"{results.path}: {others} results of other weights, tokenizers, texts or settings are left out")
            there = {record.name for record in counted(results.records, identities)}
            missing = [name for name in names if name not in there]
            planner = Planner(builder, settings.batch, settings.max_new_tokens)
            shares = planner.divide(planner.batches(missing), team.size)
        except EvaluationError as fault:
            team.told(fault)
            raise
        team.told(shares)
        if missing:
            spread = f" in {team.size} processes" if team.size > 1 else ""
            say(f"{len(missing)} samples, {sum(name.length for name in missing):,} tokens{spread}")
        Runner(model, settings, builder, identities, results).run(shares[0], planner.work(shares[0]))
        team.wait()
        for rank in range(1, team.size):
            results.absorb(settings.output / _FILE_OF_RANK.format(rank))
        return write_report(model, settings, counted(results.records, identities), identities)


def _follow(team: Team, model: EvalModel, settings: NiahSettings) -> None:
    """Another process: runs the share that process 0 gives it."""
    shares: list[list[Batch]] | EvaluationError = team.told(None)
    if isinstance(shares, EvaluationError):
        sys.exit(EXIT_FAULT)  # process 0 says why
    builder = make_builder(model, settings)
    identities = _identities(model, settings, builder, {name.task for name in _names(settings)})
    with RecordFile(settings.output / _FILE_OF_RANK.format(team.rank), NeedleResult) as results:
        runner = Runner(model, settings, builder, identities, results, quiet=True)
        runner.run(shares[team.rank])
    team.wait()


def _names(settings: NiahSettings) -> Iterator[SampleKey]:
    tasks: list[str] = []
    for letters in dict.fromkeys(settings.tasks):
        keys = dict.fromkeys(settings.keys) if letters == "mk1" else (TASKS[letters].keys,)
        tasks += [with_keys(TASKS[letters], count).name for count in keys]
    for control in (MAIN, *dict.fromkeys(settings.controls)):
        for length in sorted(set(settings.lengths)):
            for task in tasks:
                for depth in settings.depth_percents:
                    for sample in range(settings.samples):
                        yield SampleKey(task, length, depth, sample, settings.seed, control)


def _identities(
    model: EvalModel, settings: NiahSettings, builder: SampleBuilder, tasks: Iterable[str]
) -> dict[str, NeedleIdentity]:
    """What results must have in common to be counted together, by task."""
    found = {}
    for task in tasks:
        with suppress(KeyError):  # no task of this version
            source = builder.source(task)
            found[task] = NeedleIdentity(
                checkpoint_sha256=model.checkpoint_sha256,
                tokenizer_sha256=model.tokenizer.sha256,
                max_new_tokens=settings.max_new_tokens,
                fill=FILL,
                haystack=source.label,
                haystack_sha256=source.sha256,
                words=builder.words.name,
            )
    return found


class Runner:
    """Runs batches and says how far they are."""

    def __init__(
        self,
        model: EvalModel,
        settings: NiahSettings,
        builder: SampleBuilder,
        identities: dict[str, NeedleIdentity],
        results: RecordFile[NeedleResult],
        quiet: bool = False,
    ) -> None:
        self._model, self._settings, self._builder = model, settings, builder
        self._identities, self._results, self._quiet = identities, results, quiet
        self._peak = PeakMemory(model.device)

    def run(self, batches: Sequence[Batch], work: int = 0) -> None:
        """Batches in the order they are in: those of a stretch stand together; `work` is what the planner counts."""
        with Progress("of the samples run", work, shown=not self._quiet) as progress:
            for control, own in groupby(batches, lambda batch: batch.stretch.control):
                with controlled(self._model, control) as model:
                    for stretch, group in groupby(own, lambda batch: batch.stretch):
                        self._run_stretch(model, stretch, list(group), progress)

    def _run_stretch(self, model: EvalModel, stretch: Stretch, batches: list[Batch], progress: Progress) -> None:
        """One reading of the haystack; each batch goes on from the state before its needle."""
        states: Any = None
        records: list[NeedleResult] = []
        at = 0
        for batch in batches:
            samples = [self._builder.build(name) for name in batch.names]
            watch = Watch(self._peak, lambda tokens: progress.advance(tokens, tokens))
            if batch.shared > at:
                _, states = read(model.stream, self._pieces(samples[:1], at, batch.shared), watch.on_piece, states)
            at = batch.shared
            records += self._run_batch(model, samples, at, repeat(states, len(samples)), watch)
            progress.advance(STEP * self._settings.max_new_tokens, 0)
        hits = sum(record.substring for record in records)
        if not self._quiet:
            control = "" if stretch.control == MAIN else f", {stretch.control}"
            found = f"{hits:g} of {len(records)} found"
            say(f"length {stretch.length:,}, {stretch.task}{control}: {found}, {progress.left}")

    def _run_batch(
        self, model: EvalModel, samples: list[Sample], at: int, states: Any, watch: Watch
    ) -> list[NeedleResult]:
        """Samples whose first tokens have been read into these states."""
        limit, end = self._settings.max_new_tokens, model.tokenizer.processor.eos_id()
        stop = samples[0].tokens
        if samples[0].name.control == "memory_reset":
            cut = samples[0].question_at
            _, states = read(model.stream, self._pieces(samples, at, cut), watch.on_piece, states)
            at, states = cut, without_memory(states, model.config)
        logits, states = read(model.stream, self._pieces(samples, at, stop), watch.on_piece, states)
        carried = state_bytes(states)
        losses = value_losses(model.stream, logits, states, [sample.value_ids for sample in samples])
        watch.mark()
        answers = answer(model.decoder, logits, states, limit, end, watch.on_step)
        costs = {**watch.costs(), "batch": len(samples), "state_bytes_per_sample": carried // len(samples)}
        found = [
            self._record(sample, ids, loss, costs) for sample, ids, loss in zip(samples, answers, losses, strict=True)
        ]
        self._results.append(found)
        return found

    def _pieces(self, samples: Sequence[Sample], start: int, stop: int) -> Iterator[Tensor]:
        """Pieces that end at multiples of the piece's size, so that they fall together with segments and chunks."""
        while start < stop:
            cut = min(stop, start - start % self._settings.piece + self._settings.piece)
            yield torch.from_numpy(np.stack([sample.piece(start, cut) for sample in samples]))
            start = cut

    def _record(self, sample: Sample, ids: list[int], loss: float, costs: dict[str, Any]) -> NeedleResult:
        text = self._model.tokenizer.processor.decode(ids)
        return NeedleResult(
            **asdict(sample.name),
            needle_key=sample.needle_key,
            value=sample.value,
            prompt_tokens=sample.tokens,
            prompt_sha256=sample.sha256,
            answer=text,
            answer_ids=ids,
            **asdict(score(text, *sample.values)),
            value_loss=loss,
            value_tokens=len(sample.value_ids),
            **costs,
            **asdict(self._identities[sample.name.task]),
        )
