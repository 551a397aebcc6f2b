"""Where the hosts of a run meet; have they the same code, packages, data and settings?

Each launcher collects what its host has, as plain values. Its workers take that along and compare all hosts in their
first collective, so every host ends with the same sentence. A host that comes to a run that trains already compares
itself with it, before it disturbs the others.
"""

import argparse
import hashlib
import json
import os
import platform
import socket
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch.distributed as dist

from pretrain.config.run_config import RunConfig
from pretrain.launch.status import STATUS_DIR
from titans_mcore.io import sha256_of

_PACKAGES = ("titans_mcore", "pretrain", "tokenization")
_VERSIONS = ("torch", "deepspeed", "megatron-core")
_PATHS = ("data.path", "data.blend")
"""Settings that may differ from host to host; what they name may not, which the fingerprint shows."""
_FACTS_FILE = "facts.json"
_COMPARED, _CAME, _LEFT, _ENDED = "compared", "came", "left", "ended"
"""Keys of the store."""
_STORE_SECONDS = 60.0
_TRY_AGAIN_SECONDS = 0.5
_LAST_WORD_SECONDS = 1.0
_OTHERS_LEAVE_SECONDS = 10.0
Facts = dict[str, Any]


class Meeting:
    """The store of a run, where its hosts meet. gloo and NCCL are told the network interface on the way there, unless
    GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME say another."""

    def __init__(self, own: argparse.Namespace) -> None:
        """Host 0 opens the store, at its address alone, where torch's own would listen at all; the others wait for it.

        Args:
            own: The launcher's options.

        Raises:
            ValueError: Host 0 cannot open it at its address, this host does not reach it in `join_timeout` seconds, or
                there are no such hosts.
        """
        if not 1 <= own.least <= own.most:
            raise ValueError(f"NNODES is {own.nnodes}; write a number of hosts, or FEWEST:MOST")
        if own.node_rank >= own.most:
            raise ValueError(f"NODE_RANK is {own.node_rank} and NNODES {own.most}; number the hosts from 0")
        self._own, self._me = own, f"host {own.node_rank} ({socket.gethostname()})"
        server: dict[str, Any] = {}
        if own.node_rank == 0:
            door = self._listen()
            self.address, port = door.getsockname()[:2]
            name, server = self.address, {"master_listen_fd": door.detach(), "wait_for_workers": False}
        else:
            self.address, name, port = self._reach_host_0(), own.address, own.port
        timeout = timedelta(seconds=own.join_timeout)
        self._store = dist.TCPStore(name, port, is_master=bool(server), timeout=timeout, **server)
        self.endpoint = f"[{name}]:{port}" if ":" in name else f"{name}:{port}"
        for library in ("GLOO", "NCCL"):
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", self._interface())
        if own.least < own.most:
            # In an attempt workers start anew when a host comes. They would be handed the addresses of those before.
            os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"

    def join(self, facts: Facts) -> None:
        """Says that this host has come, and tells its workers what it has.

        Raises:
            ValueError: Others train already, and this host differs from them; the message says how.
        """
        if self._there(_COMPARED) and (sentence := difference(json.loads(self._store.get(_COMPARED)), facts)):
            raise ValueError(sentence)
        self._store.set(f"{_CAME}/{self._own.node_rank}", self._me)
        given = {"facts": facts, "store": [self._own.address, self._own.port]}
        Path(os.environ[STATUS_DIR], _FACTS_FILE).write_text(json.dumps(given))

    def end(self) -> None:
        """Says that the run goes on nowhere."""
        with suppress(RuntimeError):  # torch's for a store that is gone
            self._store.set(_ENDED, self._me)

    def has_ended(self) -> bool:
        """Whether a host has said so."""
        with suppress(RuntimeError):
            self._store.wait([_ENDED], timedelta(seconds=_LAST_WORD_SECONDS))
            return True
        return False

    def who_is_missing(self) -> str:
        """A sentence on the hosts that never came, or empty."""
        own, ranks = self._own, range(self._own.most)
        there = [self._store.get(f"{_CAME}/{rank}").decode() for rank in ranks if self._there(f"{_CAME}/{rank}")]
        missing = [str(rank) for rank in ranks if not self._there(f"{_CAME}/{rank}")]
        if not missing:
            return ""
        return (
            f"host{'s' if len(missing) > 1 else ''} {', '.join(missing)} did not come to {own.address}, port {own.port}"
            f", within {own.join_timeout} s; there: {', '.join(there)}; start the same command on each with its own "
            "NODE_RANK and this MASTER_ADDR"
        )

    def leave(self) -> None:
        """Host 0 waits a little for the others, which may look into its store once more."""
        own, deadline = self._own, time.monotonic() + _OTHERS_LEAVE_SECONDS
        with suppress(RuntimeError):
            self._store.set(f"{_LEFT}/{own.node_rank}", self._me)
            for rank in range(1, own.most) if own.node_rank == 0 else ():
                while self._there(f"{_CAME}/{rank}") and not self._there(f"{_LEFT}/{rank}"):
                    if time.monotonic() > deadline:
                        return
                    time.sleep(0.1)

    def _there(self, key: str) -> bool:
        return bool(self._store.check([key]))

    def _listen(self) -> socket.socket:
        own, (address, port) = self._own, self._resolve()
        if own.most > 1 and (address.startswith("127.") or address == "::1"):
            raise ValueError(
                f"MASTER_ADDR {own.address} is {address} on {self._me}, where no other host reaches it; give an "
                "address in the network that the hosts share"
            )
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            return socket.create_server((address, port), family=family, backlog=socket.SOMAXCONN)
        except OSError as error:
            raise ValueError(
                f"{self._me} cannot listen at {address}, port {port}: {os.strerror(error.errno or 0)}; MASTER_ADDR "
                "must be an address of host 0, MASTER_PORT free there, and NODE_RANK 0 on that host alone"
            ) from None

    def _reach_host_0(self) -> str:
        """Waits until host 0 answers; the address of this host on the way there."""
        own, deadline = self._own, time.monotonic() + self._own.join_timeout
        while True:
            try:
                # In a cluster a name may come later than a host.
                with socket.create_connection(self._resolve(), timeout=5) as connection:
                    return str(connection.getsockname()[0])
            except (OSError, ValueError) as error:
                if time.monotonic() > deadline:
                    raise ValueError(
                        f"{self._me} does not reach host 0 at {own.address}, port {own.port}, within "
                        f"{own.join_timeout} s: {getattr(error, 'strerror', None) or error}; start the same command "
                        "there with NODE_RANK 0, and let the hosts reach each other on every port"
                    ) from None
            time.sleep(_TRY_AGAIN_SECONDS)

    def _resolve(self) -> tuple[str, int]:
        own = self._own
        try:
            address = socket.getaddrinfo(own.address, own.port, type=socket.SOCK_STREAM)[0][4][0]
        except OSError as error:
            raise ValueError(f"MASTER_ADDR {own.address} is unknown on {self._me}: {error.strerror}") from None
        return str(address), own.port

    def _interface(self) -> str:
        for name, addresses in psutil.net_if_addrs().items():
            if any(one.address.partition("%")[0] == self.address for one in addresses):
                return name
        raise ValueError(f"no network interface of {self._me} has the address {self.address}; check MASTER_ADDR")


