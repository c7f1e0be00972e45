"""A network of a test's own: hosts in namespaces around a router, and cuts that drop packets without a word.

A star: every host has one veth to a namespace that forwards. A cut is a policy rule of the router, so neither end hears
of it (no refused connection, no ICMP, no link that goes down), each direction is cut by itself, and all that is needed
is iproute2. No namespace has a name: only descriptors of this process hold them, so the kernel removes everything
however the process ends, and runs beside one another cannot collide. The network of the machine itself is not touched.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

CLONE_NEWNET = 0x40000000
_ROUTER = "10.77.255.254"


@dataclass(frozen=True)
class Host:
    """Where processes run: their address, and the namespace that they enter (None: this machine's own)."""

    name: str
    address: str
    namespace: int | None
    files: Mapping[str, str] = field(default_factory=dict)
    """What this host has in place of the machine's own files: path -> path of what is there."""

    @property
    def enter(self) -> tuple[str, ...]:
        """What goes before a command to run it on this host."""
        return () if self.namespace is None else _enter(self.namespace)


def _path(namespace: int) -> str:
    return f"/proc/{os.getpid()}/fd/{namespace}"


def _enter(namespace: int) -> tuple[str, ...]:
    return ("nsenter", f"--net={_path(namespace)}")


def _new_namespace() -> int:
    """A descriptor of a new network namespace: made by a thread that ends in it. Raises OSError."""
    made: list[int] = []
    refused: list[OSError] = []

    def make() -> None:
        if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET) != 0:
            number = ctypes.get_errno()
            refused.append(OSError(number, f"unshare(CLONE_NEWNET): {os.strerror(number)}"))
        else:
            made.append(os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC))

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    if refused:
        raise refused[0]
    return made[0]


def _ip(namespace: int, *commands: str) -> None:
    done = subprocess.run(
        [*_enter(namespace), "ip", "-batch", "-"],
        input="\n".join(commands) + "\n",
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    if done.returncode != 0:
        raise OSError(f"ip: {done.stderr.strip()} (of {commands})")


@functools.cache
def why_no_cuts() -> str:
    """Why no network can be made and cut here, "" if it can."""
    missing = [tool for tool in ("ip", "nsenter") if shutil.which(tool) is None]
    if missing:
        return f"no network of its own: {', '.join(missing)} is not installed"
    try:
        with tempfile.TemporaryDirectory() as folder, network(Path(folder)) as made:
            a, b = made.host("a"), made.host("b")
            made.cut(a, b)
            made.heal()
    except OSError as error:
        return f"no network of its own: {error}"
    return ""


class Network:
    """Hosts that reach one another through a router, as far as nothing is cut.

    They know one another by name from a file of hosts, and have no DNS: a query is refused at once.
    """

    def __init__(self, folder: Path) -> None:
        self._names, resolver = folder / "hosts", folder / "resolv.conf"
        self._names.write_text("127.0.0.1 localhost\n")
        resolver.write_text("nameserver 127.0.0.1\n")
        self._files = {"/etc/hosts": str(self._names), "/etc/resolv.conf": str(resolver)}
        self._namespaces = [_new_namespace()]
        self._router = self._namespaces[0]
        self._cuts: list[str] = []
        _ip(self._router, "link set lo up", f"addr add {_ROUTER}/32 dev lo")
        forward = "echo 1 > /proc/sys/net/ipv4/ip_forward"
        subprocess.run([*_enter(self._router), "sh", "-c", forward], timeout=30, check=True)

    def host(self, name: str) -> Host:
        """A new host."""
        namespace = _new_namespace()
        index = len(self._namespaces)
        self._namespaces.append(namespace)
        address, port = f"10.77.0.{index}", f"port{index}"
        _ip(
            self._router,
            f"link add {port} type veth peer name eth0 netns {_path(namespace)}",
            f"addr add {_ROUTER}/32 peer {address}/32 dev {port}",
            f"link set {port} up",
        )
        _ip(
            namespace,
            "link set lo up",
            f"addr add {address}/32 peer {_ROUTER}/32 dev eth0",
            "link set eth0 up",
            f"route add default via {_ROUTER}",
        )
        with self._names.open("a") as names:
            names.write(f"{address} {name}\n")
        return Host(name, address, namespace, self._files)

    def cut(self, one: Host, *others: Host) -> None:
        """Nothing passes between `one` and each of the others any more."""
        self._drop([(a, b) for other in others for a, b in ((one, other), (other, one))])

    def cut_way(self, sender: Host, *receivers: Host) -> None:
        """What `sender` sends does not arrive; what it is sent does."""
        self._drop([(sender, receiver) for receiver in receivers])

    def _drop(self, ways: list[tuple[Host, Host]]) -> None:
        rules = [f"from {a.address} to {b.address} blackhole" for a, b in ways]
        _ip(self._router, *(f"rule add {rule}" for rule in rules))
        self._cuts += rules

    def heal(self) -> None:
        """Everything passes again."""
        cuts, self._cuts = self._cuts, []
        if cuts:
            _ip(self._router, *(f"rule del {rule}" for rule in cuts))

    def close(self) -> None:
        """Let go of the namespaces: the kernel removes each once nothing runs in it any more."""
        for namespace in self._namespaces:
            os.close(namespace)


class Loopback:
    """This machine for all hosts, where namespaces are not permitted: what needs no cut can run on it."""

    def host(self, name: str) -> Host:
        """A new name for this machine."""
        return Host(name, "127.0.0.1", None)


@contextlib.contextmanager
def network(folder: Path) -> Iterator[Network]:
    """A network that is gone afterwards. Raises OSError where it is not permitted."""
    made = Network(folder)
    try:
        yield made
    finally:
        made.close()
