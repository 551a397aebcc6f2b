"""tokenizer.json gives the ids that sentencepiece gives, whatever the model's settings."""

import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from transformers import AutoTokenizer

from titans_mcore.hf.folder import ExportError
from titans_mcore.hf.tokenizer import read_tokenizer, write_tokenizer

from .hf_runs import WORDS, train_tokenizer

EXTRAS = [
    " ",
    " ",
    "  ",
    "   ",
    "\n",
    "\n\n",
    "\t",
    "\r\n",
    "é",
    "記憶",
    "🙂",
    "👩‍👩‍👧",
    "🏳️‍🌈",
    "👍🏽",
    " \n ",
    "\x00",
    "\x7f",
    "\u00a0",
    "\u3000",
]
EXTRAS += ["▁", "a", "b", "ab", "ba", "aa", "0", "7", "19", ".", ",", "(", "<0x41>", "ﬁ", "\u0301", "\ufeff", "İ", "ẞ"]


def random_texts(count: int) -> list[str]:
    generator = random.Random(1)
    texts = ["", " ", "  ", "\n", "▁", "▁ ", " ▁▁ ", "a" * 50, "ab" * 31, " " * 37, "\t \n"]
    while len(texts) < count:
        parts = (
            generator.choice(WORDS if generator.random() < 0.4 else EXTRAS) for _ in range(generator.randint(1, 30))
        )
        texts.append("".join(parts))
        texts.append("".join(chr(generator.choice([32, 97, 98, generator.randint(1, 0xD7FF)])) for _ in range(8)))
        texts.append("".join(chr(generator.choice([10, 32, generator.randint(0x1F300, 0x1FAFF)])) for _ in range(6)))
        texts.append(generator.randbytes(12).decode("latin-1"))
        texts.append(generator.randbytes(24).decode("utf-8", "ignore"))
    return texts[:count]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"remove_extra_whitespaces": True},
        {"add_dummy_prefix": False},
        {"byte_fallback": False, "vocab_size": 90, "character_coverage": 0.98},
        {"pretokenization_delimiter": "\n"},
    ],
    ids=lambda settings: "-".join(settings) or "llama",
)
def test_ids_and_text_equal_sentencepiece_on_random_strings(tmp_path: Path, settings: dict[str, Any]) -> None:
    file = train_tokenizer(tmp_path / "tokenizer.model", **settings)
    model = read_tokenizer(file)
    assert model.caveat is None
    write_tokenizer(model, tmp_path)
    ours = AutoTokenizer.from_pretrained(tmp_path)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(file))
    for text in random_texts(3_000):
        ids = theirs.encode(text)
        assert ours(text).input_ids == [theirs.bos_id(), *ids], repr(text)
        # U+2047 stands for an unknown piece there, "<unk>" here; a text's own leading U+2581 may be dropped there.
        if "byte_fallback" not in settings and not (
            settings.get("remove_extra_whitespaces") and text.lstrip()[:1] == "▁"
        ):
            assert ours.decode(ids) == theirs.decode(ids), repr(text)


@pytest.mark.parametrize("rule", ["nmt_nfkc", "nmt_nfkc_cf", "nfkc"])
def test_a_normalising_model_is_equal_on_ordinary_text_and_says_where_it_may_not_be(tmp_path: Path, rule: str) -> None:
    file = train_tokenizer(tmp_path / "tokenizer.model", normalization_rule_name=rule, remove_extra_whitespaces=True)
    model = read_tokenizer(file)
    assert model.caveat is not None
    assert "combining accents or a carriage return" in model.caveat
    write_tokenizer(model, tmp_path)
    ours = AutoTokenizer.from_pretrained(tmp_path)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(file))
    generator = random.Random(2)
    ordinary = [*WORDS, " ", "  ", "\n", "\t", "é", "ＡＢ", "½", "記憶", "🙂", "Straße", "1984", ".", "ﬁ"]
    for _ in range(500):
        text = "".join(generator.choice(ordinary) for _ in range(generator.randint(1, 20)))
        assert ours(text).input_ids[1:] == theirs.encode(text), repr(text)


def test_special_tokens_are_known_by_name(tmp_path: Path, tokenizer: Path) -> None:
    write_tokenizer(read_tokenizer(tokenizer), tmp_path)
    ours = AutoTokenizer.from_pretrained(tmp_path)
    assert (ours.bos_token_id, ours.eos_token_id, ours.unk_token_id) == (1, 2, 0)
    assert ours.is_fast
    assert len(ours) == ours.vocab_size == 330
    assert ours.decode(ours("the memory").input_ids, skip_special_tokens=True) == "the memory"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"model_type": "unigram", "vocab_size": 290, "byte_fallback": True}, "BPE"),
        ({"user_defined_symbols": ["[X]"]}, "user-defined"),
        ({"treat_whitespace_as_suffix": True}, "U+2581"),
        ({"bos_id": -1}, "start or an end token"),
    ],
    ids=["unigram", "user-defined", "suffix", "no-bos"],
)
def test_a_model_that_cannot_be_exported_exactly_is_refused(
    tmp_path: Path, settings: dict[str, Any], reason: str
) -> None:
    file = train_tokenizer(tmp_path / "tokenizer.model", **settings)
    with pytest.raises(ExportError, match=reason.replace("+", r"\+")):
        read_tokenizer(file)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x00" * 100])
def test_a_file_that_is_no_sentencepiece_model_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "tokenizer.model"
    file.write_bytes(content)
    with pytest.raises(ExportError, match=r"sentencepiece|pieces"):
        read_tokenizer(file)
