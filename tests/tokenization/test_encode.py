"""Encoding: the right tokens in the right split and shard, the same bytes for any number of workers."""

import gzip
import hashlib
import json
import math
import os
import shutil
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import sentencepiece
import zstandard

from titans_mcore.command_line import CommandError
from tokenization.command_line import TokenizationError
from tokenization.encode import encode, main, token_type
from tokenization.manifest import Manifest
from tokenization.plan import Plan
from tokenization.selection import hash_position
from tokenization.shards import import_indexed_dataset
from tokenization.tokenizer import llama_settings, load_tokenizer
from tokenization.verify import verify

from .conftest import encode_settings, hashes, make_texts, write_jsonl


def documents(prefix: str) -> list[list[int]]:
    dataset = import_indexed_dataset().IndexedDataset(prefix)
    assert list(dataset.document_indices) == list(range(len(dataset) + 1))
    return [dataset[index].tolist() for index in range(len(dataset))]


@pytest.fixture(scope="module")
def shards(tmp_path_factory, corpus, tokenizer) -> Path:
    output = tmp_path_factory.mktemp("shards") / "shards"
    encode(encode_settings(corpus, tokenizer, output))
    return output


def test_megatron_reads_back_start_pieces_end_of_every_document_in_order(shards, texts, tokenizer):
    processor, manifest = load_tokenizer(tokenizer), Manifest.load(shards)
    expected = {False: [], True: []}
    for text in texts:
        expected[hash_position(text, 0) < 0.2].append([1, *processor.encode(text), 2])
    assert documents(*manifest.train_prefixes(shards)) == expected[False]
    assert documents(manifest.heldout_prefix(shards)) == expected[True]
    assert min(map(len, expected.values())) > 3
    assert len(Plan.load(shards).units) > 3


def test_the_manifest_counts_what_is_there(shards, texts, corpus):
    manifest = Manifest.load(shards)
    train = documents(*manifest.train_prefixes(shards))
    assert (manifest.splits["train"].documents, manifest.splits["train"].tokens) == (len(train), sum(map(len, train)))
    (source,) = manifest.sources
    assert (source.path, source.documents, source.bytes) == (str(corpus), len(texts), corpus.stat().st_size)
    assert source.sha256 == hashlib.sha256(corpus.read_bytes()).hexdigest()
    counts = Counter(token for document in train for token in document)
    total = sum(counts.values())
    entropy = -sum(count / total * math.log(count / total) for count in counts.values())
    assert manifest.unigram_entropy == pytest.approx(entropy, abs=1e-9)
    assert manifest.dtype == "uint16"


