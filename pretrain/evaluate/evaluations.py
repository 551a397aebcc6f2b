"""When a run is evaluated, a function of the step, and on what."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from deepspeed import DeepSpeedEngine

from pretrain.config.run_config import RunConfig
from pretrain.data.batches import NumberedSamples
from pretrain.data.folders import RunData
from pretrain.evaluate.losses import heldout_losses, open_long_rows, position_losses
from pretrain.evaluate.probe import Probe
from pretrain.schedule import tokens_after

T = TypeVar("T")


def evaluations_by(step: int, config: RunConfig) -> int:
    """Evaluations that are due up to a step counted from 1, that after the last step left out."""
    if every_tokens := config.evaluate.every_tokens:
        return tokens_after(step, config.train) // every_tokens
    return step // config.evaluate.every_steps if config.evaluate.every_steps else 0


class Evaluations:
    """What a run evaluates between its steps; nothing of it has to be saved."""

    def __init__(self, config: RunConfig, data: RunData, run_dir: Path, heldout: NumberedSamples | None) -> None:
        """Opens what will be read; collective.

        Args:
            config: Of the run.
            data: Its folders.
            run_dir: Has the data's tokenizer already.
            heldout: Held-out samples of the training's length, if any are asked for.

        Raises:
            ValueError: There is too little held-out text, or haystacks cannot be made.
        """
        self._config, self._heldout = config, heldout
        self._long_rows = open_long_rows(config, data, run_dir) if config.evaluate.position_length else None
        tokenizer = run_dir / "tokenizer" / data.tokenizer.file
        self._probe = Probe.open(config, tokenizer) if config.evaluate.probe_length else None

    def after(
        self, engine: DeepSpeedEngine, step: int, following: int | None = None
    ) -> list[tuple[str, dict[str, Any]]]:
        """Evaluates where it is due after a step; collective.

        Args:
            engine: Its model is evaluated; what it trains on and with stays as it is.
            step: Counted from 1.
            following: The step after it, where it is not the next number: evaluations due at steps that are passed over
                take place now.

        Returns:
            Records, each its kind and its values. `heldout`: loss. `position_loss` (`name` heldout, for rows read as in
            training, or long_rows): tokens, loss. `probe`: see Probe.run. Losses are nats a token, `seconds` what an
            evaluation took.
        """
        following = following or step + 1
        number, before = evaluations_by(following - 1, self._config), evaluations_by(step - 1, self._config)
        last = following > self._config.train.steps
        if not last and number == before:
            return []
        records = list(self._of_heldout(engine))
        every = self._config.evaluate.long_every
        if last or number // every > before // every:
            records += self._of_long_context(engine)
        return records

    def _of_heldout(self, engine: DeepSpeedEngine) -> Iterator[tuple[str, dict[str, Any]]]:
        if self._heldout:
            losses, seconds = _timed(heldout_losses, engine, self._heldout, self._config)
            yield "heldout", {"loss": losses.mean, "seconds": seconds}
            yield "position_loss", {"name": "heldout", **losses.curve()}

    def _of_long_context(self, engine: DeepSpeedEngine) -> Iterator[tuple[str, dict[str, Any]]]:
        if self._long_rows:
            losses, seconds = _timed(position_losses, engine, self._long_rows, self._config)
            yield "position_loss", {"name": "long_rows", **losses.curve(), "seconds": seconds}
        if self._probe:
            values, seconds = _timed(self._probe.run, engine)
            yield "probe", {**values, "seconds": seconds}


def _timed(evaluate: Callable[..., T], *arguments: object) -> tuple[T, float]:
    started = time.perf_counter()
    found = evaluate(*arguments)
    return found, time.perf_counter() - started
