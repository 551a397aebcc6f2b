"""Long texts in parts give the tokens of the whole; what would not is refused."""

import io
import random
from contextlib import suppress
from functools import lru_cache

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenization.cutting
from tokenization.cutting import Cutter, TextWithoutCut, neighbours_in_pieces
from tokenization.tokenizer import llama_settings, load_tokenizer

from .conftest import WORDS, make_texts

PARTS = st.sampled_from(
    [*WORDS, " ", " ", "  ", "    ", "\n", "\t", "19", "é", "記", "🙂", "\u2581", "<s>", "tt", "ee"]
)


def joined(cutter: Cutter, text: str) -> list[int]:
    return [token for part in cutter.encode(text) for token in part.tolist()]


@pytest.fixture
def short_parts(monkeypatch):
    monkeypatch.setattr(tokenization.cutting, "CUT_ABOVE_CHARACTERS", 12)
    monkeypatch.setattr(tokenization.cutting, "LONGEST_PART_CHARACTERS", 60)


@pytest.mark.usefixtures("short_parts")
@settings(max_examples=300)
@given(text=st.lists(PARTS, max_size=60).map("".join))
def test_the_tokens_of_the_parts_are_the_tokens_of_the_whole(tokenizer, text):
    processor = load_tokenizer(tokenizer)
    cutter = Cutter(processor, tokenizer.read_bytes())
    try:
        assert joined(cutter, text) == processor.encode(text)
    except TextWithoutCut:
        assert len(text) > 60
    else:
        assert cutter.cuts(text)[-1] == len(text)


def test_a_text_of_several_parts_gives_its_tokens(tokenizer):
    processor = load_tokenizer(tokenizer)
    text = " ".join(make_texts(9_000, seed=9))
    cutter = Cutter(processor, tokenizer.read_bytes())
    assert len(cutter.cuts(text)) == 3
    assert joined(cutter, text) == processor.encode(text)


@pytest.mark.usefixtures("short_parts")
@settings(max_examples=100)
@given(text=st.text(st.sampled_from("ab \n"), min_size=30, max_size=200))
def test_pieces_with_spaces_inside_are_never_cut(text):
    processor, model = _spaces_inside()
    with suppress(TextWithoutCut):
        assert joined(Cutter(processor, model), text) == processor.encode(text)


@lru_cache
def _spaces_inside():
    generator = random.Random(0)
    texts = ["".join(generator.choice("aab   ") for _ in range(200)) for _ in range(200)]
    processor, model = _trained(texts, vocab_size=330, split_by_whitespace=False)
    assert any("a\u2581" in pair for pair in neighbours_in_pieces(processor))
    return processor, model


def _trained(texts, **changes):
    model = io.BytesIO()
    wanted = {**llama_settings(300), **changes}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=model, **wanted)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    return processor, model.getvalue()


@pytest.mark.usefixtures("short_parts")
@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "unigram"},
        {"normalization_rule_name": "nmt_nfkc"},
        {"byte_fallback": False, "vocab_size": 60},
        {"remove_extra_whitespaces": True},
        {"treat_whitespace_as_suffix": True},
        {"user_defined_symbols": ["a\n"]},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_tokenizer_whose_pieces_reach_further_is_never_cut(changes):
    processor, model = _trained(make_texts(60), **changes)
    cutter = Cutter(processor, model)
    short = "a short\ntext of 30 characters"
    assert joined(cutter, short) == processor.encode(short)
    with pytest.raises(TextWithoutCut, match="no place to cut"):
        cutter.encode("a long text " * 20)


def test_a_text_without_a_place_to_cut_is_refused(tokenizer, monkeypatch):
    processor = load_tokenizer(tokenizer)
    monkeypatch.setattr(tokenization.cutting, "CUT_ABOVE_CHARACTERS", 10)
    monkeypatch.setattr(tokenization.cutting, "LONGEST_PART_CHARACTERS", 40)
    pair = next(pair for pair in sorted(neighbours_in_pieces(processor)) if pair == 2 * pair[0])
    with pytest.raises(TextWithoutCut, match="from 0 on"):
        Cutter(processor, tokenizer.read_bytes()).encode(pair[0] * 50)
