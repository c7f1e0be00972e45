"""Real nodes on this machine: each an `elastic-moe run` of its own, ended whatever a test does."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

import psutil

from tests.template import child_environment, template

T = TypeVar("T")
DEADLINE_S = 60.0
LEASE_TTL_S = 15.0
"""Of nodes in whose tests no lease has to end: a busy machine may keep an agent from renewing for seconds."""
FIRST_PORT = 12_000  # of the servers of tests
_NUM_PARTS = 8  # each process of a run has ports of its own
_given: set[int] = set()


def free_port() -> int:
    """A port nobody listens on now.

    None of those that the kernel gives to outgoing connections: who listens on it, ends and starts anew, would find it
    taken by anybody's client once in a while. None that another process of this run may be given before it is bound,
    nor one that was given before.
    """
    first_of_clients = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    part = re.sub(r"\D", "", os.environ.get("PYTEST_XDIST_WORKER", "")) or "0"
    num_ports = max(first_of_clients - FIRST_PORT, 4096) // _NUM_PARTS
    while True:
        port = FIRST_PORT + int(part) % _NUM_PARTS * num_ports + random.SystemRandom().randrange(num_ports)
        if port in _given and len(_given) < num_ports // 2:
            continue
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            _given.add(port)
            return port


def free_port_pair() -> tuple[int, int]:
    """Two such ports, next to each other."""
    while True:
        port = free_port()
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port + 1))
            if port + 1 not in _given:
                _given.add(port + 1)
                return port, port + 1


def until(what: str, condition: Callable[[], T | None], within_s: float = DEADLINE_S) -> T:
    """Wait for `condition` to hold and return what it returned; fail with `what` if it does not in time."""
    ends_s = time.monotonic() + within_s
    while True:
        found = condition()
        if found:
            return found
        if time.monotonic() >= ends_s:
            raise AssertionError(f"not within {within_s:g} s: {what}")
        time.sleep(0.02)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a JSONL file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().split("\n")[:-1] if line]


class Process(Protocol):
    """As much of `subprocess.Popen` as a node needs."""

    pid: int

    def poll(self) -> int | None: ...
    def wait(self, timeout: float) -> int: ...
    def send_signal(self, signum: int) -> None: ...
    def kill(self) -> None: ...


class Node:
    """One agent and the workers it starts."""

    def __init__(self, cluster: Cluster, name: str, arguments: list[str]) -> None:
        self.name = name
        self._log = cluster.folder / f"{name}.log"
        environment = child_environment(**cluster.environment)
        with self._log.open("ab") as log:
            self.process = cluster.spawn(name, ["run", "--node-name", name, *arguments], environment, log.fileno())

    @property
    def output(self) -> str:
        """What the agent and its workers printed."""
        return self._log.read_text(errors="replace")

    def tree(self) -> list[psutil.Process]:
        """The live worker processes and their children."""
        try:
            return [p for p in psutil.Process(self.process.pid).children(recursive=True) if alive(p)]
        except psutil.NoSuchProcess:
            return []

    def kill_agent(self) -> None:
        """SIGKILL to the agent alone."""
        self.process.kill()

    def kill(self) -> None:
        """SIGKILL to the agent and all its workers at once: what is left of a node whose power goes."""
        victims = [*self.tree(), psutil.Process(self.process.pid)]
        for victim in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.suspend()
        for victim in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()

    def terminate(self) -> None:
        """SIGTERM to the agent, and wait until it has left."""
        self.signal(signal.SIGTERM)
        self.wait()

    def signal(self, signum: signal.Signals) -> None:
        """Send the agent a signal."""
        self.process.send_signal(signum)

    def wait(self, within_s: float = DEADLINE_S) -> int:
        """The agent's exit code."""
        try:
            return self.process.wait(within_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} did not end within {within_s:g} s:\n{self.output}") from None

    def end(self) -> None:
        """Leave nothing behind."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self.kill()
        self.process.wait(60)


def alive(process: psutil.Process) -> bool:
    """Whether a process still runs (a zombie does not)."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def is_running(pid: int) -> bool:
    """Whether there is a process of that id; a zombie, which nobody has looked at yet, is none."""
    try:
        return alive(psutil.Process(pid))
    except psutil.NoSuchProcess:
        return False


class Cluster:
    """Nodes that meet at one store, an embedded one by default, and share one `events.jsonl`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.is_fresh = False
        """Whether agents are new interpreters, and not forks of one that has made their imports."""
        self.backend = "embedded"
        self.endpoint = f"127.0.0.1:{free_port()}"
        self.environment: dict[str, str] = {}
        self._nodes: list[Node] = []

    def start(self, name: str, *arguments: str, nnodes: str = "1:2", nproc: int = 1, conf: str = "") -> Node:
        """Start a node; `arguments` are further options, the script and its arguments."""
        if "lease_ttl=" not in conf:
            conf = ",".join(filter(None, (conf, f"lease_ttl={LEASE_TTL_S:g}")))
        options = ["--nnodes", nnodes, "--nproc-per-node", str(nproc), "--rdzv-endpoint", self.endpoint]
        options += [
            "--rdzv-backend",
            self.backend,
            "--rdzv-id",
            "test",
            "--log-dir",
            str(self.folder),
            "--shutdown-timeout",
            "5",
        ]
        options += ["--rdzv-conf", conf]
        node = Node(self, name, [*options, *arguments])
        self._nodes.append(node)
        return node

    def spawn(self, name: str, arguments: list[str], environment: dict[str, str], log: int) -> Process:
        """Run `elastic-moe ARGUMENTS` for the node of this name, in a session of its own."""
        if not self.is_fresh:
            return template().start("elastic-moe", arguments, environment, log)
        command = [sys.executable, "-m", "elastic_moe", *arguments]
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)

    def events(self, event: str | None = None, **fields: Any) -> list[dict[str, Any]]:
        """The events so far, those named `event` with these fields."""
        found = read_lines(self.folder / "events.jsonl")
        return [e for e in found if event in (None, e["event"]) and all(e.get(k) == v for k, v in fields.items())]

    def wait_event(self, event: str, within_s: float = DEADLINE_S, **fields: Any) -> dict[str, Any]:
        """Wait for an event; the first such."""
        try:
            return until(f"event {event} {fields}", lambda: self.events(event, **fields), within_s)[0]
        except AssertionError as error:
            logs = "\n".join(f"--- {node.name}\n{node.output}" for node in self._nodes)
            raise AssertionError(f"{error}\n{logs}") from None

    def end(self) -> None:
        """End every node."""
        for node in self._nodes:
            node.end()


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """A cluster that is gone afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    made = Cluster(folder)
    try:
        yield made
    finally:
        made.end()
