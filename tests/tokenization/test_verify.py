"""Every way in which shards can differ from their manifest is named."""

import json
import os
import shutil
from pathlib import Path

import numpy
import pytest

from titans_mcore.io import from_json, sha256_of
from tokenization.encode import encode
from tokenization.manifest import FileInfo, Manifest, ManifestError, fingerprint_of
from tokenization.shards import import_indexed_dataset
from tokenization.train import TrainSettings, train
from tokenization.verify import verify

from .conftest import encode_settings


@pytest.fixture(scope="module")
def encoded(tmp_path_factory, corpus, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("encoded") / "shards"
    encode(encode_settings(corpus, tokenizer, folder, heldout_fraction=0.2))
    return folder


@pytest.fixture
def shards(encoded, tmp_path) -> Path:
    return Path(shutil.copytree(encoded, tmp_path / "shards"))


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def reseal(shards: Path, **changes) -> None:
    """Writes hashes, sizes and fingerprint that fit the files again, so that only the content can give them away."""
    record = json.loads((shards / "manifest.json").read_text()) | changes
    for split in record["splits"].values():
        for name, info in split["files"].items():
            info.update(bytes=(shards / name).stat().st_size, sha256=sha256_of(shards / name))
    manifest = from_json(Manifest, json.dumps(record), "manifest")
    record["fingerprint"] = fingerprint_of(manifest.tokenizer, manifest.splits)
    (shards / "manifest.json").write_text(json.dumps(record))


def test_good_shards_pass_and_the_command_says_so(run, shards):
    result = run("verify", shards)
    assert (result.returncode, result.stderr) == (0, "")
    assert f"{shards}: ok" in result.stdout


def test_the_command_names_the_file_and_ends_with_status_2(fails, shards):
    flip_bit(shards / "heldout.bin")
    assert "heldout.bin" in fails("verify", shards)
    with pytest.raises(ManifestError, match=r"manifest\.json: missing"):
        verify(shards / "nowhere")


@pytest.mark.parametrize("name", ["train.bin", "train.idx", "heldout.bin", "heldout.idx", "tokenizer.model"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_named(shards, name, damage):
    path = shards / name
    {"flip": flip_bit, "truncate": lambda path: os.truncate(path, 20), "remove": os.unlink}[damage](path)
    with pytest.raises(ManifestError, match=name.replace(".", r"\.")):
        verify(shards)
    if damage != "flip" or name == "tokenizer.model":
        with pytest.raises(ManifestError, match=name.replace(".", r"\.")):
            Manifest.load(shards).check_quick(shards)


def test_another_tokenizer_of_the_same_size_is_named(shards, corpus, tmp_path):
    other = tmp_path / "other.model"
    train(TrainSettings(input=(str(corpus),), output=other, vocab_size=400, sample_bytes=5_000))
    shutil.copy(other, shards / "tokenizer.model")
    with pytest.raises(ManifestError, match=r"tokenizer\.model: not the tokenizer"):
        verify(shards)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda text: text[: len(text) // 2], "no JSON"),
        (lambda text: "[]", "format version None"),
        (lambda text: text.replace('"format_version": 1', '"format_version": 2'), "format version 2"),
        (lambda text: text.replace('"dtype"', '"type"'), r"manifest\.dtype: Field required"),
        (
            lambda text: text.replace('"bos_id": 1', '"bos_id": "1"'),
            r"manifest\.tokenizer\.bos_id: Input should be a valid integer",
        ),
        (lambda text: text.replace('"heldout": {', '"other": {'), "splits are"),
        (lambda text: text.replace('"sha256": "', '"sha256": "0'), "fingerprint"),
    ],
)
def test_a_damaged_manifest_is_named(shards, damage, sentence):
    path = shards / "manifest.json"
    before = path.read_text()
    path.write_text(damage(before))
    assert path.read_text() != before
    with pytest.raises(ManifestError, match=sentence) as fault:
        Manifest.load(shards)
    assert isinstance(fault.value, ValueError)
    assert "manifest.json" in str(fault.value)


def test_a_manifest_comes_back_from_its_json(encoded, tmp_path):
    manifest = Manifest.load(encoded)
    (tmp_path / "manifest.json").write_text(manifest.to_json())
    assert Manifest.load(tmp_path) == manifest
    assert isinstance(manifest.splits["train"].files["train.bin"], FileInfo)


def test_a_manifest_without_what_later_versions_added_is_read(shards):
    record = json.loads((shards / "manifest.json").read_text())
    del record["records"]
    record["units"] = []  # which earlier versions had
    for split in record["splits"].values():
        del split["shards"]
    record["settings"] = {"seed": 0, "heldout_fraction": 0.2}
    (shards / "manifest.json").write_text(json.dumps(record))
    manifest = verify(shards)
    assert manifest.train_prefixes(shards) == [str(shards / "train")]


def test_a_token_beyond_the_vocabulary_is_found(shards):
    tokens = numpy.memmap(shards / "train.bin", dtype=numpy.uint16, mode="r+")
    tokens[5] = 400
    tokens.flush()
    reseal(shards)
    with pytest.raises(ManifestError, match=r"train\.bin: token 400 .* 400 pieces"):
        verify(shards)


def test_a_document_without_its_end_is_found(shards):
    tokens = numpy.memmap(shards / "heldout.bin", dtype=numpy.uint16, mode="r+")
    tokens[-1] = 7
    tokens.flush()
    reseal(shards)
    with pytest.raises(ManifestError, match=r"heldout\.bin: a document does not start with 1 and end with 2"):
        verify(shards)


def test_an_index_with_another_number_of_documents_is_found(shards):
    tokens = numpy.fromfile(shards / "train.bin", dtype=numpy.uint16)
    builder = import_indexed_dataset().IndexedDatasetBuilder(str(shards / "train.bin"), numpy.uint16)
    builder.add_document(tokens, [len(tokens)])
    builder.finalize(str(shards / "train.idx"))
    reseal(shards)
    with pytest.raises(ManifestError, match=r"train\.idx: lists 1 documents"):
        verify(shards)


# Megatron-core's reader, given up half-way, complains again when it is collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_index_that_is_no_index_is_found(shards):
    (shards / "train.idx").write_bytes(b"not an index at all" * 9)
    reseal(shards)
    with pytest.raises(ManifestError, match=r"train\.idx: Megatron-core cannot read it"):
        verify(shards)


def test_another_token_type_and_another_entropy_are_found(shards):
    reseal(shards, dtype="int32")
    with pytest.raises(ManifestError, match="holds uint16 tokens"):
        verify(shards)
    reseal(shards, dtype="uint16", unigram_entropy=1.5)
    with pytest.raises(ManifestError, match="unigram_entropy"):
        verify(shards)


def test_each_of_several_damages_is_named(tmp_path, corpus, tokenizer, run):
    encode(encode_settings(corpus, tokenizer, tmp_path / "out", shard_tokens=1_000))
    folder = tmp_path / "out"
    flip_bit(folder / "train-00000.bin")
    (folder / "train-00001.bin").unlink()
    os.truncate(folder / "train-00002.idx", 30)
    flip_bit(folder / "train-00003.rows")
    (folder / "rejected.jsonl").write_text("{}")
    flip_bit(folder / "plan.json")
    shutil.copy(folder / "manifest.json", folder / "tokenizer.model")
    result = run("verify", folder, "--workers", 2)
    assert result.returncode == 2
    for name, damage in [
        ("train-00000.bin", "damaged, its SHA-256"),
        ("train-00001.bin", "missing"),
        ("train-00002.idx", "30 bytes where"),
        ("train-00003.rows", "damaged, its SHA-256"),
        ("rejected.jsonl", "2 bytes where"),
        ("plan.json", "damaged, its SHA-256"),
        ("tokenizer.model", "not the tokenizer of these shards"),
    ]:
        assert any(f"{folder / name}: {damage}" in line for line in result.stderr.splitlines()), name
    assert "train-00004" not in result.stderr
