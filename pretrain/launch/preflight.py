"""Before any worker starts: have all hosts the same code, packages, data and settings, do they reach each other, and
is there room for checkpoints?

Each host writes what it has, as JSON, into the store through which torchrun's hosts meet, too. Host 0 compares and
writes its verdict, an empty text or a sentence that names the host; every host waits for it and ends with the same
sentence. A host that comes later, to an elastic run, compares itself with host 0.
"""

import hashlib
import json
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch.distributed import Store

from pretrain.config.run_config import RunConfig
from pretrain.launch.rendezvous import Hosts, own_address
from titans_mcore.config import TitansConfig
from titans_mcore.weights import checkpoints_newest_first
from tokenization.io import bytes_text

_PACKAGES = ("titans_mcore", "pretrain", "tokenization")
_VERSIONS = ("torch", "deepspeed", "megatron-core")
_PATHS = ("data.path", "data.blend")
"""Settings that may differ from host to host; what they name may not, which the fingerprint shows."""
_POLL_SECONDS = 0.1
_ANSWER_SECONDS = 60.0
_LAST_WORD_SECONDS = 10.0
_CONNECT_SECONDS = 10.0
_BYTES_A_PARAMETER = 12
_MARGIN = 4
Facts = dict[str, Any]


def facts_of_this_host(config: RunConfig, run_dir: Path, processes: int, words: Sequence[str]) -> Facts:
    """What the hosts of a run must have alike, as plain values, and `problem`: a sentence, or empty.

    Args:
        config: The settings, complete.
        run_dir: Folder of the run.
        processes: Workers that this host starts.
        words: The command line that the settings came from.
    """
    facts: Facts = {
        "host": socket.gethostname(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in _VERSIONS},
        "code": code_hash(),
        "settings": _settings(config),
        "processes": processes,
        "data": "",
        "problem": "",
    }
    try:
        facts["data"] = _data_fingerprint(config)
        check_room(config, run_dir, words)
    except (ValueError, OSError) as error:
        facts["problem"] = str(error)
    return facts


def check_hosts(store: Store, hosts: Hosts, facts: Facts, run_dir: Path) -> None:
    """Compares the hosts; returns when they are alike and reach each other. Every host calls it.

    Args:
        store: Of the run.
        hosts: How many, and which one this is.
        facts: Of this host.
        run_dir: Folder of the run, which all hosts must share.

    Raises:
        ValueError: A host is missing, differs, is not reached or has a problem; the message names it.
    """
    board = _Board(store)
    with _door(own_address(hosts)) as address:
        asked = {"RUN_ID": hosts.run_id, "NNODES": f"{hosts.least}:{hosts.most}"}
        facts = facts | {"address": address, "settings": facts["settings"] | asked}
        try:
            if hosts.rank == 0:
                _judge(board, hosts, facts, run_dir)
            else:
                _obey(board, hosts, facts, run_dir)
        except RuntimeError:  # torch's for a store that is gone
            raise ValueError(f"host 0 at {hosts.address} ended while the hosts were compared; it says why") from None


def difference(first: Facts, other: Facts, rank: int) -> str:
    """A sentence on what host `rank` has otherwise than host 0; empty when nothing is."""
    if other["problem"]:
        return f"{_name(rank, other)}: {other['problem']}"
    for package, found in other["versions"].items():
        if found != (wanted := first["versions"][package]):
            return _sentence(first, other, rank, f"{package} {found}", wanted, "install the same on both")
    if other["code"] != first["code"]:
        code = f"other code of {', '.join(_PACKAGES)}"
        return f"{_name(rank, other)} has {code} than {_name(0, first)}; check out the same commit on both"
    for name, value in other["settings"].items():
        if value != (wanted := first["settings"][name]):
            return _sentence(first, other, rank, f"{name} {value}", wanted, "start the same command on every host")
    if other["data"] != first["data"]:
        found, wanted = (f"data {facts['data'][:12]}" for facts in (other, first))
        return _sentence(first, other, rank, found, wanted, "give both the same shards")
    if other["processes"] != first["processes"]:
        found, wanted = f"{other['processes']} processes", str(first["processes"])
        return _sentence(first, other, rank, found, wanted, "give the same --nproc on every host")
    return ""


