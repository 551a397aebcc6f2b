"""Killed at any moment and started again: the same bytes, and nothing half-written taken for done."""

import os
import random
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import tokenization.encode
from titans_mcore.command_line import CommandError
from titans_mcore.io import PartialFile, exclusive, sweep_partial_files, write_file_once
from tokenization.command_line import TokenizationError
from tokenization.encode import encode

from .conftest import encode_settings, hashes, make_texts, start, write_jsonl

ALL_BUT_THE_FIRST_UNIT = r"/units/\.(?!00000000)"


@pytest.fixture(scope="module")
def long_corpus(tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("long") / "a.jsonl", make_texts(4_000, words=120) + make_texts(100))


def wait_until_session_is_empty(session: int) -> None:
    """The workers of a killed run must not stay behind."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        try:
            os.killpg(session, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)
    os.killpg(session, signal.SIGKILL)
    pytest.fail("workers outlived their parent")


def kill_when(process: subprocess.Popen[str], condition: Callable[[], bool], delay: float) -> None:
    """Kills with -9 a moment after a condition holds."""
    while not condition():
        assert process.poll() is None
        time.sleep(0.001)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_until_session_is_empty(process.pid)
    assert process.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_killed_with_9_at_random_moments_it_ends_with_the_same_bytes(tmp_path, tokenizer, long_corpus):
    wanted = {"workers": 2, "unit_mb": 0.05, "shard_tokens": 60_000}
    encode(encode_settings(long_corpus, tokenizer, tmp_path / "never-stopped", **wanted | {"workers": 1}))
    output = tmp_path / "out"
    settings = encode_settings(long_corpus, tokenizer, output, **wanted)
    moments = random.Random(7)

    def done(kind: str, count: int) -> bool:
        return len(list(output.glob(f"work/{kind}/*.json"))) >= count

    for kind, count in [("units", 1), ("units", moments.randint(3, 15)), ("units", 30), ("shards", 1), ("shards", 3)]:
        process = start(settings, hold_at=r"/\.manifest", stdout=subprocess.DEVNULL)
        kill_when(process, lambda kind=kind, count=count: done(kind, count), moments.uniform(0, 0.05))
        assert not (output / "manifest.json").exists()
    process = start(settings, stdout=subprocess.PIPE)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "going on, " in said or "already done" in said
    assert hashes(output) == hashes(tmp_path / "never-stopped")


class Crash(BaseException):
    """Ends a run as a kill does: nothing of ours catches it."""


def test_stopped_before_and_after_every_rename_it_ends_with_the_same_bytes(tmp_path, corpus, tokenizer, monkeypatch):
    def settings(name: str):
        return encode_settings(corpus, tokenizer, tmp_path / name, unit_mb=0.004, shard_tokens=2_000)

    encode(settings("never-stopped"))
    replace, link = os.replace, os.link
    for after in (False, True):
        output = f"stopped-{after}"
        stops = 0
        while not (tmp_path / output / "manifest.json").exists():
            left = [stops % 9]  # as many renames go well before the stop

            def stopping(rename, *names, left=left, after=after):
                left[0] -= 1
                if left[0] < 0 and not after:
                    raise Crash
                rename(*names)
                if left[0] < 0:
                    raise Crash

            monkeypatch.setattr(os, "replace", lambda *names: stopping(replace, *names))
            monkeypatch.setattr(os, "link", lambda *names: stopping(link, *names))
            try:
                encode(settings(output))
            except Crash:
                stops += 1
            assert stops < 400
        monkeypatch.setattr(os, "replace", replace)
        monkeypatch.setattr(os, "link", link)
        encode(settings(output))
        assert stops > 8
        assert hashes(tmp_path / output) == hashes(tmp_path / "never-stopped")


def test_a_restart_with_other_settings_or_changed_sources_is_refused_by_name(tmp_path, texts, tokenizer, monkeypatch):
    corpus = write_jsonl(tmp_path / "a.jsonl", texts)
    settings = encode_settings(corpus, tokenizer, tmp_path / "out")
    monkeypatch.setattr("tokenization.encode.assemble", lambda *_: (_ for _ in ()).throw(Crash()))
    with pytest.raises(Crash):
        encode(settings)
    for changes, sentence in [
        ({"shard_tokens": 77}, "made with shard_tokens 1000000000, not 77"),
        ({"min_score": 2.5}, "made with min_score None, not 2.5"),
        ({"unit_mb": 1.0}, "made with unit_bytes 5000, not 1000000"),
        ({"keep_duplicates": True}, "made with deduplicate True, not False"),
    ]:
        with pytest.raises(TokenizationError, match=sentence):
            encode(encode_settings(corpus, tokenizer, tmp_path / "out", **changes))
    data = corpus.read_bytes()
    corpus.write_bytes(data.replace(b"memory", b"MEMORY"))
    with pytest.raises(TokenizationError, match=rf"made before {corpus} was changed"):
        encode(settings)


def test_a_source_that_changes_while_it_is_read_stops_the_run(tmp_path, texts, tokenizer, monkeypatch):
    corpus = write_jsonl(tmp_path / "a.jsonl", texts)
    claim = tokenization.encode.claim_output

    def claim_then_change(*arguments, **options):
        found = claim(*arguments, **options)
        corpus.write_bytes(corpus.read_bytes() + b"\n")
        return found

    monkeypatch.setattr("tokenization.encode.claim_output", claim_then_change)
    with pytest.raises(TokenizationError, match=rf"{corpus}: changed since the work was planned"):
        encode(encode_settings(corpus, tokenizer, tmp_path / "out"))


def test_a_full_disk_is_one_line_and_the_next_run_goes_on(tmp_path, tokenizer, long_corpus):
    settings = encode_settings(long_corpus, tokenizer, tmp_path / "out", unit_mb=0.3)

    def small_files_only() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    process = start(settings, preexec_fn=small_files_only, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 2
    (line,) = errors.strip().splitlines()
    assert line.startswith("error: ")
    assert "larger than this system allows" in line
    assert "goes on where it stopped" in line
    assert not list(tmp_path.glob("out/work/units/*.json"))
    encode(settings)
    encode(encode_settings(long_corpus, tokenizer, tmp_path / "other", unit_mb=0.3))
    assert hashes(tmp_path / "out") == hashes(tmp_path / "other")


def test_ctrl_c_ends_with_a_short_line_and_130_and_the_next_run_goes_on(tmp_path, tokenizer, long_corpus):
    settings = encode_settings(long_corpus, tokenizer, tmp_path / "out", workers=2, unit_mb=0.05)
    process = start(settings, hold_at=ALL_BUT_THE_FIRST_UNIT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    while not list(tmp_path.glob("out/work/units/*.json")):
        assert process.poll() is None
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines() == [
        "interrupted; nothing half-written counts, run the same command again: it goes on where it stopped"
    ]
    wait_until_session_is_empty(process.pid)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_killed_worker_is_named_and_the_next_run_goes_on(tmp_path, tokenizer, long_corpus):
    settings = encode_settings(long_corpus, tokenizer, tmp_path / "out", workers=2, unit_mb=0.05)
    process = start(settings, hold_at=ALL_BUT_THE_FIRST_UNIT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    while not list(tmp_path.glob("out/work/units/*.json")):
        assert process.poll() is None
        time.sleep(0.002)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(int(workers[0]), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "a worker process was killed" in errors
    wait_until_session_is_empty(process.pid)


def test_what_killed_processes_left_is_swept_and_what_living_ones_write_is_not(tmp_path):
    with PartialFile(tmp_path / "living"):
        dead = PartialFile(tmp_path / "dead")
        os.close(os.dup(dead.file.fileno()))
        dead.file.close()  # as a killed process leaves it
        (tmp_path / ".other.partial-another-machine-x").touch()
        sweep_partial_files(tmp_path)
        left = sorted(path.name.split("-")[0] for path in tmp_path.iterdir())
        assert left == [".living.partial", ".other.partial"]


def test_of_many_that_write_a_file_once_the_first_wins(tmp_path):
    assert write_file_once(tmp_path / "a", b"first")
    assert not write_file_once(tmp_path / "a", b"second")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"first"]


def test_two_at_once_on_one_folder_are_refused(tmp_path, corpus, tokenizer):
    settings = encode_settings(corpus, tokenizer, tmp_path / "out")
    encode(encode_settings(corpus, tokenizer, tmp_path / "out", shard="1/2"))
    with exclusive(tmp_path / "out/work/units/host-0-of-1.lock", "unused"):
        with pytest.raises(CommandError, match="another process works there as --shard 0/1"):
            encode(settings)
    with exclusive(tmp_path / "out/work/assemble.lock", "unused"):
        with pytest.raises(CommandError, match="another process assembles it"):
            encode(settings)
    assert encode(settings) is not None
