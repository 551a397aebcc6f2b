"""The sentencepiece model behind every token: loading it with its faults named, and the Llama-2-compatible settings."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titans_mcore.io import sha256_of
from tokenization.command_line import TokenizationError

UNK_ID, BOS_ID, EOS_ID = 0, 1, 2
TOKENIZER_NAME, TOKENIZER_JSON = "tokenizer.model", "tokenizer.json"


@dataclass(frozen=True)
class TokenizerInfo:
    """What ties shards, runs and exports to one tokenizer file."""

    sha256: str
    """Of the .model file."""
    vocab_size: int
    """Pieces."""
    bos_id: int
    """Token in front of every document."""
    eos_id: int
    """Token behind every document."""
    file: str = TOKENIZER_NAME
    """Its name beside the shards: tokenizer.model, or tokenizer.json where it is not of sentencepiece, whose start and
    end token are then not known (-1)."""


def load_tokenizer(path: Path) -> Any:
    """Loads a sentencepiece model that has a start and an end token.

    Args:
        path: A `.model` file.

    Returns:
        The `sentencepiece.SentencePieceProcessor`.

    Raises:
        TokenizationError: No such file, not a sentencepiece model, no start or end token.
    """
    import sentencepiece

    if not path.is_file():
        raise TokenizationError(f"tokenizer {path}: no such file; `python -m tokenization.train` writes one")
    data = path.read_bytes()
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=data) if data else None
    except RuntimeError:
        processor = None
    if processor is None or processor.vocab_size() == 0:
        raise TokenizationError(
            f"tokenizer {path}: not a sentencepiece model ({len(data):,} bytes); give a .model file"
        )
    if processor.bos_id() < 0 or processor.eos_id() < 0:
        raise TokenizationError(
            f"tokenizer {path}: lacks a start or an end token (bos {processor.bos_id()}, eos {processor.eos_id()}); "
            "train it with both"
        )
    return processor


def describe_tokenizer(path: Path) -> TokenizerInfo:
    """Loads a tokenizer file and returns what identifies it; raises TokenizationError as `load_tokenizer` does."""
    processor = load_tokenizer(path)
    return TokenizerInfo(sha256_of(path), processor.vocab_size(), processor.bos_id(), processor.eos_id())


def describe_any_tokenizer(path: Path) -> TokenizerInfo:
    """The same of a sentencepiece model, a tokenizer.json of Hugging Face's or a vocab.json of GPT-2's.

    Raises:
        TokenizationError: No such file, or it is none of them.
    """
    if not path.is_file() or path.read_bytes()[:1] != b"{":
        return describe_tokenizer(path)
    try:
        record = json.loads(path.read_bytes())
        model = record.get("model")
        ids = model["vocab"] if isinstance(model, dict) else record
        ids = list(ids.values()) if isinstance(ids, dict) else range(len(ids))  # a unigram model has a list of pieces
        ids = [*ids, *(one["id"] for one in record.get("added_tokens", ()))] if isinstance(model, dict) else ids
        largest = max(ids)
        if not isinstance(largest, int) or largest < 1:
            raise TypeError("an id is no number")
    except (ValueError, KeyError, TypeError) as fault:
        raise TokenizationError(
            f"tokenizer {path}: has no vocabulary ({fault}); give a sentencepiece .model, a tokenizer.json or a "
            "vocab.json of names and ids"
        ) from fault
    return TokenizerInfo(sha256_of(path), largest + 1, -1, -1, TOKENIZER_JSON)


def llama_settings(vocab_size: int) -> dict[str, Any]:
    """Trainer settings that give a tokenizer of Llama-2's kind.

    Text comes back exactly from its tokens, except that U+2581, which sentencepiece uses for the space, comes back
    as a space. No piece spans a line end: the line feed is always the single byte token <0x0A>.
    """
    return {
        "model_type": "bpe",
        "vocab_size": vocab_size,
        "byte_fallback": True,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": True,
        "character_coverage": 0.99995,
        "pretokenization_delimiter": "\n",
        "unk_id": UNK_ID,
        "bos_id": BOS_ID,
        "eos_id": EOS_ID,
        "pad_id": -1,
        "max_sentence_length": 1 << 20,  # bytes; a longer sentence would be dropped without a word
        "num_threads": 1,  # the number is stored in the file, and the file must not depend on the machine
        "minloglevel": 2,
    }