def facts_of_this_host(own: argparse.Namespace, config: RunConfig) -> Facts:
    """What the hosts of a run must have alike, as plain values, and `problem`: a sentence, or empty.

    Args:
        own: The launcher's options.
        config: The settings, complete.
    """
    tree = asdict(config)
    named = {f"{section}.{name}": repr(value) for section, values in tree.items() for name, value in values.items()}
    settings = {name: value for name, value in named.items() if name not in _PATHS}
    facts: Facts = {
        "number": own.node_rank,
        "host": socket.gethostname(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in _VERSIONS},
        "code": code_hash(),
        "settings": settings | {"RUN_ID": own.rdzv_id, "NNODES": own.nnodes},
        "processes": own.processes,
        "data": "",
        "problem": "",
    }
    from pretrain.data.folders import open_data

    try:
        facts["data"] = open_data(config).fingerprint
    except (ValueError, OSError) as error:
        facts["problem"] = str(error)
    return facts


def compare_hosts(run_dir: Path) -> None:
    """Called by every worker as soon as they are joined; returns when the hosts are alike. Collective.

    Does nothing for a run on one host, or without a launcher.

    Args:
        run_dir: Folder of the run, which all hosts must share.

    Raises:
        ValueError: A host differs or has a problem; the message names it, and is the same on every rank.
    """
    folder = os.environ.get(STATUS_DIR)
    if not folder or not (file := Path(folder, _FACTS_FILE)).exists():
        return
    from pretrain.checkpoint.format import on_rank_0

    given = json.loads(file.read_text())
    facts = given["facts"]
    mark = run_dir / on_rank_0(lambda: _mark(run_dir))
    facts |= {"run_dir": str(run_dir.absolute()), "shares": mark.exists()}
    of_ranks: list[Facts] = [{}] * dist.get_world_size()
    dist.all_gather_object(of_ranks, facts)
    if dist.get_rank() == 0:
        mark.unlink()
    hosts = sorted({one["number"]: one for one in of_ranks}.values(), key=lambda one: one["number"])
    for one in hosts:
        if sentence := difference(hosts[0], one):
            raise ValueError(sentence)
        if not one["shares"]:
            raise ValueError(
                f"{_name(one)}: {one['run_dir']} is not the run folder of {_name(of_ranks[0])}; give the same "
                "--run-dir, on a file system that all hosts share"
            )
    if dist.get_rank() == 0:
        address, port = given["store"]
        store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=_STORE_SECONDS))
        store.set(_COMPARED, json.dumps(facts))


