"""What a longer past costs: constant for a constant state, growing for one that keeps all keys."""

import json

import pytest

from evals.command_line import EvaluationError
from evals.efficiency import ContextSettings
from evals.efficiency.context import compare, measure

from ..matrices import ONE_OF_A_KIND

LENGTHS = (128, 512, 2_048)


def asked(tmp_path, *runs, **more):
    return ContextSettings(
        checkpoint=runs, json=tmp_path / "context.json", lengths=LENGTHS, piece=128, decode_tokens=4, threads=1, **more
    )


@pytest.mark.parametrize("variant", ONE_OF_A_KIND)
def test_the_state_of_a_model_does_not_grow_with_what_it_has_read(make_run, tmp_path, variant):
    run = make_run(variant)
    shown = measure(asked(tmp_path, run))
    rows = json.loads((tmp_path / "context.json").read_text())["rows"]
    assert [row["length"] for row in rows] == list(LENGTHS)
    assert {row["model"] for row in rows} == {str(run)}
    assert len({row["state_bytes"] for row in rows}) == 1
    assert all(row["decode_ms"] > 0 and row["prefill_tokens_per_second"] > 0 and row["peak_bytes"] > 0 for row in rows)
    assert "2,048 tokens over 128: decoding" in shown


def test_full_attention_is_measured_until_its_keys_do_not_fit(make_run, tmp_path):
    run = make_run("transformer", window=0)
    # Two blocks keep 2 x 32 numbers of 4 bytes a token each: 512 bytes.
    shown = measure(asked(tmp_path, run, limit_gigabytes=0.0005))
    rows = json.loads((tmp_path / "context.json").read_text())["rows"]
    assert [row.get("state_bytes") for row in rows[:2]] == [512 * (n + 14) for n in LENGTHS[:2]]
    assert rows[2]["not_run"].startswith("its state takes more than")
    assert "peak_bytes" not in rows[2]
    assert "not run" in shown


def test_memory_is_compared_from_64k_tokens_on():
    rows = [
        {"length": length, "decode_ms": ms, "prefill_tokens_per_second": 100.0, "peak_bytes": size}
        for length, ms, size in ((2_048, 1.0, 10), (65_536, 1.0, 40), (2_097_152, 1.5, 44))
    ]
    found = compare([*rows, {"length": 4_194_304, "not_run": "too long"}])
    assert found["decode_ms"] == 1.5
    assert found["peak_bytes_from_64k"] == 1.1
    assert compare(rows[:1]) == {}


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"lengths": ()}, "--lengths is empty"),
        ({"lengths": (0,)}, r"--lengths is \(0,\)"),
        ({"piece": 0}, "--piece is 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(tmp_path, setting, sentence):
    with pytest.raises(EvaluationError, match=sentence):
        ContextSettings(**{"checkpoint": (tmp_path,), "json": tmp_path / "x.json", **setting})
