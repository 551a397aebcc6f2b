"""Encoding: the right tokens in the right split, the same bytes however it is run, nothing half-written."""

import errno
import gzip
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import sentencepiece
import zstandard

import tokenization.encode
from tokenization.encode import EncodeSettings, encode
from tokenization.errors import TokenizationError, run_command
from tokenization.files import staged_folder
from tokenization.manifest import Manifest
from tokenization.shards import import_indexed_dataset
from tokenization.split import SplitRule
from tokenization.tokenizer import llama_settings, load_tokenizer
from tokenization.verify import verify

from .conftest import REPOSITORY, make_texts, write_jsonl

SHARDS = ("train.bin", "train.idx", "heldout.bin", "heldout.idx")


def settings(corpus: Path, tokenizer: Path, output: Path, **changes) -> EncodeSettings:
    wanted = {"input": (str(corpus),), "workers": 1, "heldout_fraction": 0.2, **changes}
    return EncodeSettings(tokenizer=tokenizer, output=output, **wanted)


def hashes(folder: Path, names: tuple[str, ...] = (*SHARDS, "manifest.json", "tokenizer.model")) -> dict[str, str]:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def documents(prefix: str) -> list[list[int]]:
    dataset = import_indexed_dataset().IndexedDataset(prefix)
    assert list(dataset.document_indices) == list(range(len(dataset) + 1))
    return [dataset[index].tolist() for index in range(len(dataset))]


@pytest.fixture(scope="module")
def shards(tmp_path_factory, corpus, tokenizer) -> Path:
    output = tmp_path_factory.mktemp("shards") / "shards"
    encode(settings(corpus, tokenizer, output))
    return output


def test_megatron_reads_back_start_pieces_end_of_every_document_in_order(shards, texts, tokenizer):
    processor, manifest = load_tokenizer(tokenizer), Manifest.load(shards)
    rule = SplitRule(seed=0, threshold=0.2)
    expected = {False: [], True: []}
    for text in texts:
        expected[rule.is_heldout(text)].append([1, *processor.encode(text), 2])
    assert documents(manifest.train_prefix(shards)) == expected[False]
    assert documents(manifest.heldout_prefix(shards)) == expected[True]
    assert min(map(len, expected.values())) > 3


def test_the_manifest_counts_what_is_there(shards, texts, corpus):
    manifest = Manifest.load(shards)
    train = documents(manifest.train_prefix(shards))
    assert (manifest.splits["train"].documents, manifest.splits["train"].tokens) == (len(train), sum(map(len, train)))
    (source,) = manifest.sources
    assert (source.path, source.documents, source.bytes) == (str(corpus), len(texts), corpus.stat().st_size)
    assert source.sha256 == hashlib.sha256(corpus.read_bytes()).hexdigest()
    counts = Counter(token for document in train for token in document)
    total = sum(counts.values())
    entropy = -sum(count / total * math.log(count / total) for count in counts.values())
    assert manifest.unigram_entropy == pytest.approx(entropy, abs=1e-9)
    assert manifest.dtype == "uint16"


def test_three_workers_write_the_bytes_of_one(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenization.encode, "_BATCH_CHARACTERS", 3_000)  # many more batches than can be in flight
    corpus = write_jsonl(tmp_path / "a.jsonl", make_texts(400))
    for workers in (1, 3):
        encode(settings(corpus, tokenizer, tmp_path / str(workers), workers=workers))
    assert hashes(tmp_path / "1") == hashes(tmp_path / "3")


def test_every_format_gives_the_shards_of_the_text_files(tmp_path, texts, tokenizer):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    for folder in ("txt", "gz", "zst", "parquet"):
        (tmp_path / "in" / folder).mkdir(parents=True)
    for index, text in enumerate(texts):
        (tmp_path / "in" / "txt" / f"{index:04}.txt").write_bytes(text.encode())
    (tmp_path / "in" / "gz" / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "in" / "zst" / "a.jsonl.zst").write_bytes(zstandard.compress(lines))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "in" / "parquet" / "a.parquet")
    found = []
    for folder in ("txt", "gz", "zst", "parquet"):
        encode(settings(tmp_path / "in" / folder, tokenizer, tmp_path / folder))
        found.append(hashes(tmp_path / folder, SHARDS))
    assert found[1:] == found[:1] * 3


