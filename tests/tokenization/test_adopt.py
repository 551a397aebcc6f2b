"""Megatron's own shards are trained on where they lie: nothing of them is copied but what is held out."""

import itertools
import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
import torch
import torch.distributed as dist

from pretrain.data.batches import Samples
from titans_mcore.io import sha256_of
from tokenization.adopt import AdoptSettings, adopt
from tokenization.command_line import TokenizationError
from tokenization.manifest import HELDOUT, TRAIN, Manifest, ManifestError
from tokenization.shards import import_indexed_dataset
from tokenization.tokenizer import load_tokenizer
from tokenization.trace import trace
from tokenization.verify import verify

VOCAB_SIZE = 400

Documents = list[list[list[int]]]
"""Tokens of the sequences of documents."""


def make_documents(count: int, seed: int = 0, sequences: int = 1) -> Documents:
    """Documents without start and end tokens, as preprocess_data.py writes them by default."""
    random = numpy.random.default_rng(seed)
    return [
        [random.integers(3, VOCAB_SIZE, int(random.integers(2, 30))).tolist() for _ in range(sequences)]
        for _ in range(count)
    ]


def write_pair(prefix: Path, documents: Documents, dtype: type = numpy.int32) -> Path:
    """Written by Megatron-core's own builder."""
    builder = import_indexed_dataset().IndexedDatasetBuilder(f"{prefix}.bin", dtype)
    for sequences in documents:
        builder.add_document([token for one in sequences for token in one], [len(one) for one in sequences])
    builder.finalize(f"{prefix}.idx")
    return prefix


def joined(documents: Documents) -> list[tuple[int, ...]]:
    return [tuple(token for one in sequences for token in one) for sequences in documents]


def read(folder: Path, prefix: str) -> list[tuple[int, ...]]:
    dataset = import_indexed_dataset().IndexedDataset(str(folder / prefix))
    return [tuple(dataset[i].tolist()) for i in range(len(dataset))]


def settings_of(prefixes: list[Path], tokenizer: Path, output: Path, **changes) -> AdoptSettings:
    return AdoptSettings(
        prefix=tuple(prefixes), tokenizer=tokenizer, output=output, **{"workers": 1, "heldout_fraction": 0.2, **changes}
    )


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def pairs(tmp_path) -> tuple[list[Path], list[Documents]]:
    contents = [make_documents(30), make_documents(20, seed=1, sequences=3)]
    return [write_pair(tmp_path / f"part{i}", content) for i, content in enumerate(contents)], contents


@pytest.mark.parametrize("dtype", [numpy.int32, numpy.uint16])
@pytest.mark.parametrize("count", [1, 2])
def test_every_document_is_on_one_side_and_train_tokens_are_not_copied(tmp_path, tokenizer, dtype, count):
    contents = [make_documents(30), make_documents(20, seed=1, sequences=3)][:count]
    prefixes = [write_pair(tmp_path / f"part{i}", content, dtype) for i, content in enumerate(contents)]
    folder = tmp_path / "shards"
    manifest = adopt(settings_of(prefixes, tokenizer, folder))
    assert manifest == Manifest.load(folder)
    assert manifest.dtype == numpy.dtype(dtype).name
    train = [document for shard in manifest.splits[TRAIN].datasets for document in read(folder, shard.prefix)]
    heldout = read(folder, HELDOUT)
    everything = [document for content in contents for document in joined(content)]
    assert sorted(train + heldout) == sorted(everything)
    assert [document for document in everything if document not in heldout] == train  # in their order
    assert 0 < len(heldout) < len(everything) / 2
    for split, documents in ((TRAIN, train), (HELDOUT, heldout)):
        counted = manifest.splits[split].documents, manifest.splits[split].tokens
        assert counted == (len(documents), sum(map(len, documents)))
    links = [folder / f"{shard.prefix}.bin" for shard in manifest.splits[TRAIN].datasets]
    assert [link.resolve() for link in links] == [prefix.with_suffix(".bin") for prefix in prefixes]
    assert all(link.is_symlink() for link in links)
    counts = numpy.bincount([token for document in train for token in document])
    shares = counts[counts > 0] / counts.sum()
    assert manifest.unigram_entropy == pytest.approx(-(shares * numpy.log(shares)).sum(), abs=1e-12)


def test_verify_reads_adopted_shards_and_names_what_changed(tmp_path, tokenizer, pairs):
    prefixes, _ = pairs
    folder = tmp_path / "shards"
    manifest = adopt(settings_of(prefixes, tokenizer, folder))
    assert verify(folder) == manifest
    data = bytearray(prefixes[1].with_suffix(".bin").read_bytes())
    data[8] ^= 1
    prefixes[1].with_suffix(".bin").write_bytes(data)
    with pytest.raises(ManifestError, match=r"train-00001\.bin: damaged"):
        verify(folder)
    prefixes[1].with_suffix(".bin").unlink()
    with pytest.raises(ManifestError, match=r"train-00001\.bin: missing"):
        manifest.check_quick(folder)


