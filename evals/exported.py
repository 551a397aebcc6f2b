"""An exported Hugging Face folder as a model under evaluation: the folder's own code, weights and tokenizer."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
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
        self._cache = sys.modules[type(model).__module__].TitansCache

    def stream(self, tokens: Tensor, states: Any, last: int | None = None) -> tuple[Tensor, Any]:
        """Logits (B, last or T, V) of the next piece (B, T), and the states after it; states of None begin."""
        cache = self._cache(len(self.model.model.layers))
        for block, state in zip(cache.layers, states or [], strict=bool(states)):
            if state is not None:
                block.advance(state, 1)
        # Folders that were exported before transformers 5.24 know the cache by this name alone.
        logits = self.model(input_ids=tokens, past_key_values=cache, logits_to_keep=last or 0).logits
        return logits, [block.state for block in cache.layers]


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


def load_exported(folder: Path, tokenizer: Tokenizer | None) -> EvalModel:
    """The model of an exported folder, fp32, on the GPU when there is one.

    Args:
        folder: What `python -m titans_mcore.hf.convert` wrote.
        tokenizer: In place of the folder's own.

    Raises:
        EvaluationError: It is no export of a Titans model, or files are missing or damaged.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from titans_mcore import parallel
    from titans_mcore.hf.folder import is_export

    if not is_export(folder):
        raise EvaluationError(
            f"--checkpoint {folder}: its config.json is not that of an exported Titans model; "
            "export a run with `python -m titans_mcore.hf.convert`"
        )
    start_processes()
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
        if tokenizer is None:
            own = ExportedTokenizer(AutoTokenizer.from_pretrained(folder, trust_remote_code=True))
            tokenizer = Tokenizer(own, sha256_of(folder / "tokenizer.json"))
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise EvaluationError(f"--checkpoint {folder}: cannot be loaded ({reason}); export the run again") from error
    return EvalModel(
        ExportedNetwork(model).to(parallel.device()).eval(),
        model.config.to_titans(),
        tokenizer,
        str(folder),
        hash_files(folder.glob("*.safetensors")),
        _trained_length(folder),
        parallel.device(),
    )


def _trained_length(folder: Path) -> int | None:
    """Tokens of a training sequence, where the folder's config.json says so."""
    length = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("trained_length")
    return length if isinstance(length, int) else None
