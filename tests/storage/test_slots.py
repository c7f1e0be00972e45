"""A rank's slots in memory: what they promise, and that nothing is left of them."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import mmap
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from storage.arena import mapping
from storage.arena import slot as slots
from storage.arena.arena import Arena
from storage.arena.free_memory import free_bytes
from storage.arena.mapping import HUGE_PAGE_BYTES
from storage.arena.slot import Slot
from storage.format.tensors import tensor_over
from tests.cluster import until

MIB = 1024 * 1024


def slots_held() -> set[int]:
    """The inodes of all that this process has descriptors of; a mapping has one of its own."""
    gc.collect()
    found = set()
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if "memfd:elastic-moe-slot" in os.readlink(link):
                found.add(link.stat().st_ino)
    return found


def holders(inode: int) -> set[int]:
    """The processes that have a descriptor of that file, which has no name."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if link.stat().st_ino == inode and "memfd:elastic-moe-slot" in os.readlink(link):
                found.add(int(link.parts[2]))
    return found


def test_what_one_process_writes_another_has_by_the_descriptor() -> None:
    mine = Slot.create(5000)
    assert mine.size_bytes == 2 * mmap.PAGESIZE
    mine.memory[4990:5000] = b"0123456789"
    theirs = Slot.from_fd(os.dup(mine.fd))
    mine.close()
    assert bytes(theirs.memory[4990:5000]) == b"0123456789"
    theirs.close()
    theirs.close()
    with pytest.raises(ValueError, match="closed"):
        _ = theirs.fd


def test_a_slot_is_all_there_and_nobody_can_take_pages_away() -> None:
    slot = Slot.create(HUGE_PAGE_BYTES + 1)
    assert slot.size_bytes == 2 * HUGE_PAGE_BYTES
    assert os.fstat(slot.fd).st_blocks * 512 >= slot.size_bytes
    for size in (0, 4 * HUGE_PAGE_BYTES):
        with pytest.raises(OSError):
            os.ftruncate(slot.fd, size)
    assert fcntl.fcntl(slot.fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    slot.close()


def test_a_kernel_that_enters_no_pages_by_itself_gets_them_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapping, "_MADV_POPULATE_WRITE", 9999)
    slot = Slot.create(3 * MIB)
    assert os.fstat(slot.fd).st_blocks * 512 >= slot.size_bytes
    slot.close()


def test_tensors_keep_the_memory_of_a_slot_that_is_closed() -> None:
    before = slots_held()
    slot = Slot.create(100)
    tensor = tensor_over(slot.memory[64:], torch.float32, (4,))
    slot.close()
    assert tensor.fill_(2.0).sum() == 8
    del tensor
    assert not slots_held() - before


def test_lack_of_memory_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    before = slots_held()
    with pytest.raises(MemoryError, match=r"no room to stage \d+ MiB of the state: only \d+ MiB are free"):
        Slot.create(1 << 50)
    monkeypatch.setattr(slots, "free_bytes", lambda: MIB)
    with pytest.raises(MemoryError, match="only 1 MiB are free"):
        Slot.of([bytes(MIB), b"1"])
    monkeypatch.setattr(slots, "free_bytes", lambda: None)
    with pytest.raises(MemoryError, match="no room to stage 1099511627776 MiB of the state"):
        Slot.create(1 << 60)
    monkeypatch.setattr(mapping, "_MADV_POPULATE_WRITE", 9999)

    def lacks(*args: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", lacks)
    with pytest.raises(MemoryError, match="No space left"):
        Slot.create(MIB)
    assert not slots_held() - before


def test_only_slots_are_taken_from_others(tmp_path: Path) -> None:
    before = slots_held()
    with pytest.raises(ValueError, match="can be made smaller"):
        Slot.from_fd(os.memfd_create("elastic-moe-slot", os.MFD_ALLOW_SEALING))
    with pytest.raises(ValueError, match="is no slot"):
        Slot.from_fd(os.open(tmp_path, os.O_RDONLY))
    assert not slots_held() - before


HOLDER = """
import os, time
from storage.arena.slot import Slot
slot = Slot.create(8 * 2**20)
os.fork()
os.write(1, b"%20d" % os.fstat(slot.fd).st_ino)
time.sleep(600)
"""


def test_nothing_is_left_once_all_that_had_a_slot_are_killed() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, process_group=0, cwd=Path(__file__).parents[2]
    ) as holder:
        try:
            assert holder.stdout is not None
            inode = {int(holder.stdout.read(20)) for _ in range(2)}.pop()
            assert len(holders(inode)) == 2
        finally:
            os.killpg(holder.pid, signal.SIGKILL)
    until("nobody has the slot", lambda: not holders(inode), 60)


