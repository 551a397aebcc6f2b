"""Every kind of input is read, in one order, and what cannot be read is counted."""

import gzip
import json
import os
from itertools import pairwise
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenization.command_line import TokenizationError
from tokenization.documents import Reader
from tokenization.lines import split_lines
from tokenization.records import Skipped, Span
from tokenization.sources import SourceFile, find_sources


def read(*inputs: Path | str) -> tuple[list[str], dict[str, int]]:
    skipped = Skipped()
    sources = find_sources([str(item) for item in inputs], skipped)
    return [document.text for source in sources for document in Reader(source, skipped=skipped)], dict(skipped.counts)


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def write_all_formats(folder: Path, texts: list[str]) -> dict[str, Path]:
    paths = {name: folder / f"corpus{name}" for name in (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")}
    paths[".jsonl"].write_bytes(jsonl(texts))
    paths[".jsonl.gz"].write_bytes(gzip.compress(jsonl(texts)))
    paths[".jsonl.zst"].write_bytes(zstandard.compress(jsonl(texts)))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), paths[".parquet"], row_group_size=7)
    return paths


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_every_format_gives_the_same_documents(tmp_path, texts, suffix):
    assert read(write_all_formats(tmp_path, texts)[suffix]) == (texts, {})


def test_rows_count_the_lines_of_the_file_so_that_a_document_can_be_found_again(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\nnot json\n{"text": "three"}\n')
    (source,) = find_sources([str(path)], Skipped())
    assert [document.row for document in Reader(source, skipped=Skipped())] == [0, 2]


@settings(max_examples=50)
@given(
    lines=st.lists(st.binary(max_size=12).map(lambda line: line.replace(b"\n", b"")), max_size=8),
    block_bytes=st.integers(1, 9),
)
def test_lines_do_not_depend_on_where_blocks_end(lines, block_bytes):
    data = b"\n".join(lines)
    blocks = (data[start : start + block_bytes] for start in range(0, len(data), block_bytes))
    found = list(split_lines(blocks, 1_000, at_start=False))
    expected = data.split(b"\n")
    assert [line for line, _ in found] == (expected[:-1] if not expected[-1] else expected)
    assert sum(length for _, length in found) == len(data)


def test_files_of_several_gzip_members_and_zstd_frames_are_read_to_the_end(tmp_path, texts):
    for suffix, compress in ((".gz", gzip.compress), (".zst", zstandard.compress)):
        path = tmp_path / f"a.jsonl{suffix}"
        path.write_bytes(compress(jsonl(texts[:30])) + compress(jsonl(texts[30:])))
        assert read(path) == (texts, {})


@settings(max_examples=60)
@given(
    lines=st.lists(st.sampled_from(["", "x", "\n", "longer text", "é" * 30]), max_size=12),
    cuts=st.lists(st.integers(0, 400), max_size=4),
    ends_with_line_feed=st.booleans(),
)
def test_byte_spans_of_a_jsonl_give_every_line_once(tmp_path_factory, lines, cuts, ends_with_line_feed):
    data = b"\n".join(json.dumps({"text": f"{i} {line}"}, ensure_ascii=False).encode() for i, line in enumerate(lines))
    data += b"\n" * (ends_with_line_feed and bool(data))
    path = tmp_path_factory.mktemp("spans") / "a.jsonl"
    path.write_bytes(data)
    source = SourceFile(str(path), ".jsonl", len(data))
    ends = sorted({0, len(data), *(min(cut, len(data)) for cut in cuts)})
    texts, rows = [], 0
    for start, stop in pairwise(ends):
        reader = Reader(source, Span(start, stop), skipped=Skipped())
        found = list(reader)
        assert [document.row for document in found] == list(range(len(found)))
        texts += [document.text for document in found]
        rows += reader.rows
    assert texts == [f"{i} {line}" for i, line in enumerate(lines)]
    assert rows == len(lines)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.zst", ".parquet", ".txt"])
def test_documents_above_the_limit_are_counted_and_the_rest_is_read(tmp_path, suffix):
    texts = ["small", "large " * 2_000, "small again"]
    if suffix == ".txt":
        paths = [tmp_path / f"{number}.txt" for number in range(3)]
        for path, text in zip(paths, texts, strict=True):
            path.write_text(text)
    else:
        paths = [write_all_formats(tmp_path, texts)[suffix]]
    skipped, found = Skipped(), []
    for source in find_sources([str(path) for path in paths], skipped):
        found += [document.text for document in Reader(source, skipped=skipped, max_bytes=10_000)]
    assert (found, dict(skipped.counts)) == (["small", "small again"], {"document_too_large": 1})


def test_a_damaged_row_group_costs_itself_alone(tmp_path):
    texts = [f"{number} {'text ' * 200}" for number in range(40)]
    path = tmp_path / "a.parquet"
    options = {"row_group_size": 10, "use_dictionary": False, "write_page_checksum": True}
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, **options)
    chunk = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    data[chunk.data_page_offset + chunk.total_compressed_size - 10] ^= 1
    path.write_bytes(data)
    listed = []
    skipped = Skipped(list_rejected=listed.append)
    (source,) = find_sources([str(path)], skipped)
    assert [document.text for document in Reader(source, skipped=skipped)] == texts[:10] + texts[20:]
    assert skipped.counts == {"broken_rows": 10}
    assert (listed[0].row, listed[0].rows, listed[0].source) == (10, 10, str(path))


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".parquet"])
@pytest.mark.parametrize("damage", ["cut", "garbage", "empty"])
def test_a_broken_file_is_counted_and_the_next_one_is_read(tmp_path, texts, suffix, damage):
    path = write_all_formats(tmp_path, texts)[suffix]
    data = path.read_bytes()
    path.write_bytes({"cut": data[: len(data) // 2], "garbage": b"garbage" * 9, "empty": b""}[damage])
    good = tmp_path / "good.txt"
    good.write_text("a good text")
    documents, skipped = read(path, good)
    assert documents[-1] == "a good text"
    assert documents[:-1] == texts[: len(documents) - 1]
    # an empty file is a valid, empty .jsonl.gz or .jsonl.zst
    assert skipped == ({} if damage == "empty" and suffix != ".parquet" else {"broken_file": 1})


def test_unusable_records_are_counted_by_kind_and_the_rest_is_read(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [
        *(b'{"text": "good"}', b'{"text": "\xff"}', b'{"text": "\\ud800"}', b'{"text": ""}', b'{"text": " \\n\\t"}'),
        *(b'{"text": null}', b'{"other": 1}', b'{"text": 3}', b"{broken", b'["text"]', b"[" * 100_000, b""),
        *(b"\r", b'{"text": "a\\u0000b"}', b'{"text": "last"}'),
    ]
    path.write_bytes(b"\n".join(lines))
    assert read(path) == (
        ["good", "last"],
        {
            "invalid_utf8": 2,
            "empty_text": 2,
            "missing_text": 2,
            "text_not_string": 1,
            "bad_json": 3,
            "null_character": 1,
        },
    )


def test_one_parquet_value_that_is_not_utf8_costs_one_document(tmp_path):
    path = tmp_path / "a.parquet"
    binary = pyarrow.array([b"good", b"\xff\xfe", None, b" ", b"last"])
    strings = pyarrow.StringArray.from_buffers(5, binary.buffers()[1], binary.buffers()[2], binary.buffers()[0])
    pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2, 3, 4, 5], "text": strings}), path)
    assert read(path) == (["good", "last"], {"invalid_utf8": 1, "missing_text": 1, "empty_text": 1})