def code_hash() -> str:
    """SHA-256 over names and contents of the Python files that a run imports from this project."""
    root, digest = Path(__file__).resolve().parents[2], hashlib.sha256()
    for file in sorted(file for package in _PACKAGES for file in (root / package).rglob("*.py")):
        digest.update(f"{file.relative_to(root)}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def check_room(config: RunConfig, run_dir: Path, words: Sequence[str]) -> None:
    """Whether the disk takes the checkpoints that the run keeps, and the one that is being written.

    Args:
        config: Of the run.
        run_dir: Its folder, which may not be there yet.
        words: The command line of the run.

    Raises:
        ValueError: It does not.
    """
    folder = next(folder for folder in (run_dir.absolute(), *run_dir.absolute().parents) if folder.is_dir())
    free, every = shutil.disk_usage(folder).free, config.checkpoint.every_steps
    there = len(list(checkpoints_newest_first(run_dir)))
    # The newest, the best, the newest healthy one, and the one that is being written.
    wanted = config.checkpoint.keep + config.checkpoint.keep_best + 2
    missing = max(1, min(wanted, -(-config.train.steps // every) if every else 1) - there)
    if free > missing * checkpoint_bytes_at_most(config.model):
        return
    size = _checkpoint_bytes(config, words)
    if free < missing * size:
        raise ValueError(
            f"{folder} has {bytes_text(free)} free, and {missing} more checkpoint{'s' if missing > 1 else ''} of "
            f"{bytes_text(size)} are to be written there; make room, lower checkpoint.keep, or use another --run-dir"
        )


def checkpoint_bytes_at_most(model: TitansConfig) -> int:
    """More than any checkpoint of such a model has, without building it, which takes seconds of imports."""
    dim, memories = model.dim, model.memory_shape
    memory = memories.heads * sum(a * b for a, b in pairwise(model.memory_widths))
    block = 16 * dim * max(dim, memories.channels) + 3 * dim * model.ffn_dim + memory + dim * model.persistent_tokens
    return _BYTES_A_PARAMETER * _MARGIN * (model.num_layers * block + 2 * dim * (model.vocab_size + 128))


def _checkpoint_bytes(config: RunConfig, words: Sequence[str]) -> int:
    """The plan's answer, from a process of its own: what it imports would stay in the launcher."""
    fewest = config.parallel.tensor * config.parallel.context  # it is as large at every number of data ranks
    command = [sys.executable, "-m", "pretrain.plan", "--json", "--gpus", str(fewest), *words]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise ValueError(answer.stderr.strip().removeprefix("error: "))
    return int(json.loads(answer.stdout)["checkpoint"]["bytes"])


def _data_fingerprint(config: RunConfig) -> str:
    from pretrain.data.folders import open_data

    return open_data(config).fingerprint


def _settings(config: RunConfig) -> dict[str, str]:
    tree = asdict(config)
    named = {f"{section}.{name}": value for section, values in tree.items() for name, value in values.items()}
    return {name: repr(value) for name, value in named.items() if name not in _PATHS}


def _judge(board: "_Board", hosts: Hosts, facts: Facts, run_dir: Path) -> None:
    """Host 0's part."""
    came: dict[int, Facts] = {0: facts}
    with _mark(run_dir) as mark:
        board.put("host/0", facts | {"mark": mark})
        verdict = facts["problem"] and f"{_name(0, facts)}: {facts['problem']}"
        verdict = verdict or _wait_for_hosts(board, hosts, came)
        verdict = verdict or next(filter(None, (difference(facts, came[rank], rank) for rank in sorted(came))), "")
        if not verdict:
            board.put("peers", {str(rank): came[rank] for rank in came})
            verdict = _unreached(0, facts, came) or _answers(board, came)
    board.put("verdict", verdict)
    deadline = time.monotonic() + _LAST_WORD_SECONDS
    while time.monotonic() < deadline and not all(board.has(f"read/{rank}") for rank in came if rank):
        time.sleep(_POLL_SECONDS)
    if verdict:
        raise ValueError(verdict)


def _obey(board: "_Board", hosts: Hosts, facts: Facts, run_dir: Path) -> None:
    """The part of every other host."""
    rank, patience = hosts.rank, hosts.join_seconds + _ANSWER_SECONDS
    first = board.get("host/0", patience)
    if not facts["problem"] and not board.has("verdict") and not (run_dir / first["mark"]).exists():
        facts["problem"] = (
            f"{run_dir.absolute()} is not the run folder of {_name(0, first)}; give the same --run-dir, on a file "
            "system that all hosts share"
        )
    board.put(f"host/{rank}", facts)
    board.wait_for_any(("peers", "verdict"), patience)
    if board.has("peers") and not board.has("verdict"):
        peers = {int(other): found for other, found in board.get("peers", patience).items()}
        board.put(f"reached/{rank}", _unreached(rank, facts, peers))
    verdict = board.get("verdict", patience) or difference(first, facts, rank)
    board.put(f"read/{rank}", True)
    if verdict:
        raise ValueError(verdict)


def _wait_for_hosts(board: "_Board", hosts: Hosts, came: dict[int, Facts]) -> str:
    """Adds the facts of the hosts that come to `came`; a sentence on those that do not, or empty."""
    deadline = time.monotonic() + hosts.join_seconds
    while len(came) < hosts.least:
        for rank in range(1, hosts.most):
            if rank not in came and board.has(f"host/{rank}"):
                came[rank] = board.get(f"host/{rank}", _ANSWER_SECONDS)
        if time.monotonic() > deadline:
            missing = [str(rank) for rank in range(hosts.most) if rank not in came]
            numbers = f"host{'s' if len(missing) > 1 else ''} {', '.join(missing)}"
            there = ", ".join(_name(rank, came[rank]) for rank in sorted(came))
            return (
                f"{numbers} did not come to {hosts.address}, port {hosts.port}, within {hosts.join_seconds} s; there: "
                f"{there}; start the same command on each with its own NODE_RANK and this MASTER_ADDR"
            )
        time.sleep(_POLL_SECONDS)
    return ""


def _answers(board: "_Board", came: dict[int, Facts]) -> str:
    """What the other hosts found when they tried to reach each other; empty when all is well."""
    for rank in sorted(came):
        if rank and (sentence := board.get(f"reached/{rank}", len(came) * _CONNECT_SECONDS + _ANSWER_SECONDS)):
            return str(sentence)
    return ""


def _unreached(rank: int, facts: Facts, peers: dict[int, Facts]) -> str:
    """A sentence on the first host that this one does not reach, or empty."""
    for other, found in sorted(peers.items()):
        try:
            socket.create_connection(tuple(found["address"]), timeout=_CONNECT_SECONDS).close()
        except OSError as error:
            return (
                f"{_name(rank, facts)} does not reach {_name(other, found)} at {found['address'][0]}: "
                f"{error.strerror or error}; let the hosts reach each other on every port"
            )
    return ""


@contextmanager
def _door(address: str) -> Iterator[tuple[str, int]]:
    """A port of this host that the others try to reach."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as listener:
        listener.bind((address, 0))
        listener.listen(socket.SOMAXCONN)
        yield address, listener.getsockname()[1]


@contextmanager
def _mark(run_dir: Path) -> Iterator[str]:
    """A file in the run folder for the others to find; its name."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=run_dir, prefix=".hosts-") as file:
        yield Path(file.name).name


def _name(rank: int, facts: Facts) -> str:
    return f"host {rank} ({facts['host']})"


def _sentence(first: Facts, other: Facts, rank: int, found: str, wanted: str, remedy: str) -> str:
    return f"{_name(rank, other)} has {found} where {_name(0, first)} has {wanted}; {remedy}"


class _Board:
    """JSON texts by name in a store, waited for with patience."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def put(self, key: str, value: Any) -> None:
        self._store.set(f"preflight/{key}", json.dumps(value))

    def has(self, key: str) -> bool:
        return bool(self._store.check([f"preflight/{key}"]))

    def get(self, key: str, patience_seconds: float) -> Any:
        self.wait_for_any((key,), patience_seconds)
        self._store.wait([f"preflight/{key}"], timedelta(seconds=_ANSWER_SECONDS))
        return json.loads(self._store.get(f"preflight/{key}"))

    def wait_for_any(self, keys: Iterable[str], patience_seconds: float) -> None:
        deadline = time.monotonic() + patience_seconds
        while not any(self.has(key) for key in keys):
            if time.monotonic() > deadline:
                raise ValueError(
                    f"no answer from another host within {patience_seconds:.0f} s while hosts are compared"
                )
            time.sleep(_POLL_SECONDS)