def test_a_slot_is_used_again_and_a_second_one_beside_it() -> None:
    arena = Arena(2)
    first, second = arena.take(100), arena.take(100)
    assert first is not None and second is not None
    assert arena.num_free == 0
    assert arena.take(1) is None
    assert not arena.wait_free(0)
    arena.give_back(first)
    arena.give_back(first)
    assert arena.num_free == 1
    assert arena.take(50) is first
    threading.Timer(0.01, arena.give_back, (second,)).start()
    assert arena.wait_free(60)
    assert arena.take(100) is second
    arena.close()
    arena.give_back(first)
    arena.drop(second)
    assert arena.size_bytes == 0
    with pytest.raises(ValueError, match="closed"):
        arena.take(1)


def test_a_state_that_grows_does_not_keep_the_small_slots() -> None:
    before = slots_held()
    arena = Arena(2)
    small = arena.take(100)
    assert small is not None
    arena.give_back(small)
    large = arena.take(MIB)
    assert large is not None
    assert arena.size_bytes == MIB
    assert len(slots_held() - before) == 1
    arena.give_back(large)
    arena.close()
    assert not slots_held() - before


def test_a_lack_of_memory_takes_no_slot_away(monkeypatch: pytest.MonkeyPatch) -> None:
    arena = Arena(1)
    with pytest.raises(MemoryError):
        arena.take(1 << 50)
    assert arena.num_free == 1


def test_a_spare_slot_is_made_ahead_where_it_may_be_and_memory_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    arena = Arena(2)
    first = arena.take(MIB)
    assert first is not None
    monkeypatch.setattr("storage.arena.arena.free_bytes", lambda: 2 * MIB - 1)
    arena.prepare(MIB)
    assert arena.num_made == 1, "it would leave less than its own size"
    monkeypatch.setattr("storage.arena.arena.free_bytes", lambda: None)
    with monkeypatch.context() as patch:
        patch.setattr(Slot, "create_empty", _no_memory)
        arena.prepare(MIB)
    assert arena.num_made == 1
    arena.prepare(MIB)
    assert (arena.num_made, arena.num_free) == (2, 1)
    arena.prepare(MIB)  # there is a spare one
    assert arena.num_made == 2
    monkeypatch.setattr(Slot, "create_empty", _no_memory)
    second = arena.take(MIB)
    assert second is not None
    arena.prepare(MIB)  # there are as many as may be
    assert arena.take(1) is None
    for slot in (first, second):
        arena.give_back(slot)
    arena.close()
    arena.prepare(MIB)
    assert arena.size_bytes == 0


def _no_memory(size_bytes: int) -> Slot:
    raise MemoryError(f"no room for {size_bytes}")


@pytest.mark.parametrize(
    ("version", "lines"),
    [
        (2, {"memory.max": "500", "memory.current": "300", "memory.stat": "anon 1\ninactive_file 40\n"}),
        (
            1,
            {
                "memory.limit_in_bytes": "500",
                "memory.usage_in_bytes": "300",
                "memory.stat": "cache 7\ntotal_inactive_file 40\n",
            },
        ),
    ],
)
def test_a_cgroups_limit_counts(tmp_path: Path, version: int, lines: dict[str, str]) -> None:
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 8 kB\nMemAvailable:    2 kB\n")
    (proc / "self/cgroup").write_text("0::/a/b\n" if version == 2 else "3:cpu:/\n4:memory:/a/b\n")
    assert free_bytes(proc, cgroups) == 2048
    folder = cgroups / "a" if version == 2 else cgroups / "memory/a"
    (folder / "b").mkdir(parents=True)
    for name, text in lines.items():
        (folder / name).write_text(text)
    assert free_bytes(proc, cgroups) == 240
    (folder / "b" / "memory.max").write_text("max\n")
    assert free_bytes(proc, cgroups) == 240
    (folder / next(iter(lines))).write_text("max" if version == 2 else str(2**63 - 4096))
    assert free_bytes(proc, cgroups) == 2048
    assert free_bytes(tmp_path / "none", cgroups) is None


def test_pages_are_there_before_anything_is_copied() -> None:
    slot = Slot.create(4 * MIB)
    faults = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[7]
    np.frombuffer(slot.memory, np.uint8)[:] = 1
    later = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[7]
    assert int(later) - int(faults) < 4 * MIB // mmap.PAGESIZE // 2
    slot.close()
