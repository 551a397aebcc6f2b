"""Rows of held-out tokens, and the loss of a streamed model at each of their positions."""

import json
import math
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from evals.command_line import EvaluationError
from evals.models import EvalModel
from evals.progress import Pace, StatusLine


def heldout_rows(folder: Path, model: EvalModel, rows: int, length: int) -> np.ndarray:
    """Held-out documents, joined in their order and cut into rows.

    Args:
        folder: Has heldout.bin and heldout.idx, and manifest.json where the tokenizer is to be checked.
        model: Must have read the same tokens.
        rows: Most rows.
        length: Tokens that a row predicts.

    Returns:
        (rows or fewer, length + 1) int32: a row's last token is the next row's first, so that every token but the very
        first is predicted once.

    Raises:
        EvaluationError: Files are missing or damaged, too short for one row, or of another tokenizer.
    """
    _check_tokenizer(folder, model)
    dataset = _open(folder / "heldout")
    documents: list[np.ndarray] = []
    wanted, have = rows * length + 1, 0
    while len(documents) < len(dataset) and have < wanted:
        documents.append(dataset[len(documents)])
        have += len(documents[-1])
    rows = min(rows, (have - 1) // length)
    if rows < 1:
        raise EvaluationError(
            f"--data {folder}: {have:,} held-out tokens, but a row of --length {length} needs {length + 1:,}; "
            "give a smaller --length or encode more text"
        )
    tokens = np.concatenate(documents)[: rows * length + 1].astype(np.int32)
    if tokens.max() >= model.config.vocab_size:
        raise EvaluationError(
            f"--data {folder}: it holds token {tokens.max()}, but the model knows {model.config.vocab_size:,}; "
            "give the shards of the model's own tokenizer"
        )
    return np.lib.stride_tricks.sliding_window_view(tokens, length + 1)[::length]


@torch.inference_mode()
def loss_by_position(model: EvalModel, rows: np.ndarray, batch: int, piece: int) -> np.ndarray:
    """Sum over rows of the loss at each position, in nats.

    Args:
        model: Streams each row from a fresh state.
        rows: (R, L + 1) token ids.
        batch: Rows read side by side.
        piece: Tokens read at a time; logits of one piece exist at a time.

    Returns:
        (L,) float64; entry t is the loss of predicting a token from t + 1 tokens read.
    """
    length = rows.shape[1] - 1
    total = np.zeros(length)
    pace, line = Pace(), StatusLine()
    pace.plan(len(rows) * length, 0)
    for first in range(0, len(rows), batch):
        part = torch.from_numpy(np.array(rows[first : first + batch], np.int64))
        states: Any = None
        for start in range(0, length, piece):
            stop = min(start + piece, length)
            logits, states = model.stream(part[:, start:stop], states)
            targets = part[:, start + 1 : stop + 1].to(logits.device)
            losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
            total[start:stop] += losses.view(len(part), -1).double().sum(0).cpu().numpy()
            pace.done("read", targets.numel())
            line.show(f"rows {first + len(part)} of {len(rows)}, {stop:,} tokens read: {pace.text()}")
        if first == 0 and len(rows) > batch:
            line.clear()
            print(f"{len(rows)} rows of {length:,} tokens: {pace.text()}", file=sys.stderr, flush=True)
    line.clear()
    if not np.isfinite(total).all():
        raise EvaluationError(
            f"the model of {model.checkpoint} gives a loss that is not finite; take another checkpoint"
        )
    return total


def summarise(losses: np.ndarray, rows: int, trained_length: int | None) -> dict[str, Any]:
    """Mean loss and perplexity over all positions and by bucket; a bucket ends at a power of two.

    Args:
        losses: From `loss_by_position`.
        rows: Rows it sums over.
        trained_length: Also gives the loss within it and beyond, where there are such positions.
    """
    ends = [2**power for power in range((len(losses) - 1).bit_length())] + [len(losses)]
    starts = [0, *ends[:-1]]
    report = {**_mean(losses, rows), "buckets": []}
    for start, end in zip(starts, ends, strict=True):
        report["buckets"].append({"first": start + 1, "last": end, **_mean(losses[start:end], rows)})
    if trained_length is not None:
        report["within_trained_length"] = _mean(losses[:trained_length], rows)
        if trained_length < len(losses):
            report["beyond_trained_length"] = _mean(losses[trained_length:], rows)
    return report


def _mean(losses: Sequence[float] | np.ndarray, rows: int) -> dict[str, Any]:
    mean = float(np.mean(losses)) / rows
    # exp overflows past 709 nats; a loss that large is reported, its perplexity is not a number JSON has.
    return {"tokens": rows * len(losses), "loss": mean, "perplexity": math.exp(mean) if mean < 700 else None}


def _open(prefix: Path) -> Any:
    for suffix in (".bin", ".idx"):
        if not prefix.with_suffix(suffix).is_file():
            raise EvaluationError(
                f"--data {prefix.parent}: {prefix.name}{suffix} is missing; write shards with "
                "`python -m tokenization.encode`"
            )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets.indexed_dataset import IndexedDataset
    # Readers that could not be made complain on stderr when they are dropped, after the error has said it all.
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        dataset = IndexedDataset(str(prefix))
        expected = int(dataset.sequence_lengths.sum(dtype=np.int64)) * dataset.index.dtype_size
    except Exception as error:  # a damaged index fails in whatever way its bytes lead to
        fault = " ".join(str(error).split()) or type(error).__name__
    else:
        there = prefix.with_suffix(".bin").stat().st_size
        if there == expected:
            return dataset
        fault = f"{prefix.name}.bin has {there:,} bytes instead of {expected:,}"
    finally:
        sys.unraisablehook = hook
    raise EvaluationError(f"--data {prefix.parent}: cannot read {prefix.name}.idx and .bin ({fault}); encode again")


def _check_tokenizer(folder: Path, model: EvalModel) -> None:
    try:
        shards = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["tokenizer"]["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if shards != model.tokenizer.sha256:
        raise EvaluationError(
            f"--data {folder}: its tokens were made with another tokenizer (sha256 {shards[:12]}, the model's is "
            f"{model.tokenizer.sha256[:12]}); give the shards of the model's own tokenizer"
        )