def test_shards_of_a_chosen_size_hold_the_same_documents(tmp_path, corpus, tokenizer, shards):
    manifest = encode(encode_settings(corpus, tokenizer, tmp_path / "out", shard_tokens=2_000))
    together = [one for prefix in manifest.train_prefixes(tmp_path / "out") for one in documents(prefix)]
    assert together == documents(str(shards / "train"))
    sizes = [shard.tokens for shard in manifest.splits["train"].shards]
    assert len(sizes) == -(-sum(sizes) // 2_000) > 2
    longest = max(map(len, together))
    assert max(sizes) < 2_000 + longest
    assert max(sizes) - min(sizes) <= 2 * longest  # no tiny last one
    assert [shard.prefix for shard in manifest.splits["train"].shards][:2] == ["train-00000", "train-00001"]
    verify(tmp_path / "out")


def test_three_workers_write_the_bytes_of_one(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("tokenization.workers.BYTES_WORTH_A_WORKER", 30_000)  # two of them write shards
    corpus = write_jsonl(tmp_path / "a.jsonl", make_texts(300) + make_texts(50))
    for workers in (1, 3):
        encode(encode_settings(corpus, tokenizer, tmp_path / str(workers), workers=workers, shard_tokens=9_000))
    assert hashes(tmp_path / "1") == hashes(tmp_path / "3")


def test_every_format_gives_the_shards_of_the_text_files(tmp_path, texts, tokenizer):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    for folder in ("txt", "gz", "zst", "parquet"):
        (tmp_path / "in" / folder).mkdir(parents=True)
    for index, text in enumerate(texts):
        (tmp_path / "in" / "txt" / f"{index:04}.txt").write_bytes(text.encode())
    (tmp_path / "in" / "gz" / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "in" / "zst" / "a.jsonl.zst").write_bytes(zstandard.compress(lines))
    pyarrow.parquet.write_table(
        pyarrow.table({"text": texts}), tmp_path / "in" / "parquet" / "a.parquet", row_group_size=7
    )
    found = []
    for folder in ("txt", "gz", "zst", "parquet"):
        encode(encode_settings(tmp_path / "in" / folder, tokenizer, tmp_path / folder))
        found.append(
            {name: value for name, value in hashes(tmp_path / folder).items() if name.endswith((".bin", ".idx"))}
        )
    assert found[1:] == found[:1] * 3


def test_repeated_texts_stay_once_where_they_came_first(tmp_path, texts, tokenizer):
    corpus = write_jsonl(tmp_path / "a.jsonl", texts + texts[::-1])
    manifest = encode(encode_settings(corpus, tokenizer, tmp_path / "out"))
    encode(encode_settings(write_jsonl(tmp_path / "b.jsonl", texts), tokenizer, tmp_path / "once"))
    assert manifest.skipped == {"duplicate": len(texts)}
    for name in ("train.bin", "train.idx", "train.rows", "heldout.bin"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "once" / name).read_bytes()


def test_repeated_texts_that_are_kept_are_never_in_both_splits(tmp_path, texts, tokenizer):
    corpus = write_jsonl(tmp_path / "a.jsonl", texts + texts[::-1])
    manifest = encode(encode_settings(corpus, tokenizer, tmp_path / "out", keep_duplicates=True))
    train, heldout = (documents(str(tmp_path / "out" / name)) for name in ("train", "heldout"))
    assert len(train) + len(heldout) == 2 * len(texts)
    assert not set(map(tuple, train)) & set(map(tuple, heldout))
    assert manifest.skipped == {}


def test_two_documents_and_a_tiny_fraction_still_give_both_splits(tmp_path, texts, tokenizer):
    corpus = write_jsonl(tmp_path / "a.jsonl", texts[:2])
    manifest = encode(encode_settings(corpus, tokenizer, tmp_path / "out", heldout_fraction=1e-9))
    assert [split.documents for split in manifest.splits.values()] == [1, 1]


def test_forced_int32_holds_the_same_tokens(tmp_path, corpus, tokenizer, shards):
    manifest = encode(encode_settings(corpus, tokenizer, tmp_path / "out", dtype="int32"))
    assert documents(*manifest.train_prefixes(tmp_path / "out")) == documents(str(shards / "train"))
    assert (tmp_path / "out" / "train.bin").stat().st_size == 2 * (shards / "train.bin").stat().st_size


@pytest.mark.parametrize(
    ("wanted", "vocab_size", "dtype"),
    [("auto", 65_499, "uint16"), ("auto", 65_500, "int32"), ("uint16", 65_536, "uint16"), ("int32", 9, "int32")],
)
def test_the_token_type_holds_the_vocabulary(wanted, vocab_size, dtype):
    assert token_type(wanted, vocab_size) == dtype


def test_a_vocabulary_larger_than_the_forced_type_is_refused():
    with pytest.raises(TokenizationError, match="65,537; use --dtype int32"):
        token_type("uint16", 65_537)


def test_finished_shards_are_left_alone_and_others_are_not_overwritten(tmp_path, corpus, tokenizer, shards, capsys):
    output = tmp_path / "out"
    shutil.copytree(shards, output)
    before = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    encode(encode_settings(corpus, tokenizer, output))
    assert "already done" in capsys.readouterr().out
    other = write_jsonl(tmp_path / "other.jsonl", make_texts(20, seed=5))
    for source, changes, sentence in [
        (corpus, {"seed": 1}, "made with seed 0, not 1"),
        (corpus, {"heldout_fraction": 0.3}, "heldout_fraction 0.2, not 0.3"),
        (corpus, {"dtype": "int32"}, "made as uint16, not int32"),
        (corpus, {"min_characters": 10}, "made with min_characters None, not 10"),
        (other, {}, f"made from {corpus}, where now {other} stands"),
        (tmp_path, {}, "from 1 files, not"),
    ]:
        shutil.copy(corpus, tmp_path / "zz.jsonl")
        with pytest.raises(TokenizationError, match=sentence):
            encode(encode_settings(source, tokenizer, output, **changes))
    assert {path: path.stat().st_mtime_ns for path in output.iterdir()} == before
    manifest = encode(encode_settings(other, tokenizer, output, overwrite=True))
    assert manifest.sources[0].path == str(other)
    verify(output)


def test_finished_shards_of_files_that_were_moved_are_recognised(tmp_path, corpus, tokenizer, shards, capsys):
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(corpus.read_bytes())
    encode(encode_settings(moved, tokenizer, Path(shutil.copytree(shards, tmp_path / "out"))))
    assert "already done" in capsys.readouterr().out


def test_damaged_shards_are_not_taken_for_done(tmp_path, corpus, tokenizer, shards):
    output = tmp_path / "out"
    shutil.copytree(shards, output)
    os.truncate(output / "train.bin", 10)
    with pytest.raises(TokenizationError, match=r"not whole.*train\.bin"):
        encode(encode_settings(corpus, tokenizer, output))
    encode(encode_settings(corpus, tokenizer, output, overwrite=True))
    assert hashes(output) == hashes(shards)


def test_overwrite_never_deletes_what_is_no_shard(tmp_path, corpus, tokenizer):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    (tmp_path / "out" / "manifest.json").write_text("{}")
    with pytest.raises(TokenizationError, match=r"thesis\.tex"):
        encode(encode_settings(corpus, tokenizer, tmp_path / "out", overwrite=True))
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"


def test_unusable_settings_are_one_sentence_and_status_2(fails, corpus, tokenizer, tmp_path):
    output = tmp_path / "out"
    common = ["--output", output, "--tokenizer", tokenizer, "--input"]
    assert f"{tmp_path}/nowhere" in fails("encode", *common, tmp_path / "nowhere")
    assert not output.exists()


@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        ("file", "file: is a file; give a folder"),
        ("file/below", "file is a file; give another path"),
        ("x" * 300, "the name is too long for this file system; give a shorter one"),
    ],
)
def test_an_output_that_cannot_be_written_is_told_first(tmp_path, corpus, tokenizer, place, sentence):
    (tmp_path / "file").touch()
    words = ["--input", corpus, "--tokenizer", tokenizer, "--output", tmp_path / place]
    with pytest.raises(CommandError, match=f"--output .*{sentence}"):
        main(list(map(str, words)))