@pytest.mark.parametrize("kind", ["dictionary", "large_string", "string_view", "binary"])
def test_parquet_text_is_read_whatever_arrow_type_it_has(tmp_path, kind):
    types = {"dictionary": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()), "binary": pyarrow.binary()}
    column_type = types.get(kind) or getattr(pyarrow, kind)()
    column = pyarrow.array(["one", "two", "one"]).cast(column_type)
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == (["one", "two", "one"], {})


def test_parquet_without_texts_is_counted(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"content": ["a", "b"]}), tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2, 3]}), tmp_path / "b.parquet")
    assert read(tmp_path) == ([], {"missing_text": 2, "text_not_string": 3})


def test_text_files_that_are_not_utf8_or_empty_are_counted(tmp_path):
    for name, data in {"a.txt": b"\xffno", "b.md": b"", "c.txt": b" \n", "d.md": "\ufeffé\r\n".encode()}.items():
        (tmp_path / name).write_bytes(data)
    assert read(tmp_path) == (["é\r\n"], {"invalid_utf8": 1, "empty_text": 2})


def test_a_folder_is_read_in_sorted_order_with_what_lies_below(tmp_path):
    for name in ("b.txt", "a/z.md", "a/b/c.TXT", "c/a.txt", ".hidden/x.txt", ".y.txt", "a/picture.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read(tmp_path)[0] == ["a/b/c.TXT", "a/z.md", "b.txt", "c/a.txt"]


def test_links_are_followed_once_and_dead_ones_counted(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("a")
    (tmp_path / "in" / "up").symlink_to(tmp_path)
    (tmp_path / "z.txt").symlink_to(tmp_path / "in" / "a.txt")
    (tmp_path / "dead.txt").symlink_to(tmp_path / "nowhere")
    assert read(tmp_path) == (["a"], {"unreadable_file": 1, "repeated_file": 1})


def test_a_file_that_vanishes_while_reading_is_counted(tmp_path):
    skipped = Skipped()
    assert list(Reader(SourceFile(str(tmp_path / "gone.txt"), ".txt", 1), skipped=skipped)) == []
    assert skipped.counts == {"unreadable_file": 1}


def test_stdlib_means_the_sources_of_the_running_python_without_its_tests():
    paths = [source.path for source in find_sources(["stdlib"], Skipped())]
    paths = [Path(path) for path in paths]
    assert any(path.name == "argparse.py" for path in paths)
    assert not {"site-packages", "test", "tests", "__pycache__"} & {part for path in paths for part in path.parts}
    assert paths == sorted(paths, key=lambda path: path.parts)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("nowhere", "no such file"), ("a.pdf", "not read"), ("folder", "no readable file"), (None, "empty")],
)
def test_unusable_inputs_are_refused_by_name(tmp_path, name, sentence):
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    (tmp_path / "folder").mkdir()
    with pytest.raises(TokenizationError, match=sentence) as fault:
        find_sources([str(tmp_path / name)] if name else [], Skipped())
    assert name is None or name in str(fault.value)


