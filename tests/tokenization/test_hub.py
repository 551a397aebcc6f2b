"""Datasets by name: files pinned by `datasets`, reads retried with back-off, restarts without asking again.

A folder laid out like a dataset of the hub stands in for it, and a file system that fails for the network.
"""

import io
import json
from pathlib import Path

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from fsspec.implementations.local import LocalFileSystem

import tokenization.remote
import tokenization.sources
from tokenization.command_line import TokenizationError
from tokenization.encode import encode
from tokenization.manifest import Manifest
from tokenization.remote import open_source, with_retries
from tokenization.trace import trace

from .conftest import encode_settings, hashes

CARD = """---
configs:
- config_name: sample-10BT
  data_files:
  - split: train
    path: sample/10BT/*
---
"""


class FlakyFileSystem(LocalFileSystem):
    """Local files behind flaky://, where every third read fails, and all of them while `down`."""

    protocol = "flaky"
    reads = 0
    down = False

    @classmethod
    def _strip_protocol(cls, path):
        return LocalFileSystem._strip_protocol(path.removeprefix("flaky://"))

    def _open(self, path, mode="rb", **_):
        return FlakyFile(path)


class FlakyFile(io.FileIO):
    @property
    def size(self):
        return Path(self.name).stat().st_size

    def read(self, count=-1):
        FlakyFileSystem.reads += 1
        if FlakyFileSystem.down or FlakyFileSystem.reads % 3 == 0:
            raise ConnectionError("the network is away")
        return super().read(count if FlakyFileSystem.reads % 5 else min(count, 7))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, texts) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "fineweb-edu"
    (folder / "sample" / "10BT").mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    for number in range(3):
        some = texts[number * 20 : number * 20 + 20]
        columns = {
            "text": some,
            "id": [f"<urn:uuid:{number}-{row}>" for row in range(20)],
            "url": [f"https://example.org/{number}/{row}" for row in range(20)],
            "dump": ["CC-MAIN-2024-10"] * 20,
            "score": [3.5] * 20,
            "token_count": [9] * 20,
        }
        path = folder / "sample" / "10BT" / f"{number:03d}_00000.parquet"
        pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=6)
    return folder


@pytest.fixture
def flaky(monkeypatch):
    """The same files through the failing network; the waits that were asked for."""
    fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
    monkeypatch.setattr(FlakyFileSystem, "reads", 0)
    monkeypatch.setattr(FlakyFileSystem, "down", False)
    data_files = tokenization.sources._data_files

    def addresses(wanted):
        return {split: [f"flaky://{path}" for path in paths] for split, paths in data_files(wanted).items()}

    monkeypatch.setattr(tokenization.sources, "_data_files", addresses)
    waits: list[float] = []
    monkeypatch.setattr(tokenization.remote.time, "sleep", waits.append)
    return waits


def settings(dataset, tokenizer, output, **changes):
    wanted = {"input": (), "dataset": str(dataset), "name": "sample-10BT", "unit_mb": 0.001, **changes}
    return encode_settings(dataset, tokenizer, output, **wanted)


def test_a_dataset_gives_the_shards_of_its_files(tmp_path, dataset, tokenizer):
    encode(settings(dataset, tokenizer, tmp_path / "named"))
    encode(encode_settings(dataset / "sample", tokenizer, tmp_path / "files"))
    named, files = hashes(tmp_path / "named"), hashes(tmp_path / "files")
    assert {name for name in named if named[name] != files[name]} == {"plan.json", "manifest.json"}
    found = trace(tmp_path / "named" / "train", 0)
    assert found.fields["dump"] == "CC-MAIN-2024-10"
    assert found.fields["url"].startswith("https://example.org/")