def test_no_text_is_in_both_splits_even_when_repeated(tmp_path, texts, tokenizer):
    corpus = write_jsonl(tmp_path / "a.jsonl", texts + texts[::-1])
    manifest = encode(settings(corpus, tokenizer, tmp_path / "out"))
    train = set(map(tuple, documents(manifest.train_prefix(tmp_path / "out"))))
    heldout = set(map(tuple, documents(manifest.heldout_prefix(tmp_path / "out"))))
    assert not train & heldout
    assert len(train) + len(heldout) == len(texts)


def test_two_documents_and_a_tiny_fraction_still_give_both_splits(tmp_path, texts, tokenizer):
    corpus = write_jsonl(tmp_path / "a.jsonl", texts[:2])
    manifest = encode(settings(corpus, tokenizer, tmp_path / "out", heldout_fraction=1e-9))
    assert [split.documents for split in manifest.splits.values()] == [1, 1]


def test_skipped_documents_are_in_the_manifest_and_the_summary(tmp_path, texts, tokenizer, capsys):
    corpus = write_jsonl(tmp_path / "a.jsonl", texts)
    with corpus.open("ab") as file:
        file.write(b'{"text": "\xff"}\nnot json\n{"text": null}\n')
    (tmp_path / "b.txt").write_text(" \n")
    manifest = encode(settings(tmp_path, tokenizer, tmp_path / "out"))
    assert manifest.skipped == {"bad_json": 1, "empty_text": 1, "invalid_utf8": 1, "missing_text": 1}
    assert "1 bad_json, 1 empty_text, 1 invalid_utf8, 1 missing_text" in capsys.readouterr().out
    assert [source.documents for source in manifest.sources] == [len(texts), 0]


def test_forced_int32_holds_the_same_tokens(tmp_path, corpus, tokenizer, shards):
    manifest = encode(settings(corpus, tokenizer, tmp_path / "out", dtype="int32"))
    assert documents(manifest.train_prefix(tmp_path / "out")) == documents(manifest.train_prefix(shards))
    assert (tmp_path / "out" / "train.bin").stat().st_size == 2 * (shards / "train.bin").stat().st_size


@pytest.mark.parametrize(
    ("wanted", "vocab_size", "dtype"),
    [("auto", 65_499, "uint16"), ("auto", 65_500, "int32"), ("uint16", 65_536, "uint16"), ("int32", 9, "int32")],
)
def test_the_token_type_holds_the_vocabulary(wanted, vocab_size, dtype):
    assert tokenization.encode._token_type(wanted, vocab_size) == dtype


def test_a_vocabulary_larger_than_the_forced_type_is_refused():
    with pytest.raises(TokenizationError, match="65,537; use --dtype int32"):
        tokenization.encode._token_type("uint16", 65_537)


def test_finished_shards_are_left_alone_and_others_are_not_overwritten(tmp_path, corpus, tokenizer, shards, capsys):
    output = tmp_path / "out"
    shutil.copytree(shards, output)
    before = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    encode(settings(corpus, tokenizer, output))
    assert "already done" in capsys.readouterr().out
    other = write_jsonl(tmp_path / "other.jsonl", make_texts(20, seed=5))
    for source, changes, sentence in [
        (corpus, {"seed": 1}, "written with seed 0, not 1"),
        (corpus, {"heldout_fraction": 0.3}, "heldout_fraction 0.2, not 0.3"),
        (corpus, {"dtype": "int32"}, "written as uint16, not int32"),
        (other, {}, f"{other} has other content"),
        (tmp_path, {}, "from 1 files, not"),
    ]:
        shutil.copy(corpus, tmp_path / "zz.jsonl")
        with pytest.raises(TokenizationError, match=sentence):
            encode(settings(source, tokenizer, output, **changes))
    assert {path: path.stat().st_mtime_ns for path in output.iterdir()} == before
    manifest = encode(settings(other, tokenizer, output, overwrite=True))
    assert manifest.sources[0].path == str(other)
    verify(output)
    assert not list(tmp_path.glob("out.partial-*"))


def test_damaged_shards_are_not_taken_for_done(tmp_path, corpus, tokenizer, shards):
    output = tmp_path / "out"
    shutil.copytree(shards, output)
    os.truncate(output / "train.bin", 10)
    with pytest.raises(TokenizationError, match=r"not whole.*train\.bin"):
        encode(settings(corpus, tokenizer, output))
    encode(settings(corpus, tokenizer, output, overwrite=True))
    assert hashes(output) == hashes(shards)


