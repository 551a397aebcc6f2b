"""Teaches a model to answer, by its answers alone: `python -m evals.finetune --checkpoint RUN --documents FILE`.

The loss counts the tokens of answers: what a memory does for the words between them, which are most of a text, teaches
it nothing then. --write-cost, of no paper, adds what memories write, so that they pass over what no answer needs.
transformers' Trainer does the loop.
"""

import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals.command_line import EvaluationError, check_at_least, parse_settings, run_command, say
from evals.documents import Document, read_documents

if TYPE_CHECKING:
    from torch import Tensor

_IGNORED = -100  # transformers' label for what no loss counts
_EXAMPLE = 64  # tokens of the folder's proof


@dataclass(frozen=True)
class FinetuneSettings:
    """Fine-tunes a model on the answers in documents, and writes a Hugging Face folder that works alone."""

    checkpoint: Path
    """Run folder (its newest checkpoint is taken), one checkpoint folder, or an exported Hugging Face folder."""
    documents: Path
    """What evals.niah.training_data or evals.babilong.training_data wrote: JSON lines, {"text": ..., "answers":
    [[start, end], ...]}, characters of the text; without answers all of a text counts."""
    output: Path
    """Folder to write; every evaluation takes it. titans_mcore.hf.to_native makes a run of it."""
    steps: int = 400
    """Updates."""
    batch: int = 4
    """Documents of an update."""
    learning_rate: float = 2e-3
    """The highest; a tenth of the steps warms up, a cosine follows."""
    weight_decay: float = 0.01
    """AdamW's, of matrices."""
    text_weight: float = 0.0
    """Added to the loss of answers, a mean over their tokens: this times the mean over the others, so that the language
    is not forgotten."""
    write_cost: float = 0.0
    """Added to the loss: this times what memories write, theta / (1 - eta) before gate_margin cuts theta, the mean over
    blocks, tokens, heads and matrices. It grows to this over the first half of the steps: from the first one on it
    would close gates before answers need them."""
    validation: int = 64
    """Documents, the last ones of the file, that choose the weights of the best of five looks."""
    seed: int = 0
    """Of the order of the documents."""
    no_verify: bool = False
    """Do not compare the weights' files with the checksums that were noted when they were written."""

    def __post_init__(self) -> None:
        check_at_least(1, self, "steps", "batch", "validation")
        check_at_least(0, self, "seed", "text_weight", "write_cost", "weight_decay")
        if not self.learning_rate > 0:
            raise EvaluationError(f"--learning-rate is {self.learning_rate}; it must be above 0")


def finetune(settings: FinetuneSettings) -> None:
    """Trains, and writes the folder once it is whole.

    Raises:
        EvaluationError: Model or documents cannot be used, or the loss is not finite.
    """
    from evals.trainer import seed_all, train
    from titans_mcore.hf.folder import ExportError, check_output
    from titans_mcore.hf.save import save_alone

    texts = list(read_documents(settings.documents))
    if len(texts) <= settings.validation:
        raise EvaluationError(
            f"--documents {settings.documents} has {len(texts)}, and --validation takes {settings.validation} of them; "
            "give more documents, or a smaller --validation"
        )
    try:
        check_output(settings.output, overwrite=False, inputs=[settings.checkpoint, settings.documents])
    except ExportError as error:
        raise EvaluationError(f"--output: {error}") from None
    seed_all(settings.seed)
    model, tokenizer = _opened(settings)
    rows = [_row(document, tokenizer) for document in texts]
    for number, row in enumerate(rows, 1):
        if bool((row["labels"] == _IGNORED).all()):
            raise EvaluationError(
                f"--documents {settings.documents}, line {number}: no token of it counts; give its answers, or leave "
                "out `answers` for all of its text to count"
            )
    counted = sum(int((row["labels"] != _IGNORED).sum()) for row in rows)
    say(f"{len(rows):,} documents, {sum(len(row['labels']) for row in rows):,} tokens, {counted:,} of them counted")
    chosen, seconds = train(
        model,
        rows[: -settings.validation],
        rows[-settings.validation :],
        "labels",
        settings.steps,
        settings.batch,
        settings.learning_rate,
        settings.seed,
        settings.weight_decay,
        _collate,
        partial(_added, settings),
    )
    model.config.trained_length = max(len(row["labels"]) for row in rows)
    example = {"input_ids": rows[-1]["input_ids"][None, :_EXAMPLE]}
    save_alone(model.cpu(), settings.output, example, tokenizer)
    say(f"{settings.output}: loss {chosen:.4f} in documents not trained on, {seconds:.0f} s")


