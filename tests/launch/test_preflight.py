"""What hosts compare before any worker starts: real stores and sockets, several hosts in one process."""

import os
import socket
import threading
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from pretrain.config.run_config import RunConfig
from pretrain.launch.__main__ import check_sizes
from pretrain.launch.preflight import (
    check_hosts,
    check_room,
    checkpoint_bytes_at_most,
    code_hash,
    difference,
    facts_of_this_host,
)
from pretrain.launch.rendezvous import Hosts, interface_of, listening_store, open_store, own_address
from pretrain.plan.__main__ import plan_of, request_of
from titans_mcore.config import TitansConfig

PRESETS = ("quickstart", "mac_170m", "mal_340m", "transformer_400m", "lmm_760m", "mag_1.3b")
FACTS = {
    "host": "a",
    "versions": {"python": "3.11.2", "torch": "2.13.0"},
    "code": "1" * 64,
    "settings": {"train.steps": "20"},
    "processes": 8,
    "data": "2" * 64,
    "problem": "",
}


@pytest.fixture
def facts(shards: Path, tmp_path: Path) -> dict:
    config = RunConfig(model=TitansConfig(vocab_size=96))
    config = replace(config, data=replace(config.data, path=str(shards)))
    return facts_of_this_host(config, tmp_path / "run", 1, [])


def together(run_dir: Path, facts_of: list[dict], *, least: int, most: int, join_seconds: int = 60) -> list[str]:
    """The sentence with which each host ends, or an empty one; hosts are threads, each with a connection of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said = ["did not end"] * len(facts_of)

    def host(rank: int) -> None:
        hosts = Hosts(least, most, rank, "127.0.0.1", port, join_seconds=join_seconds)
        try:
            store = open_store(hosts) if rank else listening_store("127.0.0.1", port, join_timeout(hosts))
            check_hosts(store, hosts, facts_of[rank], run_dir)
            said[rank] = ""
        except ValueError as error:
            said[rank] = str(error)

    threads = [threading.Thread(target=host, args=(rank,)) for rank in range(len(facts_of))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return said


def join_timeout(hosts: Hosts) -> timedelta:
    return timedelta(seconds=hosts.join_seconds)


def test_hosts_that_are_alike_start(facts, tmp_path):
    assert together(tmp_path, [facts, facts, facts], least=3, most=3) == ["", "", ""]
    assert list(tmp_path.glob(".hosts-*")) == []


def test_every_host_ends_with_the_sentence_that_names_the_one_that_differs(facts, tmp_path):
    other = facts | {"host": "b", "code": "0" * 64}
    said = together(tmp_path, [facts, facts, other], least=3, most=3)
    assert said[0].startswith("host 2 (b) has other code of titans_mcore, pretrain, tokenization than host 0 (")
    assert said[0].endswith("; check out the same commit on both")
    assert said == [said[0]] * 3


def test_a_host_that_does_not_come_is_named(facts, tmp_path):
    said = together(tmp_path, [facts, facts], least=4, most=4, join_seconds=2)
    assert said[0].startswith("hosts 2, 3 did not come to 127.0.0.1, port ")
    assert f"there: host 0 ({facts['host']}), host 1 ({facts['host']});" in said[0]
    assert said == [said[0]] * 2


def test_an_elastic_run_starts_with_its_fewest_hosts_and_refuses_a_late_one_that_differs(facts, tmp_path):
    hosts = Hosts(1, 2, 0, "127.0.0.1", 0)
    store = listening_store("127.0.0.1", 0, join_timeout(hosts))
    check_hosts(store, hosts, facts, tmp_path)
    late = replace(hosts, rank=1, port=store.port)
    check_hosts(open_store(late), late, facts, tmp_path)
    with pytest.raises(ValueError, match=r"^host 1 \(.*\) has 3 processes where host 0 .* has 1; give the same"):
        check_hosts(open_store(late), late, facts | {"processes": 3}, tmp_path)


def test_a_run_folder_that_is_not_shared_is_named(facts, tmp_path):
    """The second host looks for the first one's mark in another folder."""
    hosts = Hosts(2, 2, 0, "127.0.0.1", 0, join_seconds=30)
    store = listening_store("127.0.0.1", 0, join_timeout(hosts))
    here, there = tmp_path / "here", tmp_path / "there"
    there.mkdir()
    said: list[str] = []

    def second() -> None:
        one = replace(hosts, rank=1, port=store.port)
        with pytest.raises(ValueError) as raised:  # noqa: PT011
            check_hosts(open_store(one), one, dict(facts), there)
        said.append(str(raised.value))

    thread = threading.Thread(target=second)
    thread.start()
    with pytest.raises(ValueError, match=rf"^host 1 \(.*\): {there} is not the run folder of host 0"):
        check_hosts(store, hosts, facts, here)
    thread.join(60)
    assert f"{there} is not the run folder" in said[0]


