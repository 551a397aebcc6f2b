"""The evaluation: which samples are missing, batch after batch of them, and the report."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

import numpy as np
import torch

from evals.babilong import BabilongSettings
from evals.babilong.samples import StoryKey, StorySample
from evals.babilong.stories import correct
from evals.babilong.summary import write_report
from evals.babilong.texts import StoryResult, Texts, read_texts
from evals.command_line import say
from evals.measure import PeakMemory, Watch, state_bytes
from evals.models import EvalModel
from evals.niah.generate import answer, read
from evals.record_file import RecordFile, counted
from tokenization.progress import Progress

_STEP = 10  # a token of an answer takes about as long as so many that are read


def evaluate(model: EvalModel, settings: BabilongSettings) -> dict[str, Any]:
    """Runs the samples that OUTPUT/babilong.jsonl lacks and writes the report on all of this model's.

    Returns:
        The report, as in OUTPUT/babilong.json.

    Raises:
        EvaluationError: Texts cannot be read or are too few, results cannot be read or written, or logits are not
            finite.
    """
    texts = read_texts(model, settings)
    builders = {task: texts.builder(model, task) for task in texts.stories}
    samples = [
        builders[task].build(StoryKey(task, length, sample, settings.seed))
        for length in sorted(set(settings.lengths))
        for task in settings.tasks
        for sample in range(settings.samples)
    ]  # what is long in them stays on disk
    with RecordFile(settings.output / "babilong.jsonl", StoryResult) as results:
        own = counted(results.records, texts.identities)
        if len(own) < len(results.records):
            others = len(results.records) - len(own)
            say(f"{results.path}: {others} results of other weights, tokenizers, texts or tasks are left out")
        there = {record.name for record in own}
        missing = [sample for sample in samples if sample.name not in there]
        if missing:
            own += _Runner(model, settings, texts, results).run(missing)
        return write_report(model, settings, texts, own)


class _Runner:
    """Runs batches and says how far they are."""

    def __init__(
        self, model: EvalModel, settings: BabilongSettings, texts: Texts, results: RecordFile[StoryResult]
    ) -> None:
        self._model, self._settings, self._texts, self._results = model, settings, texts, results
        self._peak = PeakMemory(model.device)

    def run(self, missing: Sequence[StorySample]) -> list[StoryResult]:
        """Samples length by length, short ones first."""
        tokens = sum(sample.tokens for sample in missing)
        say(f"{len(missing)} samples, {tokens:,} tokens")
        done: list[StoryResult] = []
        steps = _STEP * (self._settings.max_new_tokens - 1) * len(missing)
        with Progress("of the samples run", tokens + steps) as progress:
            for length, group in groupby(missing, lambda sample: sample.name.length):
                records: list[StoryResult] = []
                for batch in self._cut(list(group)):
                    records += self._run_batch(batch, progress)
                    if not done and len(records) == len(batch):
                        say(f"{len(records)} samples done, {progress.left}")
                hits = sum(record.correct for record in records)
                say(f"length {length:,}: {hits} of {len(records)} right, {progress.left}")
                done += records
        return done

    def _cut(self, samples: list[StorySample]) -> Iterator[list[StorySample]]:
        """Batches of one task with prompts of one length: padding would be read as text."""
        for _, alike in groupby(sorted(samples, key=_shape), _shape):
            rows = list(alike)
            for start in range(0, len(rows), self._settings.batch):
                yield rows[start : start + self._settings.batch]

    def _run_batch(self, samples: Sequence[StorySample], progress: Progress) -> list[StoryResult]:
        watch = Watch(self._peak, lambda tokens: progress.advance(tokens, tokens))
        model, end = self._model, self._model.tokenizer.processor.eos_id()
        columns = zip(*(sample.pieces(self._settings.piece) for sample in samples), strict=True)
        logits, states = read(model.stream, (torch.from_numpy(np.stack(rows)) for rows in columns), watch.on_piece)
        carried, limit, rows = state_bytes(states), self._settings.max_new_tokens, len(samples)
        answers = answer(model.decoder, logits, states, limit, end, watch.on_step)
        progress.advance(_STEP * (limit - 1) * rows, 0)
        costs = watch.costs() | {"batch": rows, "state_bytes_per_sample": carried // rows}
        del costs["prefill_tokens"], costs["seconds"]
        records = [self._record(sample, ids, costs) for sample, ids in zip(samples, answers, strict=True)]
        self._results.append(records)
        return records

    def _record(self, sample: StorySample, ids: list[int], costs: dict[str, Any]) -> StoryResult:
        text, task, story = self._model.tokenizer.processor.decode(ids), sample.name.task, sample.story
        return StoryResult(
            **asdict(sample.name),
            question=story.question,
            target=story.target,
            answer=text,
            correct=correct(text, story.target, story.question, self._texts.prompts[task].labels),
            facts=len(story.facts),
            prompt_tokens=sample.tokens,
            answer_tokens=len(ids),
            **costs,
            **asdict(self._texts.identities[task]),
        )


def _shape(sample: StorySample) -> tuple[str, int]:
    return sample.name.task, sample.tokens
