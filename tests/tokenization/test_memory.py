"""Memory stays below 1 GB a worker, whatever the file; measured on real processes."""

import gzip
import json
import os
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from tokenization.documents import Reader
from tokenization.manifest import Manifest
from tokenization.records import Skipped
from tokenization.shards import import_indexed_dataset
from tokenization.sources import find_sources
from tokenization.tokenizer import load_tokenizer

from .conftest import REPOSITORY, command_line, encode_settings, make_texts, write_jsonl

MEGABYTES = 100
LIMIT_BYTES = 1_000_000_000
# Runs a command line in this process's child and prints the largest memory of it and of its workers.
MEASURE = (
    "import resource, subprocess, sys; code = subprocess.run(sys.argv[1:]).returncode;"
    "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024); sys.exit(code)"
)


def peak_bytes(command: list[str]) -> int:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, *command], env=environment, capture_output=True, text=True, timeout=500
    )
    assert result.returncode == 0, result.stderr
    return int(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def huge_text() -> str:
    unit = "\n".join(make_texts(1_000, words=100))
    ascii_only = unit.encode("ascii", "ignore").decode()
    return ascii_only * (MEGABYTES * 1_000_000 // len(ascii_only) + 1)


def write(path: Path, suffix: str, text: str) -> None:
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": ["small", text, "small too"]}), path)
    elif suffix == ".txt":
        path.write_text(text)
    else:
        path.write_text("".join(json.dumps({"text": one}) + "\n" for one in ("small", text, "small too")))


@pytest.fixture(scope="module")
def tokens_by_line(huge_text, tokenizer) -> "numpy.ndarray":
    """What the whole text gives, from its lines: no piece spans a line feed, and each line is given one in front."""
    processor = load_tokenizer(tokenizer)
    first, *lines = huge_text.split("\n")
    found = [numpy.array([1, *processor.encode(first)], "uint16")]
    for start in range(0, len(lines), 10_000):
        encoded = processor.encode(["\n" + line for line in lines[start : start + 10_000]])
        found.append(numpy.fromiter((token for one in encoded for token in one[1:]), "uint16"))
    return numpy.concatenate([*found, numpy.array([2], "uint16")])


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".txt"])
def test_a_document_of_100_mb_is_encoded_below_1_gb(tmp_path, tokenizer, huge_text, tokens_by_line, suffix):
    write(tmp_path / f"a{suffix}", suffix, huge_text)
    settings = encode_settings(tmp_path / f"a{suffix}", tokenizer, tmp_path / "out", workers=2, unit_mb=1.0)
    settings = replace(settings, input=(*settings.input, str(write_jsonl(tmp_path / "b.jsonl", make_texts(40)))))
    peak = peak_bytes([*command_line(settings), "--max-document-mb", "128"])
    print(f"{suffix}: {peak / 1e6:,.0f} MB")
    assert peak < LIMIT_BYTES
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.skipped == {}
    for prefix in ("train", "heldout"):
        dataset = import_indexed_dataset().IndexedDataset(str(tmp_path / "out" / prefix))
        longest = int(numpy.argmax(dataset.sequence_lengths))
        if dataset.sequence_lengths[longest] > 1_000_000:
            assert numpy.array_equal(dataset[longest], tokens_by_line)
            return
    pytest.fail("the document is not there")


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".txt"])
def test_a_document_of_100_mb_is_rejected_by_default_below_1_gb(tmp_path, tokenizer, huge_text, suffix):
    write(tmp_path / f"a{suffix}", suffix, huge_text)
    settings = encode_settings(tmp_path / f"a{suffix}", tokenizer, tmp_path / "out", workers=2, unit_mb=16.0)
    settings = replace(settings, input=(*settings.input, str(write_jsonl(tmp_path / "b.jsonl", make_texts(40)))))
    assert peak_bytes([*command_line(settings), "--max-rejected", "10%"]) < LIMIT_BYTES
    (listed,) = map(json.loads, (tmp_path / "out" / "rejected.jsonl").read_text().splitlines())
    assert (listed["reason"], listed["source"]) == ("document_too_large", str(tmp_path / f"a{suffix}"))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_small_file_that_decompresses_to_a_gigabyte_comes_in_small_blocks(tmp_path, suffix):
    """A line of a gigabyte is never held, nor is what decompresses from one block."""
    path = tmp_path / f"a.jsonl{suffix}"
    with gzip.open(path, "wb", 1) if suffix == ".gz" else zstandard.open(path, "wb") as file:
        for _ in range(300):
            file.write(b" " * 1_000_000)
    tracemalloc.start()
    skipped = Skipped()
    (source,) = find_sources([str(path)], skipped)
    assert list(Reader(source, skipped=skipped)) == []
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert skipped.counts == {"document_too_large": 1}
    assert peak < 200_000_000
