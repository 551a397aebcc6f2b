"""Two hosts on one machine: network namespaces that a virtual cable joins, each with a name of its own.

They share the machine's files, as the hosts of a cluster share a file system.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.pretrain.jobs import Job

_PREFIX = "10.77.0"


@dataclass(frozen=True)
class Host:
    """One of the two."""

    name: str
    """What `hostname` says there."""
    address: str
    """At its end of the cable."""
    holder: int
    """Process that keeps the namespaces: they go when it does."""

    @property
    def enter(self) -> list[str]:
        """Words before a command that is to run there."""
        return ["nsenter", f"--target={self.holder}", "--net", "--uts", "--"]

    def start(self, command: list[str], cwd: Path, **environment: str) -> Job:
        """Starts a command there."""
        settings = [f"{name}={value}" for name, value in environment.items()]
        return Job([*self.enter, "env", *settings, *command], cwd)

    def run(self, *command: str) -> None:
        """Runs a command there to its end."""
        subprocess.run([*self.enter, *command], check=True, capture_output=True)

    def processes(self, word: str = "") -> list[int]:
        """Every process there but the holder, or those whose command line has a word."""
        space, found = os.readlink(f"/proc/{self.holder}/ns/net"), []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # a process may end while we look
                words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                if os.readlink(folder / "ns" / "net") == space and word in words:
                    found.append(int(folder.name))
        return [pid for pid in found if pid != self.holder]

    def signal_all(self, number: signal.Signals, word: str = "") -> int:
        """Sends a signal to each of those processes; how many there were."""
        pids = self.processes(word)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        return len(pids)


def why_not() -> str:
    """Why two hosts cannot be built here; empty where they can."""
    try:
        with two_hosts() as hosts:
            hosts[0].run("true")
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", b"") or b""
        return f"two hosts need root, iproute2, unshare and nsenter: {error} {said.decode(errors='replace').strip()}"
    return ""


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Builds the hosts; in the end nothing of them is left, whatever runs there."""
    with contextlib.ExitStack() as ends:
        hosts = tuple(ends.enter_context(_host(number)) for number in range(2))
        ends_at = [str(host.holder) for host in hosts]
        words = f"ip link add cable netns {ends_at[0]} type veth peer name cable netns {ends_at[1]}"
        subprocess.run(words.split(), check=True, capture_output=True)
        for host in hosts:
            host.run("ip", "address", "add", f"{host.address}/24", "dev", "cable")
            host.run("ip", "link", "set", "lo", "up")
            host.run("ip", "link", "set", "cable", "up")
        yield hosts[0], hosts[1]


@contextlib.contextmanager
def cut_cable(host: Host, seconds: float) -> Iterator[None]:
    """Nothing passes between the hosts for so long, and connections are not closed."""
    host.run("ip", "link", "set", "cable", "down")
    try:
        time.sleep(seconds)
        yield
    finally:
        host.run("ip", "link", "set", "cable", "up")


@contextlib.contextmanager
def _host(number: int) -> Iterator[Host]:
    name = f"host-{'ab'[number]}"
    words = ["unshare", "--net", "--uts", "sh", "-c", f"hostname {name} && echo ready && exec sleep infinity"]
    holder = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        if holder.stdout.readline() != b"ready\n":
            raise OSError(holder.communicate()[1].decode(errors="replace").strip())
        host = Host(name, f"{_PREFIX}.{number + 1}", holder.pid)
        yield host
        host.signal_all(signal.SIGKILL)
    finally:
        holder.kill()
        holder.communicate()