def difference(first: Facts, other: Facts) -> str:
    """A sentence on what a host has otherwise than the first one; empty when nothing is."""
    if other["problem"]:
        return f"{_name(other)}: {other['problem']}"
    if other["code"] != first["code"]:
        code = f"other code of {', '.join(_PACKAGES)}"
        return f"{_name(other)} has {code} than {_name(first)}; check out the same commit on both"
    for (found, remedy), (wanted, _) in zip(_compared(other), _compared(first), strict=True):
        if found != wanted:
            return f"{_name(other)} has {found} where {_name(first)} has {wanted}; {remedy}"
    return ""


def _compared(facts: Facts) -> list[tuple[str, str]]:
    """What a host has, in words, and what to do where another has something else."""
    return [
        *((f"{package} {found}", "install the same on both") for package, found in facts["versions"].items()),
        *((f"{name} {value}", "start the same command on every host") for name, value in facts["settings"].items()),
        (f"data {facts['data'][:12]}", "give both the same shards"),
        (f"{facts['processes']} processes", "give the same --nproc on every host"),
    ]


def code_hash() -> str:
    """SHA-256 over names and contents of the Python files that a run imports from this project."""
    root, digest = Path(__file__).resolve().parents[2], hashlib.sha256()
    for file in sorted(file for package in _PACKAGES for file in (root / package).rglob("*.py")):
        digest.update(f"{file.relative_to(root)}\0{sha256_of(file)}\n".encode())
    return digest.hexdigest()


def _mark(run_dir: Path) -> str:
    """Name of a new file in the run folder for the other hosts to find."""
    run_dir.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=run_dir, prefix=".hosts-")
    os.close(descriptor)
    return Path(name).name


def _name(facts: Facts) -> str:
    return f"host {facts['number']} ({facts['host']})"
