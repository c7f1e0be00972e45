"""A checkpoint service within the test's process, and one of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from storage import open_store
from storage.run import catalog
from storage.service import address, starting
from storage.service.channel import Channel, connect, welcome
from storage.service.memory import HeldStates
from storage.service.messages import AskStatus, Hello, ServiceMessage, ServiceStatus, Stage, Welcome
from storage.service.server import Server, ServerOptions
from storage.stores.local import LocalStore
from tests.cluster import read_lines, until

PATIENCE_S = 60.0


class ListSafe:
    """A keeper's side that only notes what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []

    def keep(self, name: str, stage: Stage, fds: Sequence[int]) -> None:
        self.told.append(("keep", name))

    def stored(self, name: str) -> None:
        self.told.append(("stored", name))

    def released(self, name: str) -> None:
        self.told.append(("released", name))

    def done(self, name: str) -> None:
        self.told.append(("done", name))

    def of(self, what: str) -> list[str]:
        """The saves of which that was told, once each."""
        return list(dict.fromkeys(name for told, name in list(self.told) if told == what))


class InThread:
    """A server on a thread of this process."""

    def __init__(
        self, path: Path, options: ServerOptions, held: HeldStates | None = None, lifeline: int | None = None
    ) -> None:
        self.path, self.safe, self.held = path, ListSafe(), held
        self._others = set(threading.enumerate())
        self.server = Server(address.listen(path), options, self.safe, holder=held, lifeline=lifeline)
        if held is not None:
            held.serve(self.server)
        self.thread = threading.Thread(target=self.server.run, name="service", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def close(self) -> None:
        """End the server. What its lanes are in the midst of goes on, as in a process that was only frozen."""
        self.server.stop()
        if self.thread.ident is not None:
            self.thread.join(PATIENCE_S)
            assert not self.thread.is_alive()
        if self.held is not None:
            self.held.close()

    def await_lanes(self) -> None:
        """Wait for what goes on: it belongs to this test, and what it logs, opens and patches is no other's."""
        for thread in threading.enumerate():
            if thread not in self._others and thread.name.startswith(("lane-", "hold-", "caller")):
                thread.join(PATIENCE_S)
                assert not thread.is_alive(), thread.name

    def status(self) -> ServiceStatus:
        return status(self.path)


class Gate:
    """Holds puts of the service up until it is opened."""

    def __init__(self) -> None:
        self.opened, self.reached = threading.Event(), threading.Event()

    def pass_through(self) -> None:
        self.reached.set()
        assert self.opened.wait(60)


class Gated(LocalStore):
    """A folder whose data objects, or `.metadata`, wait at a gate."""

    def __init__(self, root: str, gate: Gate, where: str) -> None:
        super().__init__(root)
        self._gate, self._where = gate, where

    def put(self, key: str, *args: Any, **kwargs: Any) -> Any:
        if self._where in key:
            self._gate.pass_through()
        return super().put(key, *args, **kwargs)

    def put_from(self, key: str, *args: Any, **kwargs: Any) -> Any:
        if self._where in key:
            self._gate.pass_through()
        return super().put_from(key, *args, **kwargs)


@contextlib.contextmanager
def in_thread(
    path: Path, options: ServerOptions | None = None, held: HeldStates | None = None, lifeline: int | None = None
) -> Iterator[InThread]:
    """A server that serves within the block, with a memory of states if it is given one."""
    service = InThread(path, options or ServerOptions(linger_s=PATIENCE_S, wind_up_s=PATIENCE_S), held, lifeline)
    service.start()
    try:
        yield service
    finally:
        service.close()
        service.await_lanes()


@contextlib.contextmanager
def connected(path: Path, session: str = "") -> Iterator[Channel]:
    """A connection to the service at `path`."""
    channel, _ = connect(path, Hello(pid=os.getpid(), session=session))
    try:
        yield channel
    finally:
        channel.close()


def asked(channel: Channel, message: ServiceMessage) -> ServiceMessage:
    """What it answers."""
    channel.send(message)
    received = channel.receive()
    assert received is not None
    return received[0]


@contextlib.contextmanager
def answering(path: Path, *answers: ServiceMessage | None) -> Iterator[list[ServiceMessage]]:
    """A listener that answers one question of each connection, or ends that instead (None); what it was asked."""
    asked: list[ServiceMessage] = []
    address.used(path).parent.mkdir(0o700, exist_ok=True)
    address.used(path).touch()

    def serve() -> None:
        for answer in answers:
            channel, _ = welcome(listener.accept()[0], Welcome(pid=os.getpid()))
            with contextlib.closing(channel):
                received = channel.receive()
                assert received is not None
                asked.append(received[0])
                if answer is not None:
                    channel.send(answer)

    with contextlib.closing(address.listen(path)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield asked
        thread.join(PATIENCE_S)


def status(path: Path) -> ServiceStatus:
    """How the service at `path` is."""
    with connected(path) as channel:
        found = asked(channel, AskStatus())
    assert isinstance(found, ServiceStatus)
    return found


class Process:
    """A service of its own: the keeper that was started, and the service that this has forked.

    It is as an agent's is, which this process stands for, or (`is_alone`) as one is that nobody looks after.
    """

    def __init__(self, path: Path, *arguments: str, is_alone: bool = False) -> None:
        self.path = path
        self._lifeline, its = os.pipe()
        lifeline = [] if is_alone else ["--lifeline", str(self._lifeline)]
        self.keeper = subprocess.Popen(
            [*starting.command_line(path), "--nice", "0", *lifeline, *arguments],
            env=starting.environment(os.environ),
            pass_fds=[] if is_alone else [self._lifeline],
        )
        os.close(self._lifeline)
        self._lifeline = its

    def end(self) -> None:
        """Kill all of it, as far as it is there."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.keeper.pid).children():
                process.kill()
        self.keeper.kill()
        self.keeper.wait(PATIENCE_S)
        os.close(self._lifeline)

    def status(self) -> ServiceStatus | None:
        with contextlib.suppress(OSError):
            return status(self.path)
        return None

    def pid(self) -> int:
        return until("the service", self.status).pid

    def kill_service(self) -> None:
        os.kill(self.pid(), signal.SIGKILL)

    def log(self) -> str:
        return starting.log_of(self.path).read_text()


@contextlib.contextmanager
def process(path: Path, *arguments: str, is_alone: bool = False) -> Iterator[Process]:
    """A service of its own within the block."""
    service = Process(path, *arguments, is_alone=is_alone)
    try:
        until("its socket", path.exists)  # an agent's has long been there: nobody looks for its memory for long
        yield service
    finally:
        service.end()


def committed(url: Path) -> list[int]:
    """The committed steps of a run, newest first."""
    return catalog.committed_steps(open_store(url))


def events_in(path: Path) -> list[dict[str, Any]]:
    """The events of an agent's file."""
    return read_lines(path)
