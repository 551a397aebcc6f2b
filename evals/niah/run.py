"""The evaluation: which samples are missing, batch after batch of them, and the report."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from evals.measure import PeakMemory, state_bytes
from evals.models import EvalModel
from evals.niah.generate import answer, read
from evals.niah.records import Identity, Record, RecordFile
from evals.niah.samples import Sample, SampleBuilder, SampleKey
from evals.niah.scores import score
from evals.niah.settings import NiahSettings
from evals.niah.summary import write_report
from evals.niah.templates import TASK
from evals.progress import Pace, StatusLine

_TRIAL_TOKENS, _TRIAL_STEPS = 512, 3


def evaluate(model: EvalModel, settings: NiahSettings) -> dict[str, Any]:
    """Runs the samples that OUTPUT/niah.jsonl lacks and writes the report on all of this model's.

    Args:
        model: The model.
        settings: What to run.

    Returns:
        The report, as in OUTPUT/niah.json.

    Raises:
        EvaluationError: A length is too short, results cannot be read or written, or logits are not finite.
    """
    builder = SampleBuilder(model.tokenizer.processor, settings.max_new_tokens)
    names = list(_names(settings))
    for name in names:
        builder.check(name)
    identity = Identity(model.checkpoint_sha256, model.tokenizer.sha256, settings.max_new_tokens)
    with RecordFile(settings.output / "niah.jsonl") as results:
        _tell_about_others(results, identity)
        there = {record.name for record in results.of(identity)}
        missing = [name for name in names if name not in there]
        if missing:
            _Runner(model, settings, builder, identity, results).run(missing)
        return write_report(model, settings, results.of(identity))


class _Runner:
    """Runs batches and says how far they are."""

    def __init__(
        self, model: EvalModel, settings: NiahSettings, builder: SampleBuilder, identity: Identity, results: RecordFile
    ) -> None:
        self._model, self._settings, self._builder = model, settings, builder
        self._identity, self._results = identity, results
        self._pace, self._line, self._peak = Pace(), StatusLine(), PeakMemory(model.device)

    def run(self, missing: Sequence[SampleKey]) -> None:
        """Samples length by length, short ones first."""
        lengths = sorted({name.length for name in missing})
        batches = {length: _cut([n for n in missing if n.length == length], self._settings.batch) for length in lengths}
        self._measure_pace(batches[lengths[0]][0])
        answer_room = self._settings.max_new_tokens
        steps = (answer_room - 1) * sum(map(len, batches.values()))
        self._pace.plan(sum(name.length - answer_room for name in missing), steps)
        tokens = sum(name.length for name in missing)
        _tell(f"{len(missing)} samples, {tokens:,} tokens: {self._pace.text()}")
        for length in lengths:
            records = [record for batch in batches[length] for record in self._run_batch(batch)]
            hits = sum(record.substring for record in records)
            _tell(f"length {length:,}: {hits} of {len(records)} found, {self._pace.text()}")

    def _run_batch(self, names: Sequence[SampleKey]) -> list[Record]:
        samples = [self._builder.build(name) for name in names]
        prompts = torch.from_numpy(np.stack([sample.prompt for sample in samples]))
        self._peak.reset()
        self._pace.start()
        prefill_seconds, step_seconds = [], []

        def on_piece(tokens: int) -> None:
            prefill_seconds.append(self._pace.done("read", tokens))
            self._line.show(f"length {names[0].length:,}, {len(names)} samples: {self._pace.text()}")

        first, states = read(self._model, prompts, self._settings.piece, on_piece)
        carried = state_bytes(states)
        limit = self._settings.max_new_tokens
        answers = answer(self._model, first, states, limit, lambda: step_seconds.append(self._pace.done("step", 1)))
        self._pace.skip("step", limit - 1 - len(step_seconds))
        self._line.clear()
        costs = {
            "batch": len(names),
            "prefill_seconds": sum(prefill_seconds),
            "decode_ms_per_token": 1000 * sum(step_seconds) / max(len(step_seconds), 1),
            "peak_bytes": self._peak.bytes(),
            "state_bytes_per_sample": carried // len(names),
        }
        records = [self._record(sample, ids, costs) for sample, ids in zip(samples, answers, strict=True)]
        self._results.append(records)
        return records

    def _record(self, sample: Sample, ids: list[int], costs: dict[str, Any]) -> Record:
        text = self._model.tokenizer.processor.decode(ids)
        return Record(
            **asdict(sample.name),
            needle_key=sample.needle_key,
            value=sample.value,
            prompt_tokens=len(sample.prompt),
            answer=text,
            answer_tokens=len(ids),
            **asdict(score(text, sample.value)),
            **costs,
            **asdict(self._identity),
        )

    def _measure_pace(self, names: Sequence[SampleKey]) -> None:
        """Times a short stretch, so that the first estimate comes before the work."""
        prompts = torch.from_numpy(np.stack([self._builder.build(name).prompt for name in names]))[:, :_TRIAL_TOKENS]
        read(self._model, prompts[:, :1], 1, lambda tokens: None)  # the first call ever is slower
        self._pace.start()
        first, states = read(self._model, prompts, self._settings.piece, lambda tokens: self._pace.done("read", tokens))
        answer(self._model, first, states, 1 + _TRIAL_STEPS, lambda: self._pace.done("step", 1))


def _names(settings: NiahSettings) -> Iterator[SampleKey]:
    for length in sorted(set(settings.lengths)):
        for depth in settings.depth_percents:
            for sample in range(settings.samples):
                yield SampleKey(TASK, length, depth, sample, settings.seed)


def _cut(names: Sequence[SampleKey], size: int) -> list[Sequence[SampleKey]]:
    return [names[start : start + size] for start in range(0, len(names), size)]


def _tell_about_others(results: RecordFile, identity: Identity) -> None:
    others = len(results.records) - len(results.of(identity))
    if others:
        _tell(f"{results.path}: {others} results of other weights, tokenizers or answer lengths are left out")


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
