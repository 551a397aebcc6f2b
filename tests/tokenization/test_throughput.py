"""The measurement compares the same work, and says what it measured."""

import pytest

from tokenization.duplicates import find_duplicates
from tokenization.progress import Progress
from tokenization.throughput import measure_throughput
from tokenization.units import DOCUMENT


def test_the_measurement_counts_the_same_tokens_on_both_sides(tmp_path, corpus, tokenizer):
    measured = measure_throughput((str(corpus),), tokenizer, 1, tmp_path, rounds=1)
    assert measured.ratio == pytest.approx(measured.encode / measured.sentencepiece)
    assert measured.tokens > 1_000
    assert measured.text_bytes < corpus.stat().st_size
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("digests_at_once", [1, 7, 1_000])
def test_duplicates_do_not_depend_on_how_many_hashes_are_held(digests_at_once):
    import numpy

    generator = numpy.random.default_rng(3)
    tables = [numpy.zeros(length, DOCUMENT) for length in (5, 0, 30, 25)]
    seen, expected = set(), []
    for table in tables:
        table["digest_high"] = generator.integers(0, 6, len(table))
        table["digest_low"] = generator.integers(0, 6, len(table))
        for row in table:
            digest = (int(row["digest_high"]), int(row["digest_low"]))
            expected.append(digest in seen)
            seen.add(digest)
    found = find_duplicates([len(table) for table in tables], lambda number: tables[number], digests_at_once)
    assert found.tolist() == expected


def test_without_a_terminal_progress_is_a_line_a_minute(capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("tokenization.progress.time.monotonic", lambda: clock[0])
    with Progress("encoded", total_bytes=1_000, done_bytes=400) as progress:
        for second in range(1, 181):
            clock[0] = float(second)
            progress.advance(2, 50)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "52% encoded, 3,000 tokens, 50 tokens/s, 240 s left"
    assert len(lines) == 3