def test_a_network_that_fails_changes_nothing_but_the_time(tmp_path, dataset, tokenizer, flaky):
    encode(settings(dataset, tokenizer, tmp_path / "flaky"))
    assert len(flaky) > 10
    assert set(flaky) <= {1.0, 2.0, 4.0}
    encode(encode_settings(dataset / "sample", tokenizer, tmp_path / "files"))
    for name in ("train.bin", "train.idx", "train.rows", "heldout.bin", "rejected.jsonl"):
        assert (tmp_path / "flaky" / name).read_bytes() == (tmp_path / "files" / name).read_bytes()
    (source, *_) = Manifest.load(tmp_path / "flaky").sources
    assert source.path.startswith("flaky://")
    assert trace(tmp_path / "flaky" / "train", 5).source.startswith("flaky://")


def test_a_network_that_stays_away_stops_the_run_and_the_next_goes_on(tmp_path, dataset, tokenizer, flaky, monkeypatch):
    done = []
    encode_span = tokenization.units.UnitEncoder._encode_span

    def then_down(self, *arguments):
        FlakyFileSystem.down = len(done) == 2
        encode_span(self, *arguments)
        done.append(arguments)

    monkeypatch.setattr(tokenization.units.UnitEncoder, "_encode_span", then_down)
    with pytest.raises(TokenizationError, match=r"flaky://.*cannot be read after 10 attempts \(the network is away\)"):
        encode(settings(dataset, tokenizer, tmp_path / "out"))
    assert flaky[-9:] == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert len(list((tmp_path / "out/work/units").glob("*.json"))) == 2
    FlakyFileSystem.down = False
    # The names are not looked up again: the plan holds the files of the revision it began with.
    monkeypatch.setattr(tokenization.sources, "_data_files", lambda wanted: pytest.fail("asked again"))
    monkeypatch.setattr(tokenization.units.UnitEncoder, "_encode_span", encode_span)
    encode(settings(dataset, tokenizer, tmp_path / "out"))
    encode(encode_settings(dataset / "sample", tokenizer, tmp_path / "files"))
    assert (tmp_path / "out/train.bin").read_bytes() == (tmp_path / "files/train.bin").read_bytes()


def test_reads_at_any_place_give_the_bytes_of_the_file(tmp_path, flaky):
    data = bytes(range(256)) * 40
    (tmp_path / "a").write_bytes(data)
    with open_source(f"flaky://{tmp_path}/a") as file:
        assert file.read() == data
        for place, count in ((300, 10), (0, 1), (10_000, 999), (10_240, 5)):
            file.seek(place)
            assert file.read(count) == data[place : place + count]
        assert file.seek(-3, io.SEEK_END) == len(data) - 3
        assert file.read() == data[-3:]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"name": "sample-9BT"}, "BuilderConfig 'sample-9BT' not found. Available: .*sample-10BT.*check --name"),
        ({"split": "test"}, "--split test: .* has train; give one of them"),
    ],
)
def test_what_is_not_in_the_dataset_is_told(tmp_path, dataset, tokenizer, changes, sentence):
    with pytest.raises(TokenizationError, match=sentence):
        encode(settings(dataset, tokenizer, tmp_path / "out", **changes))


def test_what_does_not_exist_is_not_tried_again(monkeypatch):
    monkeypatch.setattr(tokenization.remote.time, "sleep", lambda seconds: pytest.fail("waited"))

    def missing():
        raise FileNotFoundError("nowhere")

    with pytest.raises(TokenizationError, match="the dataset: nowhere; check its name"):
        with_retries("the dataset", missing)
    with pytest.raises(ZeroDivisionError):
        with_retries("a bug of ours", lambda: 1 // 0)


def test_the_plan_names_every_file_and_row(tmp_path, dataset, tokenizer):
    encode(settings(dataset, tokenizer, tmp_path / "out"))
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    spans = [(span["source"], span["start"], span["stop"]) for unit in plan["units"] for span in unit["spans"]]
    assert spans == [(source, start, min(start + 6, 20)) for source in range(3) for start in (0, 6, 12, 18)]
