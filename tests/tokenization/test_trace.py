"""From any token back to its document."""

import json
import random
import shlex
import subprocess
import sys

import numpy
import pyarrow
import pyarrow.parquet
import pytest

from tokenization.command_line import TokenizationError
from tokenization.encode import encode
from tokenization.shards import import_indexed_dataset
from tokenization.tokenizer import load_tokenizer
from tokenization.trace import main, trace

from .conftest import REPOSITORY, encode_settings, make_texts, write_jsonl


@pytest.fixture(scope="module")
def traced(tmp_path_factory, tokenizer):
    """Shards of four kinds of sources, with duplicates, bad lines and filtered documents among them."""
    folder = tmp_path_factory.mktemp("traced")
    texts = make_texts(120, seed=3)
    source = folder / "in"
    source.mkdir()
    lines = [json.dumps({"text": text, "url": f"https://example.org/{i}"}) for i, text in enumerate(texts[:40])]
    (source / "a.jsonl").write_text("\n".join([*lines[:9], "", "bad", lines[3], *lines[9:]]))
    table = pyarrow.table({"text": texts[40:80], "id": [f"id-{i}" for i in range(40)], "dump": ["CC-1"] * 40})
    pyarrow.parquet.write_table(table, source / "b.parquet", row_group_size=11)
    import zstandard

    compressed = write_jsonl(folder / "c", ["short", *texts[80:118]]).read_bytes()
    (source / "c.jsonl.zst").write_bytes(zstandard.compress(compressed))
    (source / "d.txt").write_text("\ufeff" + texts[118], newline="")
    (source / "e.md").write_text(texts[119], newline="")
    wanted = {"shard_tokens": 3_000, "min_characters": 20, "max_rejected": "2%"}
    return encode(encode_settings(source, tokenizer, folder / "out", **wanted)), folder / "out", texts


def test_random_tokens_lead_to_the_text_that_gives_them(traced, tokenizer):
    manifest, folder, texts = traced
    processor, generator = load_tokenizer(tokenizer), random.Random(5)
    sources = set()
    prefixes = [shard.prefix for split in manifest.splits.values() for shard in split.datasets]
    assert len(prefixes) > 3
    for prefix in prefixes:
        dataset = import_indexed_dataset().IndexedDataset(str(folder / prefix))
        tokens = numpy.fromfile(folder / f"{prefix}.bin", "uint16")
        for token in [0, len(tokens) - 1, *(generator.randrange(len(tokens)) for _ in range(12))]:
            found = trace(folder / prefix, token)
            expected = [1, *processor.encode(found.text), 2]
            assert dataset[found.document].tolist() == expected
            assert expected[found.token_in_document] == tokens[token]
            assert found.text in texts
            sources.add(found.source.rpartition("/")[2])
    assert sources >= {"a.jsonl", "b.parquet", "c.jsonl.zst"}


def test_every_document_of_every_kind_of_source_has_its_row(traced):
    manifest, folder, texts = traced
    found = {}
    for split in manifest.splits.values():
        for shard in split.datasets:
            dataset = import_indexed_dataset().IndexedDataset(str(folder / shard.prefix))
            for end in numpy.cumsum(dataset.sequence_lengths).tolist():
                one = trace(folder / f"{shard.prefix}.bin", end - 1)
                found[one.source.rpartition("/")[2], one.row] = one
    assert sorted(one.text for one in found.values()) == sorted(texts)
    assert found["a.jsonl", 12].text == texts[9]  # behind a blank, a bad and a repeated line
    assert found["a.jsonl", 12].fields == {"url": "https://example.org/9"}
    assert found["b.parquet", 25].text == texts[65]
    assert found["b.parquet", 25].fields == {"id": "id-25", "dump": "CC-1"}
    assert found["c.jsonl.zst", 1].text == texts[80]


def test_the_command_prints_source_row_and_text(traced, capsys):
    _, folder, _ = traced
    main(["--shard", str(folder / "train-00001"), "--token", "77"])
    found, printed = trace(folder / "train-00001", 77), capsys.readouterr().out
    assert f"source: {found.source}\nrow: {found.row}\n" in printed
    assert found.text in printed


def test_a_reader_that_has_enough_is_no_fault():
    script = "from tokenization.command_line import run_command; run_command(lambda: print('text' * 100_000))"
    command = f"{sys.executable} -c {shlex.quote(script)} | true"
    result = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_what_cannot_be_traced_is_told(tmp_path, tokenizer, texts):
    corpus = write_jsonl(tmp_path / "a.jsonl", texts)
    encode(encode_settings(corpus, tokenizer, tmp_path / "out"))
    for shard, token, sentence in [
        ("train-7", 0, "the manifest lists train, heldout"),
        ("train", 10**9, "the shard has the tokens 0 to"),
        ("train", -1, "the shard has the tokens 0 to"),
    ]:
        with pytest.raises(TokenizationError, match=sentence):
            trace(tmp_path / "out" / shard, token)
    write_jsonl(corpus, [f"{text}!" for text in texts])
    with pytest.raises(TokenizationError, match=r"a\.jsonl: row \d+ no longer gives these tokens"):
        trace(tmp_path / "out" / "train", 0)
    corpus.unlink()
    with pytest.raises(TokenizationError, match=r"a\.jsonl: cannot be read"):
        trace(tmp_path / "out" / "train", 0)
