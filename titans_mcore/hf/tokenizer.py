"""A sentencepiece BPE model as tokenizer.json: the same ids for every text, read by the tokenizers library alone.

The one difference is meant: special tokens written out in a text (`<s>`) are taken for what they name, as transformers
does everywhere; sentencepiece takes them for text.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titans_mcore.hf.folder import ExportError

SENTENCEPIECE = "tokenizer.model"
SPACE = "▁"
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6  # SentencePiece.Type
_BPE = 2  # TrainerSpec.ModelType


@dataclass(frozen=True)
class TokenizerModel:
    """A sentencepiece file, opened."""

    file: Path
    proto: Any
    """Its ModelProto."""

    @property
    def vocab_size(self) -> int:
        """Pieces."""
        return len(self.proto.pieces)

    @property
    def bos_id(self) -> int:
        """Token in front of every text."""
        return self.proto.trainer_spec.bos_id

    @property
    def eos_id(self) -> int:
        """Token behind every document."""
        return self.proto.trainer_spec.eos_id

    @property
    def pad_id(self) -> int:
        """Token that fills up batches.

        Collators leave it out of the loss, so the end token, which is to be learned, is taken only where the unknown
        token may stand in a text.
        """
        trainer = self.proto.trainer_spec
        return trainer.unk_id if trainer.byte_fallback else self.eos_id

    @property
    def caveat(self) -> str | None:
        """Where tokenizer.json may give other ids than sentencepiece; None when nowhere."""
        spec = self.proto.normalizer_spec
        if not spec.precompiled_charsmap:
            return None
        return (
            f"the tokenizer normalises text ({spec.name}); transformers' ids can differ from the training data's where "
            "that concerns characters that belong together, such as combining accents or a carriage return before a "
            "line feed"
        )

    def piece(self, index: int) -> str:
        """Text of a piece."""
        return self.proto.pieces[index].piece


def read_tokenizer(file: Path) -> TokenizerModel:
    """Opens a tokenizer.

    Raises:
        ExportError: There is no such file, or it is none that can be exported exactly.
    """
    from sentencepiece import sentencepiece_model_pb2

    if not file.is_file():
        raise ExportError(f"no tokenizer at {file}; name the run's sentencepiece model with --tokenizer FILE")
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        proto.ParseFromString(file.read_bytes())
    except Exception as error:  # protobuf's own class, whose place differs between versions
        raise ExportError(f"tokenizer {file} is not a sentencepiece model; give a .model file") from error
    if reason := _obstacle(proto):
        raise ExportError(f"tokenizer {file} cannot be exported: {reason}")
    return TokenizerModel(file, proto)


def _obstacle(proto: Any) -> str | None:
    """Why a tokenizer.json would not give the same ids; None when it would."""
    if not proto.pieces:
        return "it has no pieces; give a sentencepiece .model file"
    if proto.trainer_spec.model_type != _BPE:
        return "it is not of type BPE; train one with `python -m tokenization.train`"
    if proto.trainer_spec.treat_whitespace_as_suffix or not proto.normalizer_spec.escape_whitespaces:
        return "it does not mark spaces in front of words with U+2581"
    strange = [p.piece for p in proto.pieces if p.type not in (_NORMAL, _UNKNOWN, _CONTROL, _BYTE)]
    if strange:
        return f"it has user-defined or unused pieces ({strange[0]!r} first), which split texts in another way"
    if proto.trainer_spec.bos_id < 0 or proto.trainer_spec.eos_id < 0:
        return "it lacks a start or an end token; train it with both"
    return None


def write_tokenizer(model: TokenizerModel, folder: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and special_tokens_map.json, and the sentencepiece file as it is."""
    unknown = model.proto.trainer_spec.unk_id
    named = {"bos_token": model.bos_id, "eos_token": model.eos_id, "unk_token": unknown, "pad_token": model.pad_id}
    special = {name: model.piece(index) for name, index in named.items()}
    config = {
        **special,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "left",  # what generate() asks for; the model takes both
    }
    (folder / SENTENCEPIECE).write_bytes(model.file.read_bytes())
    for name, content in (
        ("tokenizer.json", tokenizer_json(model)),
        ("tokenizer_config.json", config),
        ("special_tokens_map.json", special),
    ):
        text = json.dumps(content, ensure_ascii=False, indent=2)
        (folder / name).write_text(text + "\n", encoding="utf-8")


def tokenizer_json(model: TokenizerModel) -> dict[str, Any]:
    """The content of tokenizer.json."""
    pieces, trainer = model.proto.pieces, model.proto.trainer_spec
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    special = [index for index, piece in enumerate(pieces) if piece.type in (_UNKNOWN, _CONTROL)]
    bos, bos_token = model.piece(model.bos_id), {"SpecialToken": {"id": model.piece(model.bos_id), "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    spec, decoders = model.proto.normalizer_spec, [_replace({"String": SPACE}, " "), {"type": "ByteFallback"}]
    decoders.append({"type": "Fuse"})
    if spec.add_dummy_prefix or spec.remove_extra_whitespaces:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, "content": model.piece(index), **flags} for index in special],
        "normalizer": {"type": "Sequence", "normalizers": list(_normalizers(spec))},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos_token, first],
            "pair": [bos_token, first, bos_token, second],
            "special_tokens": {bos: {"id": bos, "ids": [model.bos_id], "tokens": [bos]}},
        },
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": model.piece(trainer.unk_id),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": bool(trainer.byte_fallback),
            "ignore_merges": False,
            "vocab": {piece.piece: index for index, piece in enumerate(pieces)},
            "merges": _merges(pieces),
        },
    }


def _merges(pieces: Any) -> list[list[str]]:
    """Pairs in the order in which sentencepiece joins them: by the score of what they give."""
    ids = {piece.piece: index for index, piece in enumerate(pieces) if piece.type == _NORMAL}
    ranked = []
    for text, index in ids.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in ids and right in ids:
                ranked.append((-pieces[index].score, ids[left], ids[right], [left, right]))
    return [pair for *_, pair in sorted(ranked)]


def _normalizers(spec: Any) -> Iterator[dict[str, Any]]:
    """sentencepiece's normaliser step by step; nothing is put in front of an empty text on either side."""
    if spec.precompiled_charsmap:
        import base64

        yield {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(spec.precompiled_charsmap).decode()}
    if spec.remove_extra_whitespaces:
        yield _replace({"Regex": r"\A +"}, "")
        yield _replace({"Regex": rf"[ {SPACE}]+\z"}, "")
        yield _replace({"Regex": " {2,}"}, " ")
    if spec.add_dummy_prefix:
        yield {"type": "Prepend", "prepend": SPACE}
    yield _replace({"String": " "}, SPACE)


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}
