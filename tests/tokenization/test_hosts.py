"""Many hosts on one folder: the bytes of one host, and no assembling before all is done."""

import pytest

from tokenization.command_line import TokenizationError
from tokenization.encode import encode

from .conftest import encode_settings, hashes, make_texts, write_jsonl


def test_three_hosts_in_any_order_give_the_bytes_of_one(tmp_path, tokenizer, capsys):
    corpus = write_jsonl(tmp_path / "a.jsonl", make_texts(200) + make_texts(40))
    encode(encode_settings(corpus, tokenizer, tmp_path / "one"))
    for host in (2, 0):
        assert encode(encode_settings(corpus, tokenizer, tmp_path / "three", shard=f"{host}/3")) is None
    assert "when all 3 are, run once with --merge" in capsys.readouterr().out
    units = len(list((tmp_path / "three/work/units").glob("*.json")))
    with pytest.raises(TokenizationError, match=r"(\d+) of (\d+) units of work are not done \(1, 4, 7, "):
        encode(encode_settings(corpus, tokenizer, tmp_path / "three", merge=True))
    encode(encode_settings(corpus, tokenizer, tmp_path / "three", shard="1/3"))
    assert len(list((tmp_path / "three/work/units").glob("*.json"))) > units
    encode(encode_settings(corpus, tokenizer, tmp_path / "three", merge=True))
    assert hashes(tmp_path / "three") == hashes(tmp_path / "one")


def test_a_host_with_other_settings_is_refused_by_name(tmp_path, corpus, tokenizer):
    encode(encode_settings(corpus, tokenizer, tmp_path / "out", shard="0/2"))
    with pytest.raises(TokenizationError, match="made with seed 0, not 1"):
        encode(encode_settings(corpus, tokenizer, tmp_path / "out", shard="1/2", seed=1))


def test_more_hosts_than_units_do_no_harm(tmp_path, corpus, tokenizer):
    for host in range(3):
        encode(encode_settings(corpus, tokenizer, tmp_path / "out", shard=f"{host}/3", unit_mb=100))
    assert encode(encode_settings(corpus, tokenizer, tmp_path / "out", unit_mb=100, merge=True)) is not None