def test_two_commands_that_differ_in_the_name_of_the_run_are_told_apart(facts, tmp_path):
    hosts = Hosts(2, 2, 0, "127.0.0.1", 0, run_id="one", join_seconds=30)
    store = listening_store("127.0.0.1", 0, join_timeout(hosts))
    other = replace(hosts, rank=1, port=store.port, run_id="two")

    def second() -> None:
        with pytest.raises(ValueError, match="has RUN_ID two where"):
            check_hosts(open_store(other), other, dict(facts), tmp_path)

    thread = threading.Thread(target=second)
    thread.start()
    with pytest.raises(ValueError, match=r"^host 1 .* has RUN_ID two where host 0 .* has one; start the same command"):
        check_hosts(store, hosts, facts, tmp_path)
    thread.join(60)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"versions": {"python": "3.11.2", "torch": "2.12.0"}},
            "torch 2.12.0 where host 0 (a) has 2.13.0; install",
        ),
        ({"settings": {"train.steps": "30"}}, "has train.steps 30 where host 0 (a) has 20; start the same command"),
        ({"data": "3" * 64}, "has data 333333333333 where host 0 (a) has data 222222222222; give both the"),
        ({"problem": "no shards"}, "host 1 (b): no shards"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_differs_is_named_with_both_hosts(change, sentence):
    assert difference(FACTS, FACTS | {"host": "b"}, 1) == ""
    assert sentence in difference(FACTS, FACTS | {"host": "b"} | change, 1)


def test_facts_tell_code_packages_data_and_settings(facts, shards, tmp_path):
    assert len(facts["code"]) == 64
    assert facts["code"] == code_hash()
    assert set(facts["versions"]) == {"python", "torch", "deepspeed", "megatron-core"}
    assert facts["settings"]["train.steps"] == "1000"
    assert "data.path" not in facts["settings"]
    assert (facts["problem"], len(facts["data"])) == ("", 64)
    config = replace(RunConfig(), data=replace(RunConfig().data, path=str(tmp_path / "none")))
    assert str(tmp_path / "none") in facts_of_this_host(config, tmp_path, 1, [])["problem"]


def test_a_disk_without_room_for_the_checkpoints_is_refused(tmp_path):
    large = ["--config", "mag_1.3b", "--model.dim", "1048576"]
    config = request_of([*large, "--gpus", "1"]).config
    with pytest.raises(ValueError, match=r"GB free, and 6 more checkpoints of [\d.]+ GB are to be written there; make"):
        check_room(config, tmp_path / "not" / "yet", large)


def test_the_quick_bound_of_a_checkpoint_is_above_the_count():
    for preset in PRESETS:
        request = request_of(["--config", preset, "--gpus", "2"])
        count = plan_of(request)["checkpoint"]["bytes"]
        assert count < checkpoint_bytes_at_most(request.config.model) < 20 * count


def test_the_store_listens_at_one_address_alone():
    store = listening_store("127.0.0.1", 0, join_timeout(Hosts()))
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.2", store.port), timeout=5)
    socket.create_connection(("127.0.0.1", store.port), timeout=5).close()


def test_gloo_and_nccl_are_told_the_interface(monkeypatch):
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "chosen")
        monkeypatch.delenv(name)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "chosen")
    open_store(Hosts())
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == ("lo", "chosen")
    assert interface_of(own_address(Hosts())) == "lo"


@pytest.mark.parametrize(
    ("hosts", "sentence"),
    [
        (Hosts(2, 2, 0, "127.0.0.1", 29499), "where no other host reaches it; give an address in the network"),
        (Hosts(2, 2, 0, "192.0.2.1", 29499), "cannot listen at 192.0.2.1, port 29499: Cannot assign requested address"),
        (Hosts(2, 2, 1, "127.0.0.1", 9, join_seconds=1), "does not reach host 0 at 127.0.0.1, port 9, within 1 s"),
    ],
    ids=["own loop", "not its address", "nobody there"],
)
def test_a_store_that_cannot_be_is_one_sentence(hosts, sentence):
    with pytest.raises(ValueError, match=sentence):
        open_store(hosts)


def test_a_port_that_is_taken_is_one_sentence():
    store = listening_store("127.0.0.1", 0, join_timeout(Hosts()))
    with pytest.raises(ValueError, match=rf"cannot listen at 127.0.0.1, port {store.port}: Address already in use"):
        listening_store("127.0.0.1", store.port, join_timeout(Hosts()))


def test_an_elastic_run_must_divide_at_every_number_of_hosts():
    config = RunConfig()
    batch = replace(config, train=replace(config.train, global_batch=24, micro_batch=1))
    check_sizes(batch, 2, 1, 4)
    with pytest.raises(ValueError, match=r"^with 3 of 1 to 4 hosts: train.global_batch 128 cannot be shared out"):
        check_sizes(config, 2, 1, 4)
    carried = replace(batch, data=replace(batch.data, carry_state=True))
    check_sizes(carried, 2, 2, 2)
    with pytest.raises(ValueError, match=r"NNODES 1:2 lets the number of data ranks change, and data.carry_state"):
        check_sizes(carried, 2, 1, 2)
