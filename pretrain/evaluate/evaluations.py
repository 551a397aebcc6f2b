"""When a run is evaluated, a function of the step, and on what."""

import time
from pathlib import Path
from typing import Any

from deepspeed import DeepSpeedEngine

from pretrain.config.run_config import RunConfig
from pretrain.data.folders import NumberedSamples, RunData
from pretrain.evaluate.losses import heldout_losses
from pretrain.evaluate.probe import NeedleProbe
from pretrain.schedule import tokens_after


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
        tokenizer = run_dir / "tokenizer" / data.tokenizer.file
        self._probe = NeedleProbe.open(config, tokenizer) if config.evaluate.probe_length else None

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
            Records, each its kind and its values. `heldout`: loss. `position_loss`: tokens, loss. `probe`: see
            NeedleProbe.run. Losses are nats a token, `seconds` what an evaluation took.
        """
        following = following or step + 1
        number, before = evaluations_by(following - 1, self._config), evaluations_by(step - 1, self._config)
        last = following > self._config.train.steps
        if not last and number == before:
            return []
        records: list[tuple[str, dict[str, Any]]] = []
        if self._heldout:
            began, losses = time.perf_counter(), heldout_losses(engine, self._heldout, self._config)
            records.append(("heldout", {"loss": losses.mean, "seconds": time.perf_counter() - began}))
            records.append(("position_loss", {"name": "heldout", **losses.curve()}))
        every = self._config.evaluate.long_every
        if self._probe and (last or number // every > before // every):
            began, found = time.perf_counter(), self._probe.run(engine)
            records.append(("probe", {**found, "seconds": time.perf_counter() - began}))
        return records
