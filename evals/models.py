"""A trained model ready to be evaluated, of a run or an export: weights, tokenizer, and what identifies both."""

import json
import os
import tomllib
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from evals.command_line import EvaluationError
from titans_mcore.config import TitansConfig
from titans_mcore.decoding import Decoder
from titans_mcore.io import hash_files, sha256_of
from tokenization.command_line import TokenizationError

_LONGEST_WAIT_SECONDS = 14 * 24 * 3600.0


class StreamingModel(Protocol):
    """What an evaluation needs of a model: TitansModel has it, and so has anything else that reads piece by piece."""

    def stream(self, tokens: Tensor, states: Any, last: int | None = None) -> tuple[Tensor, Any]:
        """Logits (B, last or T, V) of the next piece (B, T), and the states after it; states of None begin."""


@dataclass(frozen=True)
class Tokenizer:
    """What turns text into tokens, and its file's hash."""

    processor: Any
    """The `sentencepiece.SentencePieceProcessor`, or what encodes and decodes like it."""
    sha256: str
    """Of the `.model` or `tokenizer.json` file."""


@dataclass(frozen=True)
class EvalModel:
    """A model under evaluation."""

    network: StreamingModel
    """Computes logits."""
    config: TitansConfig
    """Settings of the model."""
    tokenizer: Tokenizer
    """The tokenizer it was trained with."""
    checkpoint: str
    """Where the weights came from."""
    checkpoint_sha256: str
    """Over the weights' files."""
    trained_length: int | None = None
    """Tokens of a training sequence, where the run says so."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where it computes."""

    def facts(self) -> dict[str, Any]:
        """What every report says about its model."""
        return {
            "trained_length": self.trained_length,
            "checkpoint": self.checkpoint,
            "checkpoint_sha256": self.checkpoint_sha256,
            "tokenizer_sha256": self.tokenizer.sha256,
            "model": self.config.to_dict(),
        }

    def stream(self, tokens: Tensor, states: Any, last: int | None = None) -> tuple[Tensor, Any]:
        """The next piece of sequences that go on; see TitansModel.stream. Tokens may lie on any device."""
        return self.network.stream(tokens.to(self.device, torch.int64), states, last)

    @cached_property
    def decoder(self) -> Decoder:
        """What decodes sequences that stream() has begun: given tokens and states, the last logits and the states."""
        return Decoder(partial(self.stream, last=1), cast(nn.Module, self.network))


