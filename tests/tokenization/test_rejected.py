"""Bad data never stops a run and never vanishes; filters are counted apart; too much of it fails at the end."""

import gzip
import json
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest

from tokenization.command_line import TokenizationError
from tokenization.encode import encode
from tokenization.manifest import Manifest
from tokenization.trace import trace
from tokenization.verify import verify

from .conftest import encode_settings, make_texts, write_jsonl


@pytest.fixture
def bad_corpus(tmp_path, texts):
    """Every kind of damage, the file and the rows it must be reported for."""
    folder = tmp_path / "in"
    folder.mkdir()
    lines = write_jsonl(folder / "a.jsonl", texts).read_bytes().splitlines()
    bad = [
        *(b'{"text": "\xff"}', b"not json", b'{"text": null}', b'{"no": 1}', b'{"text": ["a"]}', b'{"text": " "}'),
        *(b'{"text": "a\\u0000b"}', b"", json.dumps({"text": "long " * 4_000}).encode()),
    ]
    (folder / "a.jsonl").write_bytes(b"\n".join([*lines[:30], *bad, *lines[30:]]) + b"\n")
    data = gzip.compress(b"".join(line + b"\n" for line in lines))
    (folder / "b.jsonl.gz").write_bytes(data[: len(data) // 2])
    (folder / "c.parquet").write_bytes(b"PAR1 is all there is")
    (folder / "d.txt").write_bytes(b"\xff\xfe")
    (folder / "e.txt").symlink_to(folder / "nowhere")
    pyarrow.parquet.write_table(pyarrow.table({"content": texts[:3]}), folder / "f.parquet")
    return folder


def test_every_kind_is_counted_and_listed_with_its_place(tmp_path, bad_corpus, tokenizer, capsys):
    output = tmp_path / "out"
    wanted = {"max_rejected": "100%", "max_document_mb": 0.01}
    manifest = encode(encode_settings(bad_corpus, tokenizer, output, **wanted))
    skipped = dict(manifest.skipped)
    assert skipped.pop("duplicate") > 0  # what of b.jsonl.gz could be read came before
    texts = {"invalid_utf8": 2, "missing_text": 5, "text_not_string": 1, "empty_text": 1, "null_character": 1}
    assert skipped == texts | {"bad_json": 1, "document_too_large": 1, "broken_file": 2, "unreadable_file": 1}
    listed = [json.loads(line) for line in (output / "rejected.jsonl").read_text().splitlines()]
    counted = Counter()
    for one in listed:
        counted[one["reason"]] += one["rows"]
    assert counted == skipped
    places = {(one["source"].rpartition("/")[2], one["row"], one["reason"]) for one in listed}
    assert places >= {
        *(("a.jsonl", 30, "invalid_utf8"), ("a.jsonl", 31, "bad_json"), ("a.jsonl", 32, "missing_text")),
        *(("a.jsonl", 36, "null_character"), ("a.jsonl", 38, "document_too_large"), ("d.txt", 0, "invalid_utf8")),
        *(("c.parquet", None, "broken_file"), ("e.txt", None, "unreadable_file"), ("f.parquet", 0, "missing_text")),
    }
    assert all(one["detail"] for one in listed if one["reason"] not in {"missing_text", "empty_text"})
    summary = capsys.readouterr().out
    assert all(f"{count:,} {kind}" in summary for kind, count in skipped.items())
    verify(output)
    assert trace(output / "train", 0).text in make_texts(60)


def test_too_much_bad_data_fails_at_the_end_and_the_work_is_kept(tmp_path, fails, texts, tokenizer, run):
    corpus = write_jsonl(tmp_path / "a.jsonl", texts)
    with corpus.open("a") as file:
        file.write("not json\nnot json\n")
    arguments = ["--input", corpus, "--tokenizer", tokenizer, "--output", tmp_path / "out", "--workers", 1]
    sentence = fails("encode", *arguments)
    assert "2 of 62 documents are bad (3.2%), more than --max-rejected 1.00% (2 bad_json" in sentence
    assert str(tmp_path / "out/rejected.jsonl") in sentence
    assert len((tmp_path / "out/rejected.jsonl").read_text().splitlines()) == 2
    assert not (tmp_path / "out/manifest.json").exists()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/work/units").glob("*.json")}
    assert "going on, 1 of 1 units" in run("encode", *arguments, "--max-rejected", "5%").stdout
    assert before
    assert Manifest.load(tmp_path / "out").skipped == {"bad_json": 2}


def test_a_share_of_broken_files_fails_too(tmp_path, texts, tokenizer):
    write_jsonl(tmp_path / "in.jsonl", texts)
    (tmp_path / "b.parquet").write_bytes(b"no")
    with pytest.raises(TokenizationError, match=r"1 of 2 files are bad .*broken_file"):
        encode(encode_settings(tmp_path, tokenizer, tmp_path / "out", max_rejected="40%"))


def test_filters_leave_out_what_was_asked_for_and_nothing_else(tmp_path, tokenizer):
    texts = [f"{number} {'x ' * number}" for number in range(1, 61)]
    languages = ["en", "de", "fr"] * 20
    scores = [number / 10 for number in range(60)]
    table = pyarrow.table({"text": texts, "language": languages, "score": scores, "id": [str(n) for n in range(60)]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=9)
    rows = [{"text": t, "language": lang, "score": s} for t, lang, s in zip(texts, languages, scores, strict=True)]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    wanted = {"min_score": 1.0, "languages": ("en", "fr"), "min_characters": 30, "max_characters": 100}
    counts = []
    for name in ("a.parquet", "b.jsonl"):
        manifest = encode(encode_settings(tmp_path / name, tokenizer, tmp_path / name[0], **wanted))
        counts.append((manifest.skipped, sum(split.documents for split in manifest.splits.values())))
    assert counts[0] == counts[1]
    kept = [
        text
        for text, language, score in zip(texts, languages, scores, strict=True)
        if score >= 1 and language != "de" and 30 <= len(text) <= 100
    ]
    assert counts[0][1] == len(kept) > 5
    assert counts[0][0]["filtered_score"] == 10
    assert sum(counts[0][0].values()) + len(kept) == 60


@pytest.mark.parametrize("field", ["score", "language"])
@pytest.mark.parametrize("value", [None, "high", [1], True])
def test_a_filter_on_a_field_that_is_not_there_is_bad_data(tmp_path, tokenizer, texts, field, value):
    rows = [{"text": text, "score": 1.0, "language": "en"} for text in texts] + [{"text": "no", field: value}]
    rows[-1] = {"score": 1.0, "language": "en"} | rows[-1]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    wanted = {"min_score": 1.0, "languages": ("en",), "max_rejected": "5%"}
    manifest = encode(encode_settings(tmp_path / "a.jsonl", tokenizer, tmp_path / "out", **wanted))
    other = {"filtered_language": 1} if (field, value) == ("language", "high") else {f"missing_{field}": 1}
    assert manifest.skipped == other