def test_an_output_inside_the_input_is_no_text(tmp_path, texts, tokenizer):
    write_jsonl(tmp_path / "a.jsonl", [*texts, "one"])
    words = ["--input", tmp_path, "--tokenizer", tokenizer, "--output", tmp_path / "shards", "--workers", 1]
    main(list(map(str, words)))
    first = Manifest.load(tmp_path / "shards")
    main([*map(str, words), "--overwrite", "--seed", "1"])
    assert [source.path for source in Manifest.load(tmp_path / "shards").sources] == [first.sources[0].path]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"workers": 0}, "--workers is 0"),
        ({"heldout_fraction": 1.0}, "--heldout-fraction is 1.0"),
        ({"input": ()}, "--input is empty"),
        ({"shard": "3/3"}, "--shard is '3/3'"),
        ({"shard": "1"}, "--shard is '1'"),
        ({"shard_tokens": 0}, "--shard-tokens is 0"),
        ({"workers": 1_000_000}, "--workers is 1000000; give 1 to 4,096"),
        ({"max_document_mb": 1e12}, "--max-document-mb is 1"),
        ({"unit_mb": float("nan")}, "--unit-mb is nan"),
        ({"max_rejected": "many"}, "--max-rejected is 'many'"),
        ({"max_rejected": "101%"}, "--max-rejected is '101%'"),
        ({"dataset": "some/set"}, "both are given"),
        ({"name": "sample"}, "belong to a --dataset"),
        ({"min_characters": 9, "max_characters": 3}, "no document is both"),
    ],
)
def test_unusable_settings_are_refused_by_name(tmp_path, corpus, tokenizer, changes, sentence):
    with pytest.raises(TokenizationError, match=sentence):
        encode(encode_settings(corpus, tokenizer, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("data", "sentence"), [("the only document", "one document"), ("  ", "1 of 1 documents are bad .*1 empty_text")]
)
def test_too_few_documents_are_told(tmp_path, texts, tokenizer, data, sentence):
    (tmp_path / "a.txt").write_text(data)
    with pytest.raises(TokenizationError, match=sentence):
        encode(encode_settings(tmp_path / "a.txt", tokenizer, tmp_path / "out"))
    assert not (tmp_path / "out" / "manifest.json").exists()
    # What failed is not in the way of other text.
    encode(encode_settings(write_jsonl(tmp_path / "b.jsonl", texts), tokenizer, tmp_path / "out"))
    verify(tmp_path / "out")


@pytest.mark.parametrize(("data", "sentence"), [(None, "no such file"), (b"", "not a"), (b"text\n" * 99, "not a")])
def test_what_is_no_tokenizer_is_refused_by_name(tmp_path, corpus, data, sentence):
    path = tmp_path / "t.model"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(TokenizationError, match=rf"t\.model: {sentence}"):
        encode(encode_settings(corpus, path, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path, corpus, texts):
    wanted = {**llama_settings(300), "eos_id": -1}
    with (tmp_path / "t.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=file, **wanted)
    with pytest.raises(TokenizationError, match=r"start or an end token \(bos 1, eos -1\)"):
        encode(encode_settings(corpus, tmp_path / "t.model", tmp_path / "out"))


def test_what_the_tokenizer_cannot_do_is_said_before_anything_is_trained(tmp_path, corpus, texts, tokenizer, capsys):
    spelled = encode(encode_settings(corpus, tokenizer, tmp_path / "spelled"))
    assert spelled.unknown_tokens == 0
    assert "note:" not in capsys.readouterr().out
    settings = llama_settings(200) | {"byte_fallback": False, "user_defined_symbols": "@@"}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(tmp_path / "plain"), **settings
    )
    foreign = write_jsonl(tmp_path / "foreign.jsonl", [f"{text} Ω" for text in texts])
    manifest = encode(encode_settings(foreign, tmp_path / "plain.model", tmp_path / "shards"))
    ids = [token for document in documents(*manifest.train_prefixes(tmp_path / "shards")) for token in document]
    assert manifest.unknown_tokens == ids.count(0) > 0
    told = capsys.readouterr().out
    assert "cannot be exported: it has user-defined or unused pieces ('@@' first)" in told
    assert f"{manifest.unknown_tokens:,} train tokens" in told