def load_model(path: Path, tokenizer: Path | None = None, *, spread: bool = False, verify: bool = True) -> EvalModel:
    """A trained model, in fp32, on the GPU when there is one.

    Args:
        path: Run folder (its newest whole checkpoint is taken), one checkpoint folder, or an exported Hugging Face
            folder. Checkpoints of any tensor-parallel size are read.
        tokenizer: Tokenizer file; None takes RUN/tokenizer/tokenizer.model, or the exported folder's own.
        spread: The evaluation spreads its samples: under torchrun every process gets a model of its own.
        verify: Compare the files of the weights with the checksums that were noted when they were written.

    Raises:
        EvaluationError: Checkpoint or tokenizer are missing, damaged, or do not belong together; several processes,
            and the evaluation does not spread.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not spread:
        raise EvaluationError(
            f"evaluation runs in one process, but WORLD_SIZE is {os.environ['WORLD_SIZE']}; start it without torchrun"
        )
    if (path / "config.json").is_file():
        return load_exported(path, load_tokenizer(tokenizer) if tokenizer else None, verify=verify)
    return _load_native(path, tokenizer, verify)


def _load_native(path: Path, tokenizer: Path | None, verify: bool) -> EvalModel:
    from titans_mcore import weights

    try:
        checkpoint = weights.find_checkpoint(path)
        config = weights.load_config(checkpoint)
    except ValueError as error:
        raise EvaluationError(f"--checkpoint: {error}") from error
    run = weights.run_of(checkpoint)
    loaded = load_tokenizer(tokenizer or run / "tokenizer" / "tokenizer.model")
    pieces = loaded.processor.vocab_size()
    if pieces != config.vocab_size:
        raise EvaluationError(
            f"the tokenizer has {pieces:,} pieces but the model of {checkpoint} {config.vocab_size:,}; "
            "give the tokenizer of this run with --tokenizer"
        )
    model, device = _random(config)
    try:
        weights.load_into(model, weights.load_full(checkpoint, verify=verify)[1])
    except ValueError as error:
        raise EvaluationError(f"--checkpoint: {error}") from error
    digest = hash_files((checkpoint / weights.WEIGHTS_FOLDER).iterdir())
    return EvalModel(
        model.to(device).eval(), config, loaded, str(checkpoint), digest, _trained_length(run, checkpoint), device
    )


def load_tokenizer(path: Path) -> Tokenizer:
    """A sentencepiece model that has a start and an end token.

    Raises:
        EvaluationError: No such file, not a sentencepiece model, no start or end token.
    """
    from tokenization.tokenizer import load_tokenizer as load_processor

    try:
        processor = load_processor(path)
    except TokenizationError as fault:
        raise EvaluationError(f"{fault}; --tokenizer takes the one that the model was trained with") from None
    return Tokenizer(processor, sha256_of(path))


def random_weights(model: EvalModel) -> StreamingModel:
    """A model of the same settings as it would be before training, on the same device; seed 0."""
    network, _ = _random(model.config)
    return network.to(model.device).eval()


def _random(config: TitansConfig) -> tuple[Any, torch.device]:
    from titans_mcore import parallel
    from titans_mcore.model import TitansModel

    start_processes()
    torch.manual_seed(0)
    return TitansModel(config, parallel.transformer_config(config)), parallel.device()


def start_processes() -> None:
    """Joins the processes of torchrun, each with a model of its own; alone without it.

    What has begun may take days on one process while the others wait.
    """
    from titans_mcore import parallel

    if not torch.distributed.is_initialized():
        parallel.start(1, seed=0, timeout_seconds=_LONGEST_WAIT_SECONDS)


def _trained_length(run: Path, checkpoint: Path) -> int | None:
    """Tokens of a training sequence as the checkpoint says, or else the run's config.toml, which may be edited."""
    from titans_mcore.weights import MARKER

    try:
        record = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))
        settings = record.get("settings") or tomllib.loads((run / "config.toml").read_text(encoding="utf-8"))
        length = settings["train"]["sequence_length"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return length if isinstance(length, int) else None


class ExportedNetwork(nn.Module):
    """Streams through the folder's model; states are lists, one a block, as those of a trained model are."""

    def __init__(self, model: Any) -> None:
        """Takes the `TitansForCausalLM` that transformers loaded."""
        super().__init__()
        self.model = model

    def stream(self, tokens: Tensor, states: Any, last: int | None = None) -> tuple[Tensor, Any]:
        """Logits (B, last or T, V) of the next piece (B, T), and the states after it; states of None begin."""
        from titans_mcore.hf.cache_titans import TitansCache

        cache = TitansCache(len(self.model.model.layers))
        for block, state in zip(cache.blocks, states or [], strict=bool(states)):
            if state is not None:
                block.advance(state, 1)
        logits = self.model(input_ids=tokens, cache=cache, logits_to_keep=last or 0).logits
        return logits, [block.state for block in cache.blocks]


class ExportedTokenizer:
    """The folder's tokenizer under the names that sentencepiece has."""

    def __init__(self, tokenizer: Any) -> None:
        """Takes what AutoTokenizer loaded."""
        self._tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        """Ids of a text, no start token."""
        return self._tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: list[int]) -> str:
        """The text of ids, special tokens left out."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def bos_id(self) -> int:
        """Id of the start token."""
        return self._tokenizer.bos_token_id

    def eos_id(self) -> int:
        """Id of the end token."""
        return self._tokenizer.eos_token_id

    def vocab_size(self) -> int:
        """Pieces."""
        return len(self._tokenizer)


def load_exported(folder: Path, tokenizer: Tokenizer | None, *, verify: bool = True) -> EvalModel:
    """The model of an exported folder, fp32, on the GPU when there is one. The code in the folder does not run.

    Args:
        folder: What `python -m titans_mcore.hf.convert` wrote.
        tokenizer: In place of the folder's own.
        verify: Compare the folder's files with the checksums in its proof.json.

    Raises:
        EvaluationError: It is no export of a Titans model, or files are missing or damaged.
    """
    from transformers.utils import logging

    from titans_mcore import parallel
    from titans_mcore.hf.exported import open_model, open_tokenizer
    from titans_mcore.hf.folder import ExportError

    start_processes()
    logging.disable_progress_bar()
    try:
        model = open_model(folder, verify=verify)
        if tokenizer is None:
            tokenizer = Tokenizer(ExportedTokenizer(open_tokenizer(folder)), sha256_of(folder / "tokenizer.json"))
    except ExportError as error:
        raise EvaluationError(f"--checkpoint: {error}") from error
    length = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("trained_length")
    return EvalModel(
        ExportedNetwork(model).to(parallel.device()).eval(),
        model.config.to_titans(),
        tokenizer,
        str(folder),
        hash_files(folder.glob("*.safetensors")),
        length if isinstance(length, int) else None,
        parallel.device(),
    )
