"""The process that starts the service's, and again after a crash, with what that had taken over.

It holds a copy of every descriptor that the service has accepted, and does nothing else, so that it does not crash
itself: it imports nothing but Python's own. The service is a fork of it, and inherits what there is.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import logging
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from storage.service import address

log = logging.getLogger(__name__)

_PACKET_BYTES_MAX = 128 * 1024
_FDS_MAX = 4
_BACKOFF_S = (0.0, 0.1, 0.5, 2.0, 5.0)
_QUIET_S = 60.0
"""After so long without a crash the next one is the first again."""
_LOOK_MS = 1000
_FIRST_CALLER_S = 60.0
_PR_SET_PDEATHSIG = 1


@dataclass
class Kept:
    """What the service had accepted: the JSON of a `Stage`, and the descriptors that came with it."""

    stage: str
    fds: list[int]
    is_stored: bool = False
    num_crashes: int = 0


class Notes:
    """Files that outlive this process as well: they say what it had, should it be killed with all that it holds."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def take(self) -> list[str]:
        """What was noted by a keeper before this one, which is gone: the JSON of each `Stage`."""
        found = []
        for file in sorted(self._folder.glob("*.json")):
            with contextlib.suppress(OSError):
                found.append(file.read_text())
                file.unlink()
        return found

    def add(self, name: str, stage: str) -> None:
        """Note one down; a full disk costs the note."""
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            with open(os.open(self._file(name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                file.write(stage)
        except OSError as error:
            log.warning("what is staged cannot be noted down in %s: %s", self._folder, error)

    def drop(self, name: str) -> None:
        """It has come to its end."""
        with contextlib.suppress(OSError):
            self._file(name).unlink(missing_ok=True)

    def _file(self, name: str) -> Path:
        return self._folder / f"{hashlib.blake2b(name.encode(), digest_size=16).hexdigest()}.json"


@dataclass
class State:
    """What outlives the service's process: what it has to do, by name, and how often it has crashed.

    `lost` are stages of which a keeper that was killed has left nothing but a note.
    """

    notes: Notes
    lost: list[str] = field(default_factory=list)
    kept: dict[str, Kept] = field(default_factory=dict)
    num_restarts: int = 0

    def heed(self, packet: bytes, fds: list[int]) -> None:
        """Take in what the service says of one save."""
        what, name, stage = json.loads(packet)
        match what:
            case "keep":
                self.kept[name] = Kept(stage, fds)
                self.notes.add(name, stage)
                return
            case "stored" if name in self.kept:
                self.kept[name].is_stored = True
            case "done":
                self.notes.drop(name)
                for fd in self.kept.pop(name, Kept("", [])).fds:
                    os.close(fd)
        for fd in fds:
            os.close(fd)


class KeeperSafe:
    """The service's side: a `storage.service.lanes.Safe` that tells the keeper. Thread-safe."""

    def __init__(self, link: socket.socket, known: Sequence[str]) -> None:
        self._link = link
        self._known = set(known)

    def keep(self, name: str, stage: str, fds: Sequence[int]) -> None:
        """Keep `fds`; where that cannot be, the save is as safe as the service."""
        if name not in self._known:
            self._known.add(name)
            self._tell("keep", name, stage, fds)

    def stored(self, name: str) -> None:
        """See `storage.service.lanes.Safe`."""
        self._tell("stored", name)

    def done(self, name: str) -> None:
        """See `storage.service.lanes.Safe`."""
        self._known.discard(name)
        self._tell("done", name)

    def _tell(self, what: str, name: str, stage: str = "", fds: Sequence[int] = ()) -> None:
        try:
            socket.send_fds(self._link, [json.dumps([what, name, stage]).encode()], list(fds))
        except OSError as error:
            log.warning("the keeper cannot be told %s of %s: %s", what, name, error)


Serve = Callable[[socket.socket, socket.socket, State], None]
"""The service: its listening socket, its link to the keeper, what it has to take up."""


def keep(path: Path, serve: Serve, lifeline: int | None) -> int:
    """Have `serve` run in a child process, once somebody connects, until it returns. Returns an exit code.

    Nobody is waited for longer than the `lifeline` lasts, or, without one, than a minute.
    """
    lock = address.lock(path)
    if lock is None:
        log.info("a service listens at %s already", path)
        return 0
    address.sweep(path.parent, path)
    listener = address.listen(path)
    try:
        return _Keeping(listener, serve, path).run(lifeline)
    finally:
        address.remove(path)


class _Keeping:
    def __init__(self, listener: socket.socket, serve: Serve, path: Path) -> None:
        self._listener = listener
        self._path = path
        self._serve = serve
        notes = Notes(address.kept(path))
        self._state = State(notes, notes.take())
        self._child = 0
        self._is_ending = False

    def run(self, lifeline: int | None) -> int:
        signal.signal(signal.SIGTERM, self._end)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's, which is for the training
        if not self._state.lost and not self._await_caller(lifeline):
            return 0
        num_in_a_row, began_s = 0, time.monotonic()
        while True:
            status = self._run_once()
            if status == 0 or self._is_ending:
                return 0
            for kept in self._state.kept.values():
                kept.num_crashes += 1
            self._state.num_restarts += 1
            self._state.lost.clear()
            num_in_a_row = 1 if time.monotonic() - began_s > _QUIET_S else num_in_a_row + 1
            log.warning("the checkpoint service has ended (status %d); it is started again", status)
            time.sleep(_BACKOFF_S[min(num_in_a_row, len(_BACKOFF_S)) - 1])
            began_s = time.monotonic()

    def _await_caller(self, lifeline: int | None) -> bool:
        """Whether somebody has connected: a job that saves nothing needs no more of a service than this."""
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        if lifeline is not None:
            poll.register(lifeline, 0)
        ends_s = time.monotonic() + _FIRST_CALLER_S
        while not self._is_ending and (lifeline is not None or time.monotonic() < ends_s):
            found = {fd for fd, _ in poll.poll(_LOOK_MS)}
            if self._listener.fileno() in found:
                return True
            if found:
                break
        return False

    def _end(self, signum: int, frame: object) -> None:
        self._is_ending = True
        if self._child:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._child, signal.SIGTERM)

    def _run_once(self) -> int:
        mine, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with mine:
            with its:
                parent = os.getpid()
                address.used(self._path).touch(0o600)
                self._child = os.fork()
                if self._child == 0:
                    self._become_service(its, mine, parent)
            self._listen(mine)
        _, status = os.waitpid(self._child, 0)
        self._child = 0
        return os.waitstatus_to_exitcode(status)

    def _listen(self, link: socket.socket) -> None:
        """Heed what the service says, until it is gone."""
        while True:
            packet, fds, _, _ = socket.recv_fds(link, _PACKET_BYTES_MAX, _FDS_MAX)
            if not packet:
                return
            try:
                self._state.heed(packet, fds)
            except (ValueError, OSError):
                log.exception("the service has said what cannot be understood")

    def _become_service(self, link: socket.socket, other: socket.socket, parent: int) -> None:
        status = 1
        try:
            other.close()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            die_with_parent(parent)
            self._serve(self._listener, link, self._state)
            status = 0
        except BaseException:
            log.exception("the checkpoint service has failed")
        finally:
            logging.shutdown()
            sys.stdout.flush()
            os._exit(status)


def die_with_parent(parent: int) -> None:
    """Have this process killed when its parent has died."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def settle(path: Path) -> None:
    """Become a process of its own: nobody's output is held open, and no terminal's signals come."""
    address.make_private(path.parent)
    os.chdir("/")
    with contextlib.suppress(OSError):  # it leads one already
        os.setpgid(0, 0)
    log_fd = os.open(path.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    null_fd = os.open(os.devnull, os.O_RDONLY)
    for fd, target in ((null_fd, 0), (log_fd, 1), (log_fd, 2)):
        os.dup2(fd, target)
    for fd in {log_fd, null_fd} - {0, 1, 2}:
        os.close(fd)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s checkpoint service [%(process)d]: %(message)s")
