"""Batches of samples through a model: what each stretch of the plan reads once, and what each sample costs."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evals.command_line import say
from evals.measure import PeakMemory, Watch, state_bytes
from evals.models import EvalModel
from evals.niah import NiahSettings
from evals.niah.controls import controlled, without_memory
from evals.niah.generate import answer, read, repeat, value_losses
from evals.niah.plan import Batch, Forecast, Stretch
from evals.niah.records import Identity, Record, RecordFile
from evals.niah.samples import MAIN, Sample, SampleBuilder
from evals.niah.templates import score
from tokenization.progress import Progress


class Runner:
    """Runs batches and says how far they are."""

    def __init__(
        self,
        model: EvalModel,
        settings: NiahSettings,
        builder: SampleBuilder,
        identities: dict[str, Identity],
        results: RecordFile,
        quiet: bool = False,
    ) -> None:
        self._model, self._settings, self._builder = model, settings, builder
        self._identities, self._results, self._quiet = identities, results, quiet
        self._peak = PeakMemory(model.device)

    def run(self, batches: Sequence[Batch], forecast: Forecast | None, seconds: float) -> None:
        """Batches in the order they are in: those of a stretch stand together; `seconds` is what they should take."""
        with Progress("of the samples run", seconds, shown=not self._quiet) as progress:
            for control, own in groupby(batches, lambda batch: batch.stretch.control):
                assert forecast is not None
                with controlled(self._model, control) as model:
                    for stretch, group in groupby(own, lambda batch: batch.stretch):
                        self._run_stretch(model, stretch, list(group), forecast, progress)

    def _run_stretch(
        self, model: EvalModel, stretch: Stretch, batches: list[Batch], forecast: Forecast, progress: Progress
    ) -> None:
        """One reading of the haystack; each batch goes on from the state before its needle."""
        states: Any = None
        records: list[Record] = []
        at = 0
        for batch in batches:
            samples = [self._builder.build(name) for name in batch.names]
            promised = forecast.reading(1, batch.shared - at) + batch.seconds(forecast, self._settings.max_new_tokens)
            each = promised / (batch.shared - at + len(samples) * (batch.tokens - batch.shared))

            def show(tokens: int, each: float = each) -> None:
                progress.advance(each * tokens, tokens)

            watch = Watch(self._peak, show)
            if batch.shared > at:
                _, states = read(model.stream, self._pieces(samples[:1], at, batch.shared), watch.on_piece, states)
            at = batch.shared
            records += self._run_batch(model, samples, at, repeat(states, len(samples)), watch)
        hits = sum(record.substring for record in records)
        if not self._quiet:
            control = "" if stretch.control == MAIN else f", {stretch.control}"
            found = f"{hits} of {len(records)} found"
            say(f"length {stretch.length:,}, {stretch.task}{control}: {found}, {progress.left}")

    def _run_batch(self, model: EvalModel, samples: list[Sample], at: int, states: Any, watch: Watch) -> list[Record]:
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
        answers = answer(model.stream, logits, states, limit, end, watch.on_step)
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

    def _record(self, sample: Sample, ids: list[int], loss: float, costs: dict[str, Any]) -> Record:
        text = self._model.tokenizer.processor.decode(ids)
        return Record(
            **asdict(sample.name),
            needle_key=sample.needle_key,
            value=sample.value,
            prompt_tokens=sample.tokens,
            prompt_sha256=sample.sha256,
            answer=text,
            answer_ids=ids,
            **asdict(score(text, sample.value)),
            value_loss=loss,
            value_tokens=len(sample.value_ids),
            **costs,
            **asdict(self._identities[sample.name.task]),
        )