def _opened(settings: FinetuneSettings) -> tuple[Any, Any]:
    """Model and tokenizer as transformers has them."""
    from transformers.utils import logging

    from titans_mcore.hf.convert import export
    from titans_mcore.hf.exported import open_model, open_tokenizer
    from titans_mcore.hf.folder import ExportError

    logging.disable_progress_bar()
    folder, verify = settings.checkpoint, not settings.no_verify
    with tempfile.TemporaryDirectory() as scratch:
        try:
            if not (folder / "config.json").is_file():
                folder = Path(scratch) / "exported"
                export(settings.checkpoint, folder, skip_proof=True, no_verify=not verify)
                verify = False
            return open_model(folder, verify=verify), open_tokenizer(folder)
        except ExportError as error:
            raise EvaluationError(f"--checkpoint: {error}") from error


def _row(document: Document, tokenizer: Any) -> "dict[str, Tensor]":
    """Tokens and labels (T,), start and end token included; a token that touches an answer counts."""
    import torch

    read = tokenizer(document.text, return_offsets_mapping=True, add_special_tokens=False)
    ids, offsets = read["input_ids"], read["offset_mapping"]
    if document.answers is None:
        counts = [True] * len(ids)
    else:
        counts = [any(start < end and begin < to for begin, end in document.answers) for start, to in offsets]
    tokens = torch.tensor([tokenizer.bos_token_id, *ids, tokenizer.eos_token_id])
    counted = torch.tensor([False, *counts, document.answers is None])
    return {"input_ids": tokens, "labels": torch.where(counted, tokens, _IGNORED)}


def _collate(rows: "list[dict[str, Tensor]]") -> "dict[str, Tensor]":
    from torch.nn.utils.rnn import pad_sequence

    ids, labels = ([row[name] for row in rows] for name in ("input_ids", "labels"))
    batch = {
        "input_ids": pad_sequence(ids, batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=_IGNORED),
    }
    lengths = {len(row) for row in ids}
    if len(lengths) > 1:
        batch["attention_mask"] = pad_sequence([row.new_ones(len(row)) for row in ids], batch_first=True)
    return batch


def _added(
    settings: FinetuneSettings, batch: "dict[str, Tensor]", output: Any, steps: "list[Tensor]", progress: float
) -> "Tensor":
    """What the loss has beside that of answers."""
    import torch
    from torch.nn import functional as F

    added = output.loss.new_zeros(())
    if settings.write_cost and steps:
        written = torch.cat([step.flatten() for step in steps]).mean()
        added = added + settings.write_cost * min(1.0, 2 * progress) * written
    if settings.text_weight:
        others = batch["input_ids"].masked_fill(batch["labels"] != _IGNORED, _IGNORED)
        if "attention_mask" in batch:
            others = others.masked_fill(batch["attention_mask"] == 0, _IGNORED)
        text = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), others[:, 1:].flatten(), ignore_index=_IGNORED)
        added = added + settings.text_weight * text
    return added


def main() -> None:
    """Runs the command line; see `--help`."""
    finetune(parse_settings(FinetuneSettings, "python -m evals.finetune"))


if __name__ == "__main__":
    run_command(main)
