"""A trained tokenizer is of Llama-2's kind, gives text back exactly, and depends on text and settings alone."""

import hashlib

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenization.train
from tokenization.command_line import TokenizationError
from tokenization.records import Skipped
from tokenization.sources import find_sources
from tokenization.tokenizer import load_tokenizer
from tokenization.train import TrainSettings, cut_passages, sample_passages, train

from .conftest import make_texts, write_jsonl

# Sentencepiece writes the space as U+2581, so that one character cannot come back.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"))
TRICKY = st.sampled_from(
    [" ", "  ", "\n", "\t", "\r\n", "🙂", "é", "a", "<s>", "</s>", "<0x0A>", "1984", "\0", "\u2028"]
)


@settings(max_examples=300)
@given(text=TEXT | st.lists(TRICKY).map("".join))
def test_decoding_the_pieces_gives_the_text_back(tokenizer, text):
    processor = load_tokenizer(tokenizer)
    assert processor.decode(processor.encode(text)) == text


def test_the_layout_is_that_of_llama_2(tokenizer):
    processor = load_tokenizer(tokenizer)
    assert [processor.id_to_piece(i) for i in (0, 1, 2, 3, 258)] == ["<unk>", "<s>", "</s>", "<0x00>", "<0xFF>"]
    assert (processor.unk_id(), processor.bos_id(), processor.eos_id(), processor.pad_id()) == (0, 1, 2, -1)
    assert processor.vocab_size() == 400
    assert processor.encode("7", out_type=str) == ["▁", "7"]
    assert processor.encode("1984", out_type=str)[1:] == ["1", "9", "8", "4"]


def test_a_line_feed_is_one_byte_token_and_no_piece_spans_it(tokenizer):
    processor = load_tokenizer(tokenizer)
    assert processor.encode("the\n\nthe", out_type=str)[1:3] == ["<0x0A>", "<0x0A>"]
    assert not any("\n" in processor.id_to_piece(i) for i in range(processor.vocab_size()))


@settings(max_examples=100)
@given(text=st.text(st.sampled_from("ab\n "), max_size=40).map(lambda text: text * 700))
def test_passages_are_the_text_in_pieces_of_bounded_length(text):
    passages = list(cut_passages(text))
    assert "".join(passages) == text
    assert all(0 < len(passage) <= 4_096 for passage in passages)


def test_a_sample_is_drawn_from_all_documents_and_keeps_its_size(tmp_path):
    texts = make_texts(400)
    corpus = write_jsonl(tmp_path / "a.jsonl", texts)
    total = sum(len(text.encode()) for text in texts)

    def sample(seed: int) -> list[str]:
        wanted = TrainSettings(input=(str(corpus),), output=tmp_path / "x", sample_bytes=total // 4, seed=seed)
        return sample_passages(wanted, find_sources(wanted.input, Skipped()), Skipped())

    drawn = sample(0)
    assert total // 4 * 0.9 < sum(len(text.encode()) for text in drawn) <= total // 4
    places = [texts.index(text) for text in drawn]
    assert places == sorted(places)
    by_quarter = [sum(start <= place < start + 100 for place in places) for start in (0, 100, 200, 300)]
    assert min(by_quarter) > 12, by_quarter
    assert sample(0) == drawn != sample(1)


def test_the_same_text_gives_the_same_tokenizer_and_another_is_not_overwritten(run, fails, corpus, tokenizer, tmp_path):
    output = tmp_path / "new" / "tokenizer.model"
    arguments = ["--input", corpus, "--output", output]
    for _ in range(2):  # the second finds its own result there
        assert run("train", *arguments, "--vocab-size", 400).returncode == 0
    before = hashlib.sha256(output.read_bytes()).digest()
    assert before == hashlib.sha256(tokenizer.read_bytes()).digest()
    result = run("train", *arguments, "--vocab-size", 390)
    assert result.returncode == 2
    assert "--overwrite" in result.stderr
    assert hashlib.sha256(output.read_bytes()).digest() == before
    assert run("train", *arguments, "--vocab-size", 390, "--overwrite").returncode == 0
    assert load_tokenizer(output).vocab_size() == 390
    assert [path.name for path in output.parent.iterdir()] == ["tokenizer.model"]


def test_of_much_text_only_units_drawn_from_all_of_it_are_read(tmp_path, monkeypatch):
    texts = make_texts(400)
    for number in range(20):
        write_jsonl(tmp_path / f"{number:02}.jsonl", texts[number * 20 : number * 20 + 20])
    read = []
    monkeypatch.setattr("tokenization.train._READ_SAMPLES", 4)
    monkeypatch.setattr("tokenization.train._READ_UNITS", 8)
    reader = tokenization.train.Reader
    monkeypatch.setattr(
        "tokenization.train.Reader", lambda source, *a, **o: read.append(source) or reader(source, *a, **o)
    )
    wanted = TrainSettings(input=(str(tmp_path),), output=tmp_path / "x", sample_bytes=10_000, min_characters=150)
    drawn = sample_passages(wanted, wanted.find(Skipped()), Skipped())
    assert 8_000 < sum(len(text.encode()) for text in drawn) <= 10_000
    assert all(len(text) >= 150 for text in drawn)
    files = {source.path for source in read}
    assert 3 < len(files) < 20
    assert max(files) > str(tmp_path / "10")


def test_too_little_text_is_told_with_the_largest_vocabulary_that_works(tmp_path):
    (tmp_path / "a.txt").write_text("hello world, this is little text")
    wanted = {"input": (str(tmp_path),), "output": tmp_path / "t.model"}
    with pytest.raises(TokenizationError, match=r"at most (\d+) pieces") as fault:
        train(TrainSettings(**wanted, vocab_size=32_000))
    largest = int(str(fault.value).split("at most ")[1].split()[0])
    assert not (tmp_path / "t.model").exists()
    train(TrainSettings(**wanted, vocab_size=largest))
    assert sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "t.model")).vocab_size() == largest


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"vocab_size": 100}, "at least 2"),
        ({"vocab_size": 0}, "--vocab-size is 0"),
        ({"sample_bytes": 0}, "--sample-bytes is 0"),
        ({"data": b" \n"}, "no document"),
        ({"output": "."}, "is a folder"),
    ],
)
def test_unusable_settings_are_refused(tmp_path, change, sentence):
    (tmp_path / "a.txt").write_bytes(change.pop("data", b"some text to train on"))
    change["output"] = tmp_path / change.get("output", "t.model")
    with pytest.raises(TokenizationError, match=sentence):
        train(TrainSettings(**{"input": (str(tmp_path),), "vocab_size": 300, **change}))
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_missing_input_is_one_sentence_and_status_2(fails, tmp_path):
    sentence = fails("train", "--input", tmp_path / "nowhere", "--output", tmp_path / "t.model")
    assert f"{tmp_path}/nowhere" in sentence
    assert not any(tmp_path.iterdir())