def test_rows_say_where_documents_begin_though_no_token_does(tmp_path, tokenizer, pairs, one_process):
    prefixes, contents = pairs
    folder = tmp_path / "shards"
    manifest = adopt(settings_of(prefixes, tokenizer, folder))
    length = 64
    samples = Samples(
        manifest.train_prefixes(folder),
        tmp_path / "index",
        vocab_size=VOCAB_SIZE,
        sequence_length=length,
        seed=3,
        documents_apart=True,
    )
    documents = {document: None for content in contents for document in joined(content)}
    found = 0
    for index in range(samples.per_epoch):
        row = samples.micro_batch([index])
        starts = [] if row.starts is None else torch.nonzero(row.starts[0]).flatten().tolist()
        for start, stop in itertools.pairwise(starts):
            assert tuple(row.tokens[0, start:stop].tolist()) in documents
            found += 1
        if starts:  # the row's last document is a beginning of one
            last = tuple(row.tokens[0, starts[-1] :].tolist())
            assert any(document[: len(last)] == last for document in documents)
    assert found > 10


def test_a_token_leads_to_its_dataset_and_to_what_the_tokens_say(tmp_path, tokenizer):
    processor = load_tokenizer(tokenizer)
    texts = [f"the memory of {i} tells it" for i in range(12)]
    prefix = write_pair(tmp_path / "part", [[[*processor.encode(text), 2]] for text in texts])
    folder = tmp_path / "shards"
    adopt(settings_of([prefix], tokenizer, folder))
    for split in (TRAIN, HELDOUT):
        found = trace(folder / split, 3)
        assert found.source == f"{prefix}.bin"
        assert found.text == texts[found.row]


def test_a_token_beyond_the_vocabulary_names_its_document(tmp_path, tokenizer):
    documents = make_documents(9)
    documents[5][0][1] = VOCAB_SIZE
    prefix = write_pair(tmp_path / "part", documents)
    sentence = re.escape(f"{prefix}: document 5 (from 0) holds token 400 and the tokenizer has 400 pieces")
    with pytest.raises(TokenizationError, match=sentence):
        adopt(settings_of([prefix], tokenizer, tmp_path / "shards"))
    assert not (tmp_path / "shards").exists()


def test_a_vocabulary_of_another_kind_is_read_for_its_size(tmp_path, pairs, capsys):
    prefixes, _ = pairs
    pieces = {f"piece {i}": i for i in range(VOCAB_SIZE)}
    files = {"vocab.json": pieces, "tokenizer.json": {"model": {"vocab": pieces}, "added_tokens": [{"id": 401}]}}
    for (name, content), size in zip(files.items(), (400, 402), strict=True):
        (tmp_path / name).write_text(json.dumps(content))
        folder = tmp_path / f"with {name}"
        adopt(settings_of(prefixes, tmp_path / name, folder))
        assert "evaluations of text and the Hugging Face export" in capsys.readouterr().out
        manifest = verify(folder)
        assert manifest.tokenizer.vocab_size == size
        assert sha256_of(folder / "tokenizer.json") == manifest.tokenizer.sha256


def rewrite_index(prefix: Path, place: int, value: bytes) -> None:
    data = bytearray(prefix.with_suffix(".idx").read_bytes())
    data[place : place + len(value)] = value
    prefix.with_suffix(".idx").write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda prefix: prefix.with_suffix(".idx").unlink(), r"there is no part\.idx; give PATH of PATH\.bin"),
        (lambda prefix: prefix.with_suffix(".bin").write_bytes(b"12"), r"part\.bin: 2 bytes, its index says"),
        (lambda prefix: rewrite_index(prefix, 0, b"X"), r"part\.idx: Megatron-core cannot read it"),
        (lambda prefix: rewrite_index(prefix, 17, struct.pack("<B", 5)), r"part\.idx: holds int64 tokens"),
        (
            lambda prefix: rewrite_index(prefix, 34 + 9 * 4 + 8, struct.pack("<q", 4)),
            "do not follow one upon the other",
        ),
        (lambda prefix: write_pair(prefix, make_documents(1)), "--prefix: all text is one document"),
    ],
)
def test_what_cannot_be_adopted_is_said_in_a_sentence(tmp_path, tokenizer, damage, message):
    prefix = write_pair(tmp_path / "part", make_documents(9))
    damage(prefix)
    with pytest.raises(TokenizationError, match=message):
        adopt(settings_of([prefix], tokenizer, tmp_path / "shards"))
    assert not (tmp_path / "shards").exists()


def test_only_what_failed_makes_way(tmp_path, tokenizer, pairs):
    prefixes, _ = pairs
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "train.idx").write_bytes(b"what a killed command left")
    first = adopt(settings_of(prefixes, tokenizer, folder))
    with pytest.raises(TokenizationError, match="holds other shards"):
        adopt(settings_of(prefixes[:1], tokenizer, folder))
    assert verify(folder) == first
    adopt(settings_of(prefixes[:1], tokenizer, folder, overwrite=True))
    assert len(verify(folder).splits[TRAIN].datasets) == 1
    assert all(prefix.with_suffix(".bin").is_file() for prefix in prefixes)
    with pytest.raises(TokenizationError, match="give another folder"):
        adopt(settings_of(prefixes, tokenizer, prefixes[0].parent))