def test_overwrite_never_deletes_what_is_no_shard(tmp_path, corpus, tokenizer):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    (tmp_path / "out" / "manifest.json").write_text("{}")
    with pytest.raises(TokenizationError, match=r"thesis\.tex"):
        encode(settings(corpus, tokenizer, tmp_path / "out", overwrite=True))
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("moment", ["folder", "tokens"])
def test_a_run_killed_in_the_middle_leaves_nothing_and_the_next_gives_the_same_bytes(tmp_path, tokenizer, moment):
    corpus = write_jsonl(tmp_path / "a.jsonl", make_texts(6_000, words=120))
    output = tmp_path / "out"
    arguments = ["--input", corpus, "--tokenizer", tokenizer, "--output", output, "--workers", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "tokenization.encode", *map(str, arguments), "--heldout-fraction", "0.2"],
        cwd=REPOSITORY,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not _has_begun(tmp_path, moment):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not output.exists()
    assert list(tmp_path.glob("out.partial-*"))
    _wait_until_session_is_empty(process.pid)
    encode(settings(corpus, tokenizer, output))
    encode(settings(corpus, tokenizer, tmp_path / "uninterrupted"))
    assert hashes(output) == hashes(tmp_path / "uninterrupted")
    assert not list(tmp_path.glob("out.partial-*"))


def _has_begun(folder: Path, moment: str) -> bool:
    if moment == "folder":
        return any(folder.glob("out.partial-*"))
    return any(path.stat().st_size > 0 for path in folder.glob("out.partial-*/train.bin"))


def _wait_until_session_is_empty(session: int) -> None:
    """The workers of a killed run must not stay behind."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.killpg(session, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    os.killpg(session, signal.SIGKILL)
    pytest.fail("workers outlived their parent")


def test_a_run_in_progress_is_not_taken_for_dead(tmp_path):
    with staged_folder(tmp_path / "out", replace=False) as first:
        with staged_folder(tmp_path / "out", replace=False) as second:
            (second / "a").write_text("second")
        assert first.is_dir()
        (tmp_path / "out" / "a").unlink()
        (first / "a").write_text("first")
    assert (tmp_path / "out" / "a").read_text() == "first"


def test_ctrl_c_ends_with_a_short_line_and_130(tmp_path, tokenizer):
    corpus = write_jsonl(tmp_path / "a.jsonl", make_texts(6_000, words=120))
    arguments = ["--input", corpus, "--tokenizer", tokenizer, "--output", tmp_path / "out", "--workers", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "tokenization.encode", *map(str, arguments)],
        cwd=REPOSITORY,
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not _has_begun(tmp_path, "folder"):
        assert process.poll() is None
        time.sleep(0.002)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines() == ["interrupted; nothing half-written is left, run the same command again"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, corpus, tokenizer, monkeypatch, capsys):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(import_indexed_dataset().IndexedDatasetBuilder, "add_document", full)
    with pytest.raises(SystemExit) as end:
        run_command(lambda: encode(settings(corpus, tokenizer, tmp_path / "out")) and None)
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: the disk is full")
    assert not any(tmp_path.iterdir())


def test_unusable_input_is_one_sentence_status_2_and_nothing_written(fails, corpus, tokenizer, tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.txt").write_text("the only document")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.txt").write_bytes(b"\xff")
    output = tmp_path / "out"
    common = ["--output", output, "--tokenizer", tokenizer, "--input"]
    assert f"{tmp_path}/nowhere" in fails("encode", *common, tmp_path / "nowhere")
    assert "one document" in fails("encode", *common, tmp_path / "one")
    assert "1 invalid_utf8" in fails("encode", *common, tmp_path / "bad")
    assert "--workers is 0" in fails("encode", *common, corpus, "--workers", 0)
    assert "--heldout-fraction is 1.0" in fails("encode", *common, corpus, "--heldout-fraction", 1)
    assert "--input is empty" in fails("encode", *common)
    assert not output.exists()
    assert not list(tmp_path.glob("out.partial-*"))


@pytest.mark.parametrize(("data", "sentence"), [(None, "no such file"), (b"", "not a"), (b"text\n" * 99, "not a")])
def test_what_is_no_tokenizer_is_refused_by_name(tmp_path, corpus, data, sentence):
    path = tmp_path / "t.model"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(TokenizationError, match=rf"t\.model: {sentence}"):
        encode(settings(corpus, path, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path, corpus, texts):
    wanted = {**llama_settings(300), "eos_id": -1}
    with (tmp_path / "t.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=file, **wanted)
    with pytest.raises(TokenizationError, match=r"start or an end token \(bos 1, eos -1\)"):
        encode(settings(corpus, tmp_path / "t.model", tmp_path / "out"))
