"""The hosts of a run: which one this is, the store at which they meet, and torchrun's rendezvous over it.

Every port that is opened here, and those that gloo and NCCL open, listens at the address by which this host and host 0
see each other, and at no other.
"""

import os
import socket
import time
from dataclasses import dataclass
from datetime import timedelta

import psutil
from torch.distributed import TCPStore
from torch.distributed.elastic.rendezvous import RendezvousInfo
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler, RendezvousTimeout

_TRY_AGAIN_SECONDS = 0.5


@dataclass(frozen=True)
class Hosts:
    """The hosts that a run was asked to use, and this one among them."""

    least: int = 1
    """With fewer there is no run."""
    most: int = 1
    """Further ones are turned away."""
    rank: int = 0
    """Number of this host, from 0."""
    address: str = "127.0.0.1"
    """Name or address of host 0."""
    port: int = 0
    """Of the store on host 0; 0: a free one, for a run of one host."""
    run_id: str = "titans"
    """Name of the run."""
    join_seconds: int = 600
    """How long the hosts wait for one another."""

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise ValueError(f"NNODES is {self.least}:{self.most}; write a number of hosts, or FEWEST:MOST")
        if self.rank >= self.most:
            raise ValueError(f"NODE_RANK is {self.rank} and NNODES {self.most}; number the hosts from 0")

    @property
    def alone(self) -> bool:
        """Whether there is no other host, at any time."""
        return self.most == 1


def open_store(hosts: Hosts) -> TCPStore:
    """The store of the run: host 0 opens it, the others wait until they reach it.

    gloo and NCCL are told the interface, unless GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME say another.

    Raises:
        ValueError: Host 0 cannot open it at its address, or this host does not reach it in `join_seconds`.
    """
    timeout = timedelta(seconds=hosts.join_seconds)
    if hosts.rank == 0:
        address = _address_of_host_0(hosts)
        store = listening_store(address, hosts.port, timeout)
    else:
        address = _reach_host_0(hosts)
        store = TCPStore(hosts.address, hosts.port, is_master=False, timeout=timeout)
    for library in ("GLOO", "NCCL"):
        os.environ.setdefault(f"{library}_SOCKET_IFNAME", interface_of(address))
    return store


def listening_store(address: str, port: int, timeout: timedelta) -> TCPStore:
    """A store in this process that listens at one address alone; torch's own would listen at every one.

    Raises:
        ValueError: The address is not this host's, or the port is taken.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    door = socket.socket(family)
    door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        door.bind((address, port))
    except OSError as error:
        door.close()
        raise ValueError(
            f"host 0 ({socket.gethostname()}) cannot listen at {address}, port {port}: {error.strerror}; MASTER_ADDR "
            "must be an address of host 0, MASTER_PORT free there, and NODE_RANK 0 on that host alone"
        ) from None
    door.listen(socket.SOMAXCONN)
    port = door.getsockname()[1]
    return TCPStore(
        address, port, is_master=True, timeout=timeout, wait_for_workers=False, master_listen_fd=door.detach()
    )


def own_address(hosts: Hosts) -> str:
    """The address of this host by which it reaches host 0. Nothing is sent."""
    family, _, _, _, there = _resolve(hosts)
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(there)
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str:
    """Name of the network interface that has an address of this host."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address.partition("%")[0] == address for one in addresses):
            return name
    raise ValueError(f"no network interface of {socket.gethostname()} has the address {address}; check MASTER_ADDR")


class Rendezvous(DynamicRendezvousHandler):
    """torchrun's c10d rendezvous; the workers of every round get a store of their own, at the host's one address.

    torch's handler keeps the store of the first round: workers would find there the addresses of dead ones, and, when
    another host has become the first, no store at all.
    """

    @classmethod
    def over(cls, store: TCPStore, hosts: Hosts) -> "Rendezvous":
        """The rendezvous of the run whose store this is."""
        handler = cls.from_backend(
            hosts.run_id,
            store,
            C10dRendezvousBackend(store, hosts.run_id),
            hosts.least,
            hosts.most,
            local_addr=own_address(hosts),
            timeout=RendezvousTimeout(join=timedelta(seconds=hosts.join_seconds)),
        )
        handler.join_timeout = timedelta(seconds=hosts.join_seconds)
        return handler

    join_timeout: timedelta

    def next_rendezvous(self) -> RendezvousInfo:
        """Waits for the hosts of the next round."""
        self._bootstrap_store_info = None
        self._shared_tcp_store_server = None
        return super().next_rendezvous()

    def _create_tcp_store_server(self, master_addr: str, master_port: int) -> TCPStore:
        return listening_store(master_addr, master_port, self.join_timeout)


def _resolve(hosts: Hosts) -> tuple:
    try:
        return socket.getaddrinfo(hosts.address, hosts.port or 1, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ValueError(f"MASTER_ADDR {hosts.address} is unknown on {_me(hosts)}: {error.strerror}") from None


def _me(hosts: Hosts) -> str:
    return f"host {hosts.rank} ({socket.gethostname()})"


def _address_of_host_0(hosts: Hosts) -> str:
    address = str(_resolve(hosts)[4][0])
    if not hosts.alone and (address.startswith("127.") or address == "::1"):
        raise ValueError(
            f"MASTER_ADDR {hosts.address} is {address} on {_me(hosts)}, where no other host reaches it; "
            "give an address in the network that the hosts share"
        )
    return address


def _reach_host_0(hosts: Hosts) -> str:
    """Waits until host 0 answers; the address of this host on the way there."""
    deadline = time.monotonic() + hosts.join_seconds
    while True:
        try:
            there = _resolve(hosts)[4]  # in a cluster a name may come later than a host
            with socket.create_connection(there[:2], timeout=5) as connection:
                return str(connection.getsockname()[0])
        except (OSError, ValueError) as error:
            if time.monotonic() > deadline:
                raise ValueError(
                    f"{_me(hosts)} does not reach host 0 at {hosts.address}, port {hosts.port}, within "
                    f"{hosts.join_seconds} s: {getattr(error, 'strerror', None) or error}; start the same command "
                    "there with NODE_RANK 0, and let the hosts reach each other on every port"
                ) from None
        time.sleep(_TRY_AGAIN_SECONDS)
