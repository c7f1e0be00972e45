"""The process that starts the service's, and again after a crash, with what that had taken over.

It holds a copy of every descriptor that the service has accepted, and does nothing else, so that it does not crash
itself: it imports nothing but Python's own. The service is a fork of it, and inherits what there is.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import json
import logging
import os
import select
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from storage.arena.memory_file import memory_of
from storage.service import address
from storage.service.notes import Notes
from storage.service.sweeper import Sweeper
from storage.text import DiscreetFormatter

log = logging.getLogger(__name__)

_PACKET_BYTES_MAX = 64 * 1024
_FDS_MAX = 4
_TELL_S_MAX = 5.0  # a keeper that is stopped reads nothing
_BACKOFF_S = (0.0, 0.1, 0.5, 2.0, 5.0)
_QUIET_S = 60.0
"""After so long without a crash the next one is the first again."""
_LOOK_MS = 1000
_SWEPT_S_MAX = 2.0  # for so long another one may look through what one before this has left here
FIRST_CALLER_S = 60.0
PART = "part:"
"""How the names of parts in memory begin that are no saves: see `storage.service.guests`. No session is called so."""
_KILLS_MAX = 3  # in a row, for whatever reason, before memory is let go of
_LACK_S = 2.0  # others need some, too
_PR_SET_PDEATHSIG = 1


@dataclass
class Kept:
    """What the service had accepted: memory with the JSON of a `Stage`, and the descriptors that came with it.

    `is_stored`: the rank's part is in the store. `is_released`: the memory behind the descriptors may hold something
    else by now. `is_done`: what became of it was told.
    """

    paper: int
    fds: list[int]
    is_stored: bool = False
    is_released: bool = False
    is_done: bool = False
    num_crashes: int = 0

    @property
    def stage(self) -> str:
        """The JSON."""
        return _text_in(self.paper)

    @property
    def size_bytes(self) -> int:
        """Of the memory behind the descriptors."""
        return sum(os.fstat(fd).st_size for fd in self.fds)

    def is_of_another_node(self, name: str) -> bool:
        """Whether this node has it as a copy."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return name.startswith(PART) and bool(json.loads(self.stage)["of_node"])
        return False

    def close(self) -> None:
        """Let go of all of it."""
        for fd in (self.paper, *self.fds):
            os.close(fd)


@dataclass
class State:
    """What outlives the service's process: what it has, by name, what it wants to know again, and how often it crashed.

    A save is kept until its end was told, and for as long as its state is held in memory. `notes` are of what workers
    have staged: of all that is kept, and maybe of more, of which nothing is left. `shed_bytes`: of what is let go of
    since the last one crashed.
    """

    notes: Notes
    kept: dict[str, Kept] = field(default_factory=dict)
    remembered: dict[str, str] = field(default_factory=dict)
    num_restarts: int = 0
    shed_bytes: int = 0

    def heed(self, packet: bytes, fds: list[int]) -> None:
        """Take in what the service says; the descriptors are this object's from here on."""
        left = fds
        try:
            what, name = json.loads(packet)
            match what:
                case "keep" if fds:
                    self._drop(name)
                    self.kept[name], left = Kept(fds[0], fds[1:]), []
                case "remember" if fds:
                    self.remembered[name] = _text_in(fds[0])
                case "stored" | "released" | "done" if name in self.kept:
                    self._mark(name, what)
        finally:
            for fd in left:
                os.close(fd)

    def crashed(self) -> None:
        """The service's process has ended before its time."""
        for kept in self.kept.values():
            kept.num_crashes += 1
        self.num_restarts += 1

    def shed(self) -> None:
        """Let go of what is in memory alone: of copies for other nodes, or, where there is none, of all of it."""
        held = {name: kept for name, kept in self.kept.items() if kept.is_done}
        others = {name: kept for name, kept in held.items() if kept.is_of_another_node(name)}
        for name, kept in (others or held).items():
            self.shed_bytes += kept.size_bytes
            self._drop(name)

    def _mark(self, name: str, what: str) -> None:
        kept = self.kept[name]
        setattr(kept, f"is_{what}", True)
        if kept.is_done and kept.is_released:
            self._drop(name)

    def _drop(self, name: str) -> None:
        if (kept := self.kept.pop(name, None)) is not None:
            kept.close()


