"""An exported Hugging Face folder as a model under evaluation: its weights and tokenizer, and this package's code."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from evals.command_line import EvaluationError
from evals.models import EvalModel, Tokenizer, start_processes
from tokenization.io import hash_files, sha256_of


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

    start_processes()
    logging.disable_progress_bar()
    model, own = open_exported(folder, verify=verify, own_tokenizer=tokenizer is None)
    if own is not None:
        tokenizer = Tokenizer(ExportedTokenizer(own), sha256_of(folder / "tokenizer.json"))
    assert tokenizer is not None
    return EvalModel(
        ExportedNetwork(model).to(parallel.device()).eval(),
        model.config.to_titans(),
        tokenizer,
        str(folder),
        hash_files(folder.glob("*.safetensors")),
        _trained_length(folder),
        parallel.device(),
    )


def open_exported(folder: Path, *, verify: bool = True, own_tokenizer: bool = True) -> tuple[Any, Any]:
    """Model and tokenizer of an exported folder as transformers has them; see load_exported."""
    from titans_mcore.hf.exported import open_model, open_tokenizer
    from titans_mcore.hf.folder import ExportError

    try:
        return open_model(folder, verify=verify), open_tokenizer(folder) if own_tokenizer else None
    except ExportError as error:
        raise EvaluationError(f"--checkpoint: {error}") from error


def _trained_length(folder: Path) -> int | None:
    """Tokens of a training sequence, where the folder's config.json says so."""
    length = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("trained_length")
    return length if isinstance(length, int) else None
