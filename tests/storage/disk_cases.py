"""What a process does whose disk is full: a small file system in a mount namespace of its own, which goes with it."""

from __future__ import annotations

import ctypes
import errno
import logging
import multiprocessing
import os
import socket
import struct
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from storage import Checkpointer, JobIdentity, inspection, open_store
from storage.agent import PREFIX, AgentEnvironment
from storage.arena import memory_file
from storage.saving import writing
from storage.service.keeper import KeeperSafe
from storage.service.memory import HeldStates
from storage.service.notes import Notes
from tests.cluster import until
from tests.storage.service_cases import PATIENCE_S, committed, in_thread

_CLONE_NEWNS = 0x00020000
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000
DISK_BYTES = 4 << 20
Told = list[tuple[str, dict[str, Any]]]


def run(case: Callable[[Path], Any], disk: Path) -> Any:
    """What `case` returns in a process of its own, to which `disk` is a file system of 4 MiB."""
    disk.mkdir(exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    mine, its = context.Pipe()
    process = context.Process(target=_run, args=(its, case, disk))
    process.start()
    its.close()
    try:
        assert mine.poll(2 * PATIENCE_S), "no answer"
        refusal, error, result = mine.recv()
    finally:
        process.kill()
        process.join(PATIENCE_S)
        mine.close()
    if refusal:
        pytest.skip(refusal)
    assert not error, error
    return result


def _run(pipe: Connection, case: Callable[[Path], Any], disk: Path) -> None:
    refusal = error = result = None
    for name in [name for name in os.environ if name.startswith(PREFIX)]:
        del os.environ[name]  # of whichever test the fork server was started in
    try:
        refusal = _mount(disk)
        result = None if refusal else case(disk)
    except BaseException:
        error = traceback.format_exc()
    pipe.send((refusal, error, result))


def _mount(path: Path) -> str | None:
    """Mount a small file system there, for this process alone; why that cannot be."""
    libc = ctypes.CDLL(None, use_errno=True)
    calls = (
        lambda: libc.unshare(_CLONE_NEWNS),
        lambda: libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None),
        lambda: libc.mount(b"tmpfs", os.fsencode(path), b"tmpfs", 0, f"size={DISK_BYTES}".encode()),
    )
    for call in calls:
        if call() != 0:
            return f"a file system cannot be mounted here: {os.strerror(ctypes.get_errno())}"
    return None


def fill(folder: Path) -> Path:
    """Leave no block free; the file that has them."""
    path = folder / "filler"
    with path.open("wb", buffering=0) as file:
        for size_bytes in (1 << 20, 4096):
            try:
                while True:
                    file.write(bytes(size_bytes))
            except OSError:
                continue
    return path


