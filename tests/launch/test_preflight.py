"""What hosts compare in their first collective, and how they meet: real stores, sockets and processes."""

import json
import os
import socket
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest

from pretrain.config.run_config import RunConfig
from pretrain.launch.__main__ import check_sizes, options
from pretrain.launch.preflight import (
    Meeting,
    code_hash,
    difference,
    facts_of_this_host,
)
from pretrain.launch.status import STATUS_DIR
from titans_mcore.config import TitansConfig

FACTS = {
    "number": 0,
    "host": "a",
    "versions": {"python": "3.11.2", "torch": "2.13.0"},
    "code": "1" * 64,
    "settings": {"train.steps": "20"},
    "processes": 8,
    "data": "2" * 64,
    "problem": "",
}
B, C = {"number": 1, "host": "b"}, {"number": 2, "host": "c"}


@pytest.fixture(autouse=True)
def interfaces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A meeting tells gloo and NCCL the interface through the environment; other tests shall not see that."""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    (tmp_path / "status").mkdir()
    monkeypatch.setenv(STATUS_DIR, str(tmp_path / "status"))


def facts_here(own: Namespace, shards: Path) -> dict:
    config = RunConfig(model=TitansConfig(vocab_size=96))
    own.processes = 1
    return facts_of_this_host(own, replace(config, data=replace(config.data, path=str(shards))))


def compared(folder: Path, cases: list[list[dict]]) -> list[list[str]]:
    """What each rank says to each case, a process a rank."""
    folder.mkdir()
    (folder / "cases.json").write_text(json.dumps(cases))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meet = {"WORLD_SIZE": str(len(cases[0])), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, str(Path(__file__).with_name("compare_worker.py")), str(folder)]
    path = {"PYTHONPATH": str(Path(__file__).parents[2])}
    ranks = [
        subprocess.Popen(command, env=os.environ | meet | path | {"RANK": str(rank)}) for rank in range(len(cases[0]))
    ]
    assert [rank.wait() for rank in ranks] == [0] * len(ranks)
    said = [json.loads((folder / f"said-{rank}.json").read_text()) for rank in range(len(ranks))]
    return [list(case) for case in zip(*said, strict=True)]


def test_every_rank_ends_with_the_sentence_that_names_the_host_that_differs(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    there.mkdir()

    def case(*facts: dict, run_dirs: tuple[Path, ...] = (here, here, here)) -> list[dict]:
        return [{"facts": one, "run_dir": str(folder)} for one, folder in zip(facts, run_dirs, strict=True)]

    alike, code, folder = compared(
        tmp_path / "cases",
        [
            case(FACTS, FACTS | B, FACTS | C),
            case(FACTS, FACTS | B, FACTS | C | {"code": "0" * 64}),
            case(FACTS, FACTS | B, FACTS | C, run_dirs=(here, there, here)),
        ],
    )
    assert alike == [""] * 3
    sentence = "host 2 (c) has other code of titans_mcore, pretrain, tokenization than host 0 (a); check out the same"
    assert code == [code[0]] * 3
    assert code[0].startswith(sentence)
    assert folder == [folder[0]] * 3
    assert folder[0].startswith(f"host 1 (b): {there} is not the run folder of host 0 (a); give the same --run-dir")
    assert list(here.glob(".hosts-*")) == []


def test_an_elastic_run_refuses_a_late_host_that_differs(shards: Path, tmp_path: Path) -> None:
    first, late = options([]), options(["--nnodes", "1:2", "--node-rank", "1"])
    meeting = Meeting(first)
    late.port = int(meeting.endpoint.rpartition(":")[2])
    facts = facts_here(late, shards)
    Meeting(late).join(facts)
    assert json.loads((tmp_path / "status" / "facts.json").read_text())["facts"] == facts
    meeting._store.set("compared", json.dumps(facts | {"number": 0, "processes": 3}))
    with pytest.raises(
        ValueError, match=r"^host 1 \(.*\) has 1 processes where host 0 .* has 3 processes; give the same"
    ):
        Meeting(late).join(facts)


def test_hosts_that_do_not_come_are_named() -> None:
    meeting = Meeting(options([]))
    meeting._own = options(["--nnodes", "4", "--rdzv-endpoint", "127.0.0.1:29400", "--join-timeout", "2"])
    meeting.join(FACTS)
    late = options(["--nnodes", "4", "--node-rank", "1", "--rdzv-endpoint", meeting.endpoint])
    Meeting(late).join(FACTS | B)
    name = socket.gethostname()
    assert meeting.who_is_missing().startswith(
        f"hosts 2, 3 did not come to 127.0.0.1, port 29400, within 2 s; there: host 0 ({name}), host 1 ({name}); start"
    )


def test_a_host_that_ends_the_run_is_heard_by_the_others() -> None:
    meeting = Meeting(options([]))
    other = Meeting(options(["--nnodes", "2", "--node-rank", "1", "--rdzv-endpoint", meeting.endpoint]))
    assert not other.has_ended()
    meeting.end()
    assert other.has_ended()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"versions": {"python": "3.11.2", "torch": "2.12.0"}},
            "torch 2.12.0 where host 0 (a) has torch 2.13.0; install",
        ),
        (
            {"settings": {"train.steps": "30"}},
            "has train.steps 30 where host 0 (a) has train.steps 20; start the same command",
        ),
        ({"data": "3" * 64}, "has data 333333333333 where host 0 (a) has data 222222222222; give both the"),
        ({"problem": "no shards"}, "host 1 (b): no shards"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_differs_is_named_with_both_hosts(change: dict, sentence: str) -> None:
    assert difference(FACTS, FACTS | B) == ""
    assert sentence in difference(FACTS, FACTS | B | change)


def test_facts_tell_code_packages_data_settings_and_the_names_of_the_run(shards: Path, tmp_path: Path) -> None:
    facts = facts_here(options(["--rdzv-id", "mine"]), shards)
    assert len(facts["code"]) == 64
    assert facts["code"] == code_hash()
    assert set(facts["versions"]) == {"python", "torch", "deepspeed", "megatron-core"}
    assert (facts["settings"]["train.steps"], facts["settings"]["RUN_ID"]) == ("1000", "mine")
    assert "data.path" not in facts["settings"]
    assert (facts["problem"], len(facts["data"])) == ("", 64)
    assert str(tmp_path / "none") in facts_here(options([]), tmp_path / "none")["problem"]


def test_the_store_listens_at_one_address_alone() -> None:
    meeting = Meeting(options([]))
    port = int(meeting.endpoint.rpartition(":")[2])
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.2", port), timeout=5)


def test_gloo_and_nccl_are_told_the_interface_unless_somebody_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "chosen")
    Meeting(options([]))
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == ("lo", "chosen")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            "--nnodes 2 --rdzv-endpoint 127.0.0.1:29499",
            "where no other host reaches it; give an address in",
        ),
        (
            "--nnodes 2 --rdzv-endpoint 192.0.2.1:29499",
            "cannot listen at 192.0.2.1, port 29499: Cannot assign requested address",
        ),
        (
            "--nnodes 2 --node-rank 1 --rdzv-endpoint 127.0.0.1:9 --join-timeout 1",
            "does not reach host 0 at 127.0.0.1, port 9, within 1 s",
        ),
        ("--nnodes 3:2", "NNODES is 3:2; write a number of hosts, or FEWEST:MOST"),
        ("--nnodes 2 --node-rank 2", "NODE_RANK is 2 and NNODES 2; number the hosts from 0"),
    ],
)
def test_hosts_that_cannot_meet_get_one_sentence(words: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Meeting(options(words.split()))


def test_a_port_that_is_taken_is_one_sentence() -> None:
    meeting = Meeting(options([]))
    port = meeting.endpoint.rpartition(":")[2]
    with pytest.raises(ValueError, match=rf"cannot listen at 127.0.0.1, port {port}: Address already in use"):
        Meeting(options(["--rdzv-endpoint", meeting.endpoint]))


def test_an_elastic_run_must_divide_at_every_number_of_hosts() -> None:
    config = RunConfig()
    batch = replace(config, train=replace(config.train, global_batch=24, micro_batch=1))
    check_sizes(batch, 2, 1, 4)
    with pytest.raises(ValueError, match=r"^with 3 of 1 to 4 hosts: train.global_batch 128 cannot be shared out"):
        check_sizes(config, 2, 1, 4)
    carried = replace(batch, data=replace(batch.data, carry_state=True))
    check_sizes(carried, 2, 2, 2)
    with pytest.raises(ValueError, match=r"NNODES 1:2 lets the number of data ranks change, and data.carry_state"):
        check_sizes(carried, 2, 1, 2)