class KeeperSafe:
    """The service's side: a `storage.service.lanes.Safe` that tells the keeper. Thread-safe.

    A keeper that does not read is waited for once, for `patience_s`. What it could not be told it hears once it reads
    again.
    """

    def __init__(self, link: socket.socket, known: Sequence[str], patience_s: float = _TELL_S_MAX) -> None:
        self._link = link
        seconds, fraction = divmod(patience_s, 1.0)  # the kernel's: Python's own asks for a link that is mostly empty
        link.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(seconds), int(fraction * 1e6)))
        self._known = set(known)
        self._lock = threading.Lock()
        self._unsaid: list[tuple[str, str]] = []
        self._is_deaf = False

    def keep(self, name: str, stage: str, fds: Sequence[int]) -> None:
        """Keep `fds`; where that cannot be, the save is as safe as the service."""
        with self._lock:
            if name in self._known:
                return
            self._known.add(name)
            self._tell("keep", name, stage, fds)

    def stored(self, name: str) -> None:
        """See `storage.service.lanes.Safe`."""
        self._say("stored", name)

    def released(self, name: str) -> None:
        """See `storage.service.lanes.Safe`."""
        self._say("released", name)

    def done(self, name: str) -> None:
        """See `storage.service.lanes.Safe`."""
        self._say("done", name)

    def remember(self, name: str, text: str) -> None:
        """Have a service that is started after a crash know that."""
        with self._lock:
            self._tell("remember", name, text)

    def _say(self, what: str, name: str) -> None:
        with self._lock:
            if what == "done":
                self._known.discard(name)
            self._unsaid.append((what, name))
            self._catch_up()

    def _catch_up(self) -> bool:
        """Say what is unsaid; whether all of it was."""
        while self._unsaid:
            if not self._send(self._unsaid[0], []):
                return False
            del self._unsaid[0]
        return True

    def _tell(self, what: str, name: str, text: str, fds: Sequence[int] = ()) -> None:
        """With a text, which may be long: it goes by a descriptor."""
        try:
            paper = memory_of("elastic-moe-note", text.encode())
        except OSError as error:
            log.warning("the keeper cannot be told %s of %s: %s", what, name, error)
            return
        try:
            if self._catch_up():
                self._send((what, name), [paper, *fds])
        finally:
            os.close(paper)

    def _send(self, words: tuple[str, str], fds: Sequence[int]) -> bool:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        flags = socket.MSG_NOSIGNAL | (socket.MSG_DONTWAIT if self._is_deaf else 0)
        try:
            self._link.sendmsg([json.dumps(words).encode()], rights, flags)
        except OSError as error:
            log.warning("the keeper cannot be told %s of %s: %s", *words, error)
            self._is_deaf = True
            return isinstance(error, ConnectionError)  # it is gone, and this process goes with it
        self._is_deaf = False
        return True


def _text_in(fd: int) -> str:
    return os.pread(fd, os.fstat(fd).st_size, 0).decode()


Serve = Callable[[socket.socket, socket.socket, State], None]
"""The service: its listening socket, its link to the keeper, what it has to take up."""


def keep(path: Path, serve: Serve, lifeline: int | None, first_caller_s: float = FIRST_CALLER_S) -> int:
    """Have `serve` run in a child process, once somebody connects, until it returns. Returns an exit code.

    Nobody is waited for longer than the `lifeline` lasts, or, without one, than `first_caller_s`; nor is anybody if
    there is something to tell that a keeper before this one has left.
    """
    hear_signals()
    lock = address.lock(path, _SWEPT_S_MAX)
    if lock is None:
        log.info("a service listens at %s already", path)
        return 0
    with contextlib.ExitStack() as ends:
        if lifeline is None:  # else the files are in the folder of an agent, which sees to that
            ends.callback(Sweeper(lock).close)
        ends.callback(address.remove, path)
        address.sweep(path.parent, path, Notes(address.kept(path)).take_over)
        return _Keeping(address.listen(path), serve, path).run(lifeline, first_caller_s)


def hear_signals() -> None:
    """Hear of signals whatever whoever started this process wanted to hear: ignored or blocked ones stay so for it.

    Where the end of children is ignored (SIGCHLD, by a shell's `trap`, say) nobody can wait for one.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


class _Keeping:
    def __init__(self, listener: socket.socket, serve: Serve, path: Path) -> None:
        self._listener = listener
        self._path = path
        self._serve = serve
        self._state = State(Notes(address.kept(path)))
        self._child = 0
        self._is_ending = False
        self._num_oom_kills = 0

    def run(self, lifeline: int | None, first_caller_s: float) -> int:
        signal.signal(signal.SIGTERM, self._end)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's, which is for the training
        if not self._state.notes.all() and not self._await_caller(lifeline, first_caller_s):
            return 0
        num_in_a_row, began_s = 0, time.monotonic()
        while True:
            status = self._run_once()
            if status == 0 or self._is_ending:
                return 0
            self._state.crashed()
            num_in_a_row = 1 if time.monotonic() - began_s > _QUIET_S else num_in_a_row + 1
            pause_s = _BACKOFF_S[min(num_in_a_row, len(_BACKOFF_S)) - 1]
            log.warning("the checkpoint service has ended (status %d); it is started again", status)
            if status == -signal.SIGKILL and (num_oom_kills() > self._num_oom_kills or num_in_a_row >= _KILLS_MAX):
                pause_s = max(pause_s, _LACK_S)
                self._state.shed()
                log.warning("memory may be what it lacks: %d bytes that it held are let go of", self._state.shed_bytes)
            time.sleep(pause_s)
            began_s = time.monotonic()

    def _await_caller(self, lifeline: int | None, first_caller_s: float) -> bool:
        """Whether somebody has connected: a job that saves nothing needs no more of a service than this."""
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        if lifeline is not None:
            poll.register(lifeline, 0)
        ends_s = time.monotonic() + first_caller_s
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
        self._num_oom_kills = num_oom_kills()
        with mine:
            with its:
                parent = os.getpid()
                with contextlib.suppress(OSError):  # its folder was removed with its agent's
                    address.used(self._path).touch(0o600)
                self._child = os.fork()
                if self._child == 0:
                    self._become_service(its, mine, parent)
                self._state.shed_bytes = 0  # its own to tell
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
            self._num_oom_kills = num_oom_kills()  # until then it was not it
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
            with contextlib.suppress(Exception):  # there is no stdout where whoever started this had none
                logging.shutdown()
                sys.stdout.flush()
            os._exit(status)


def num_oom_kills() -> int:
    """How many processes of this machine the kernel has killed for lack of memory; 0 if that is not known."""
    with contextlib.suppress(OSError, ValueError), open("/proc/vmstat") as file:
        for line in file:
            name, _, number = line.partition(" ")
            if name == "oom_kill":
                return int(number)
    return 0


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
    handler = logging.StreamHandler()
    handler.setFormatter(DiscreetFormatter("%(asctime)s checkpoint service [%(process)d]: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
