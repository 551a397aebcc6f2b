"""One training by transformers' Trainer: the best of a few looks at validation is kept."""

import math
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from evals.command_line import EvaluationError, say
from evals.record_file import RecordFile

if not torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cpu"  # transformers imports deepspeed where it is, which looks for one aloud

Tested = TypeVar("Tested", bound=Any)
LOOKS = 5
"""Times that validation is looked at, the end among them; the weights of the best one are kept."""


def train(
    model: nn.Module,
    data: Any,
    validation: Any,
    label: str,
    steps: int,
    batch: int,
    learning_rate: float,
    seed: int,
    weight_decay: float = 0.0,
    collate: Callable[[list[Any]], dict[str, Tensor]] | None = None,
    added: Callable[[dict[str, Tensor], Any, list[Tensor], float], Tensor] | None = None,
) -> tuple[float, float]:
    """Trains in place: AdamW, a tenth of the steps warm-up, then a cosine; the order of the data is the seed's alone.

    Args:
        model: Its forward gives a loss first.
        data: A torch dataset of what forward takes by name.
        validation: The same; its mean loss chooses the weights that are kept.
        label: The name of what is predicted.
        steps: Updates.
        batch: Samples of an update.
        learning_rate: The highest.
        seed: Of the order.
        weight_decay: AdamW's, of matrices.
        collate: Makes a batch; by default transformers'.
        added: What the loss has beside the model's, of a batch, what the model gave for it, what
            steps_of_memories collects meanwhile, and the share of the steps that is done, 1 for validation.

    Returns:
        The lowest validation loss, and seconds.

    Raises:
        EvaluationError: accelerate is not installed, or the loss is not finite.
    """
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_callback import PrinterCallback, TrainerCallback
    from transformers.utils import logging

    from titans_mcore.mixers.parts import steps_of_memories

    class AddingTrainer(Trainer):
        def compute_loss(
            self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            if added is None:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            with steps_of_memories() as steps:
                loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            progress = self.state.global_step / self.state.max_steps if model.training else 1.0
            loss = loss + added(inputs, outputs, steps, progress)
            return (loss, outputs) if return_outputs else loss

    class Looks(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            say(f"step {state.global_step} of {steps}: validation loss {more['metrics']['eval_loss']:.4f}")

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    every = max(1, steps // LOOKS)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        try:
            arguments = TrainingArguments(
                output_dir=scratch,
                max_steps=steps,
                per_device_train_batch_size=batch,
                per_device_eval_batch_size=2 * batch,
                learning_rate=learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=max(1, steps // 10),
                weight_decay=weight_decay,
                seed=seed,
                data_seed=seed,
                eval_strategy="steps",
                eval_steps=every,
                save_strategy="steps",
                save_steps=every,
                save_total_limit=1,
                save_only_model=True,
                load_best_model_at_end=True,
                metric_for_best_model="eval_loss",
                prediction_loss_only=True,
                label_names=[label],
                logging_nan_inf_filter=False,
                report_to="none",
                dataloader_pin_memory=torch.cuda.is_available(),
                disable_tqdm=True,
            )
        except ImportError:
            raise EvaluationError("accelerate is not installed; install it with `pip install -e '.[evals]'`") from None
        trainer = AddingTrainer(model, arguments, collate, data, validation)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Looks)
        loss = trainer.train().training_loss
    best = trainer.state.best_metric
    if best is None or not math.isfinite(best) or not math.isfinite(loss):
        raise EvaluationError(f"the training loss is {loss} with --learning-rate {learning_rate:g}; give a smaller one")
    model.eval()
    return best, time.monotonic() - begun


def seed_all(seed: int) -> None:
    """Random numbers of torch and Python, for initial weights and what is drawn."""
    torch.manual_seed(seed)
    random.seed(seed)


def sweep(
    file: Path, kind: type[Tested], budget: dict[str, Any], wanted: Iterable[Any], test: Callable[..., list[Tested]]
) -> list[Tested]:
    """Trains and tests what has no result yet, and returns all there are.

    Args:
        file: Of the results, JSON lines.
        kind: Of a result, with a `key` and a `budget`.
        budget: The settings that all results of a folder share.
        wanted: What is to be tested: a result's key, and behind it what `test` takes.
        test: Gives results, the one of the key among them.

    Raises:
        EvaluationError: The file holds results of another budget.
    """
    with RecordFile(file, kind) as results:
        for known in results.records:
            if other := sorted(name for name in budget if known.budget.get(name) != budget[name]):
                raise EvaluationError(
                    f"--output {file.parent} has results with --{other[0].replace('_', '-')} "
                    f"{known.budget.get(other[0])}, not {budget[other[0]]}; give another folder"
                )
        found = {result.key: result for result in results.records}
        for key, *words in wanted:
            if key not in found:
                new = test(*words)
                results.append(new)
                found |= {result.key: result for result in new}
        return list(found.values())


def titans_sizes(layers: int, dim: int, heads: int, chunk_size: int) -> dict[str, int]:
    """Settings of a small model of ours, whatever it reads."""
    return {
        "num_layers": layers,
        "dim": dim,
        "num_heads": heads,
        "ffn_dim": 2 * dim,
        "memory_expansion": 2,
        "chunk_size": chunk_size,
        "segment_length": 4 * chunk_size,
        "persistent_tokens": 4,
        "window": 0,
    }