def state(step: int, size_bytes: int) -> dict[str, Any]:
    """A tensor of that size, and a value."""
    return {"w": torch.full((size_bytes // 4,), float(step)), "n": step}


def under_an_agent(path: Path, events: Path) -> None:
    """Have Checkpointers of this process use the service at `path`, and write their events there."""
    for name, text in {"service": str(path), "node": "a", "events": str(events), "lineage": "l"}.items():
        os.environ[AgentEnvironment.variable(name)] = text


def saves_to_a_full_disk(disk: Path) -> list[str]:
    """Save what has no room between two states that have, directly; then what is there. The events."""
    return _save_all(disk / "run")


def saves_too_much_in_many_objects(disk: Path) -> list[str]:
    """Save what has room for most of its objects but not for all, twice, then what needs nearly all of the disk."""
    writing.OBJECT_SIZE_BYTES = 1 << 20
    run, told = disk / "run", Told()
    with Checkpointer(run, on_event=lambda name, fields: told.append((str(name), fields))) as ckpt:
        for step, num in ((1, 6), (2, 6), (3, 3)):
            ckpt.save(step, {str(n): torch.full((240 << 10,), float(n)) for n in range(num)}, wait=True)
            assert ckpt.wait() == (num == 3), told
            assert num == 3 or not list(run.rglob("*.distcp")), "nobody can ever commit that"
    assert committed(run) == [3]
    return [name for name, _ in told]


def saves_to_a_full_disk_by_the_service(disk: Path) -> list[str]:
    """The same by the service, which holds in memory what the disk has no room for."""
    folder = disk.parent / "node"
    under_an_agent(folder / "service.sock", disk / "events.jsonl")
    with in_thread(folder / "service.sock", held=HeldStates()) as service:
        events = _save_all(disk / "run")
        until("the end of it", lambda: service.status().num_unfinished == 0)
        with Checkpointer(disk / "run", job=JobIdentity(lineage="l", generation=1)) as ckpt:
            ckpt.save(5, state(5, 8 << 20), wait=True)
            assert not ckpt.wait()
        found, told = state(0, 8 << 20), Told()
        job = JobIdentity(lineage="l", generation=2)
        with Checkpointer(disk / "run", job=job, on_event=lambda n, f: told.append((str(n), f))) as ckpt:
            assert (ckpt.restore(found), found["n"], float(found["w"].min())) == (5, 5, 5.0), "from memory"
        assert dict(told)["restored"]["from_own"] > 8 << 20
    return events


def _save_all(run: Path) -> list[str]:
    told = Told()
    job = JobIdentity(lineage="l", generation=1)
    with Checkpointer(run, keep=2, job=job, on_event=lambda name, fields: told.append((str(name), fields))) as ckpt:
        for step, size_bytes in ((1, 1 << 20), (2, 8 << 20), (3, 1 << 20), (4, 1 << 20)):
            ckpt.save(step, state(step, size_bytes), wait=True)
            assert ckpt.wait() == (step != 2), told
    (failed,) = [fields for name, fields in told if name == "checkpoint_failed"]
    assert (failed["step"], "No space left on device" in failed["reason"]) == (2, True)
    assert committed(run) == [4, 3]
    for step in (3, 4):
        assert inspection.verify(open_store(run), f"step-{step:09d}/").problems == ()
    return [name for name, _ in told]


def notes_on_a_full_disk(disk: Path) -> list[str]:
    """What a keeper notes down, and what a service and a worker write, where nothing can be; the log's lines."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("storage").addHandler(handler)
    folder, kept = disk / "private" / "kept", "x" * 100_000
    folder.parent.mkdir(0o700)
    notes = Notes(folder)
    notes.add("a", kept)
    under_an_agent(disk / "node" / "service.sock", disk / "events.jsonl")
    with in_thread(disk / "node" / "service.sock") as service:
        filler = fill(disk)
        notes.add("b", kept)
        assert [path.suffix for path in folder.iterdir()] == [".json"]
        assert [len(note.stage) for note in notes.all()] == [len(kept)]
        with Checkpointer(disk.parent / "elsewhere") as ckpt:
            ckpt.save(1, state(1, 1 << 20), wait=True)
            assert ckpt.wait()
        filler.unlink()
        notes.add("b", kept)
        assert len(notes.all()) == 2
        until("it to have ended in the service, too", lambda: service.status().num_ended == 1)
    assert committed(disk.parent / "elsewhere") == [1]
    return lines


def forbid_memfds() -> None:
    """From here on memfd_create is refused to this process."""
    forbid({"x86_64": 319, "aarch64": 279}[os.uname().machine])
    memory_file._memfd_flags.cache_clear()


def forbid(number: int) -> None:
    """From here on that system call is refused to this process, as by the filter of a sandbox (seccomp)."""
    rules = ((0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x00050000 | errno.EPERM), (0x06, 0, 0, 0x7FFF0000))
    data = b"".join(struct.pack("HBBI", *rule) for rule in rules)
    rows = ctypes.create_string_buffer(data, len(data))
    program = struct.pack("HxxxxxxQ", len(rules), ctypes.addressof(rows))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    assert libc.prctl(22, 2, program, 0, 0) == 0


def saves_without_memfds(disk: Path) -> list[str]:
    """By the service, which holds them in memory; what is restored from there. The events."""
    forbid_memfds()
    folder, told, found = disk.parent / "node", Told(), state(0, 8 << 20)
    under_an_agent(folder / "service.sock", disk.parent / "events.jsonl")
    keep, job = KeeperLink(), JobIdentity(lineage="l", generation=1)
    with in_thread(folder / "service.sock", held=HeldStates(keeper=keep.safe)):
        with Checkpointer(disk.parent / "run", job=job, on_event=lambda n, f: told.append((str(n), f))) as ckpt:
            ckpt.save(1, state(1, 8 << 20), wait=True)
            assert ckpt.wait()
        job = JobIdentity(lineage="l", generation=2)
        with Checkpointer(disk.parent / "run", job=job, on_event=lambda n, f: told.append((str(n), f))) as ckpt:
            assert (ckpt.restore(found), float(found["w"].min())) == (1, 1.0)
        assert dict(told)["restored"]["from_own"] > 8 << 20
    keep.close()
    assert not list(Path("/dev/shm").glob("elastic-moe*"))
    return [name for name, _ in told]


def saves_without_any_memory_to_share(disk: Path) -> str:
    """Why a save fails without memfds whose /dev/shm has no room, and why none does that has too little."""
    forbid_memfds()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mount(os.fsencode(disk), b"/dev/shm", None, 0x1000, None) == 0
    told = Told()
    with Checkpointer(disk.parent / "run", on_event=lambda name, fields: told.append((str(name), fields))) as ckpt:
        ckpt.save(1, state(1, 1 << 20), wait=True)
        assert ckpt.wait()
        ckpt.save(2, state(2, 8 << 20), wait=True)
        assert not ckpt.wait()
    assert committed(disk.parent / "run") == [1]
    return str(dict(told)["checkpoint_failed"]["reason"])


class KeeperLink:
    """A keeper's end of a link that only lets go of what it is told."""

    def __init__(self) -> None:
        self._mine, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.safe, self._its = KeeperSafe(its, []), its

    def close(self) -> None:
        self._mine.close()
        self._its.close()


def saves_with_a_full_dev_shm(disk: Path) -> list[str]:
    """Slots have no name there, so a container's small /dev/shm does not matter."""
    (disk / "shm").mkdir()
    fill(disk)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mount(os.fsencode(disk), b"/dev/shm", None, 0x1000, None) == 0
    folder = disk.parent / "node"
    under_an_agent(folder / "service.sock", disk.parent / "events.jsonl")
    told = Told()
    with (
        in_thread(folder / "service.sock", held=HeldStates()),
        Checkpointer(disk.parent / "run", on_event=lambda name, fields: told.append((str(name), fields))) as ckpt,
    ):
        ckpt.save(1, state(1, 8 << 20), wait=True)
        assert ckpt.wait()
    assert committed(disk.parent / "run") == [1]
    return [name for name, _ in told]
