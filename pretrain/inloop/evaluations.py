"""When a run is evaluated, a function of the step, and on what."""

import time
from pathlib import Path

from deepspeed import DeepSpeedEngine

from pretrain.config import RunConfig
from pretrain.data import NumberedSamples
from pretrain.folders import RunData
from pretrain.inloop.heldout import heldout_losses
from pretrain.inloop.long_rows import open_long_rows, position_losses
from pretrain.inloop.probe import Probe
from pretrain.schedule import tokens_after
from tokenization.manifest import TOKENIZER_NAME


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
        tokenizer = run_dir / "tokenizer" / TOKENIZER_NAME
        self._probe = Probe.open(config, tokenizer) if config.evaluate.probe_length else None

    def after(self, engine: DeepSpeedEngine, step: int) -> dict[str, dict[str, float]]:
        """Evaluates where it is due after a step; collective.

        Args:
            engine: Its model is evaluated; what it trains on and with stays as it is.
            step: Counted from 1.

        Returns:
            `heldout`, `position_loss` and `probe`, where they were taken, each with its values and the `seconds` it
            took. Losses are in nats a token.
        """
        number, before = evaluations_by(step, self._config), evaluations_by(step - 1, self._config)
        last = step == self._config.train.steps
        found: dict[str, dict[str, float]] = {}
        if not last and number == before:
            return found
        started = time.perf_counter()

        def take(kind: str, values: dict[str, float]) -> None:
            nonlocal started
            now = time.perf_counter()
            found[kind], started = {**values, "seconds": now - started}, now

        if self._heldout:
            take("heldout", heldout_losses(engine, self._heldout, self._config).values())
        every = self._config.evaluate.long_every
        if last or number // every > before // every:
            if self._long_rows:
                take("position_loss", position_losses(engine, self._long_rows, self._config).values())
            if self._probe:
                take("probe", self._probe.run(engine))
        return found