def test_what_is_not_read_in_a_folder_is_counted_by_its_suffix_and_compressed_json_is_lines(tmp_path, texts):
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(jsonl(texts[:2])))
    (tmp_path / "b.json").write_bytes(jsonl(texts))
    (tmp_path / "c.PDF").touch()
    (tmp_path / os.fsdecode(b"d\xff.txt")).write_text("a name that is no UTF-8")
    (tmp_path / "e.txt").write_text("last")
    (tmp_path / "shards").mkdir()
    for name in ("plan.json", "tokenizer.model", "rejected.jsonl"):
        (tmp_path / "shards" / name).write_text("{}")
    counted = {"other_type.json": 1, "other_type.pdf": 1, "unreadable_file": 1, "shard_folder": 1}
    assert read(tmp_path) == ([*texts[:2], "last"], counted)
    with pytest.raises(TokenizationError, match="shards: holds shards, not text"):
        find_sources([str(tmp_path / "shards")], Skipped())
    with pytest.raises(TokenizationError, match=r"d\\xff.txt: its name is not UTF-8; rename it"):
        find_sources([os.fsdecode(os.fsencode(tmp_path) + b"/d\xff.txt")], Skipped())


def test_a_zstandard_frame_may_look_back_as_far_as_the_format_can(tmp_path, texts):
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=31)
    frame = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "a.jsonl.zst").write_bytes(frame.compress(jsonl(texts)) + frame.flush())
    assert read(tmp_path) == (texts, {})


def test_columns_and_fields_that_cannot_be_meant_cost_their_file_or_nothing(tmp_path):
    column = pyarrow.array(["one", "two"])
    for name, names in (("a", ["text", "text"]), ("b", ["score", "score", "text"]), ("c", ["content", "url"])):
        table = pyarrow.Table.from_arrays([column] * len(names), names)
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
    long = b"9" * 5_000
    (tmp_path / "d.jsonl").write_bytes(b'{"text": "good", "n": ' + long + b'}\n{"content": "none", "id": 1}\n')
    listed = []
    skipped, found = Skipped(list_rejected=listed.append), []
    for source in find_sources([str(tmp_path)], skipped):
        reader = Reader(source, skipped=skipped)
        found += [document.text for document in reader]
    assert found == ["one", "two", "good"]
    assert skipped.counts == {"broken_file": 1, "missing_text": 3}
    details = [rejected.detail for rejected in listed]
    assert details == [
        "two of its columns are called text; rename one",
        "the columns are content, url",
        "the fields are content, id",
    ]
