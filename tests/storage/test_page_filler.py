"""Memory that nobody has touched is filled by the page, and any other as it is."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from storage import Checkpointer
from storage.arena import page_filler
from storage.arena.mapping import PAGE_BYTES, is_made
from storage.arena.page_filler import PageFiller
from storage.errors import StorageError
from storage.loading.targets import TensorTarget, note_shared
from storage.stores.local import LocalStore
from tests.storage.small_runs import damage_data

MIB = 1024 * 1024
PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS

FORBIDDEN = """
import os
from contextlib import closing, nullcontext
from tests.storage.disk_cases import forbid
from tests.storage.test_page_filler import filled
from storage.arena.page_filler import _SYSCALLS, PageFiller
forbid(_SYSCALLS[os.uname().machine])
with closing(PageFiller()) as filler:
    assert filled(filler) == "in place"
"""

TOUCHED = """
import mmap
import sys
from contextlib import closing
from storage.arena.page_filler import PageFiller
memory = memoryview(mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
places = iter(range((1 << 20) - 1, 0, -mmap.PAGESIZE))
def touch(*told):
    memory[next(places)] = 1
with closing(PageFiller()) as filler:
    with filler.instead_of([memory]) as (given,):
        given[:] = bytes(1 << 20)
        sys.setprofile(touch)
    sys.setprofile(None)
"""


@pytest.fixture
def filler() -> Iterator[PageFiller]:
    with closing(PageFiller()) as filler:
        if filler._fd < 0:
            pytest.skip("this machine gives nobody a userfaultfd")
        yield filler


def fresh(size_bytes: int) -> memoryview:
    """Memory that nobody has touched."""
    return memoryview(mmap.mmap(-1, size_bytes, flags=PRIVATE))


def address_of(memory: memoryview) -> int:
    return int(np.frombuffer(memory, np.uint8).ctypes.data)


def pages_made(memory: memoryview) -> list[bool]:
    """Of memory that begins with a page, whether there is something behind each."""
    return [is_made(address_of(memory) + at) for at in range(0, memory.nbytes, PAGE_BYTES)]


def filled(filler: PageFiller, size_bytes: int = MIB, *, in_place: bool = False) -> str:
    """Where such memory is read to: "in place", with its pages, or "elsewhere"."""
    memory = fresh(size_bytes)
    data = np.random.default_rng(0).integers(0, 256, size_bytes, np.uint8).tobytes()
    with filler.instead_of([memory], in_place=in_place) as (given,):
        assert given.nbytes == size_bytes
        is_itself = address_of(given) == address_of(memory)
        assert set(pages_made(memory)) == {is_itself}
        given[:] = data
    assert bytes(memory) == data
    return "in place" if is_itself else "elsewhere"


def test_what_nobody_has_touched_is_filled_by_the_page_and_no_page_beside_it_made(filler: PageFiller) -> None:
    whole = fresh(3 * MIB)
    first, second = whole[5 : MIB + 7], whole[MIB + 7 : 2 * MIB + 1]  # they share a page
    with filler.instead_of([first, second]) as given:
        assert not any(pages_made(whole))
        given[0][:], given[1][:] = b"a" * first.nbytes, b"b" * second.nbytes
    assert whole[: 2 * MIB + 2] == b"\0" * 5 + b"a" * first.nbytes + b"b" * second.nbytes + b"\0"
    assert not any(pages_made(whole[2 * MIB + PAGE_BYTES :]))


def test_what_was_damaged_on_its_way_gets_no_further_than_the_buffer(filler: PageFiller) -> None:
    memory = fresh(MIB)

    def read_damaged() -> None:
        with filler.instead_of([memory]) as (given,):
            given[:] = b"x" * MIB
            raise ValueError("damaged")

    with pytest.raises(ValueError, match="damaged"):
        read_damaged()
    assert not any(pages_made(memory))
    assert filled(filler) == "elsewhere", "and the next is filled as ever"


def test_memory_in_use_short_or_looked_at_for_longer_is_given_as_it_is(filler: PageFiller) -> None:
    used, short = memoryview(bytearray(MIB)), fresh(page_filler._FROM_BYTES - 1)
    with filler.instead_of([used, short]) as given:
        assert [address_of(memory) for memory in given] == [address_of(used), address_of(short)]
    assert filled(filler, in_place=True) == "in place"
    assert filled(filler, page_filler._BUFFER_BYTES + PAGE_BYTES) == "in place", "such is no longer in the cache"


@pytest.mark.parametrize("kind", ["touched meanwhile", "a file", "shared"])
def test_memory_of_which_no_page_can_be_made_is_copied_to(kind: str, filler: PageFiller, tmp_path: Path) -> None:
    memory = fresh(MIB)
    if kind != "touched meanwhile":
        file = Path("/dev/shm" if kind == "shared" else tmp_path) / f"elastic-moe-test-{os.getpid()}"
        with file.open("w+b") as opened:
            opened.truncate(MIB)
            memory = memoryview(mmap.mmap(opened.fileno(), MIB))
        file.unlink()
    with filler.instead_of([memory]) as (given,):
        given[:] = b"x" * MIB
        if kind == "touched meanwhile":
            memory[MIB // 2] = 7
    assert memory == b"x" * MIB


def test_pages_that_are_watched_no_more_are_everybodys_to_touch(filler: PageFiller) -> None:
    """Nor do they wait for us where the kernel lets us watch, and then make no page."""
    memory, page = fresh(2 * MIB), bytearray(PAGE_BYTES)
    with filler.instead_of([memory[:MIB]]) as (given,):
        given[:] = b"x" * MIB
    with pytest.raises(OSError, match=os.strerror(errno.EEXIST)):
        filler._make(address_of(memory), memoryview(page))
    touching = threading.Thread(target=memory.__setitem__, args=(slice(MIB, 2 * MIB), b"y" * MIB), daemon=True)
    touching.start()
    touching.join(60)
    assert not touching.is_alive() and memory[MIB:] == b"y" * MIB


def test_nobody_who_has_the_interpreter_meets_a_watched_page() -> None:
    """A touch before and after each call that is made there, of a page that was none: it would wait for ever."""
    subprocess.run([sys.executable, "-c", TOUCHED], check=True, timeout=60)


def test_where_pages_cannot_be_let_go_of_nothing_is_watched_any_more(
    filler: PageFiller, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ioctl = page_filler._ioctl()

    def without_room(fd: int, request: int, argument: object) -> int:
        if request == page_filler._UNREGISTER:
            ctypes.set_errno(errno.ENOMEM)
            return -1
        return int(ioctl(fd, request, argument))

    monkeypatch.setattr(page_filler, "_ioctl", lambda: without_room)
    memory = fresh(2 * MIB)
    with filler.instead_of([memory[:MIB]]) as (given,):
        given[:] = b"x" * MIB
    assert memory[:MIB] == b"x" * MIB and "no room to watch" in caplog.text
    memory[MIB:] = b"y" * MIB
    assert filled(filler) == "elsewhere", "and copied from there"


def test_a_kernel_without_that_call_or_a_filter_that_forbids_it_makes_pages_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    subprocess.run([sys.executable, "-c", FORBIDDEN], check=True, timeout=120)
    monkeypatch.setattr(page_filler, "_SYSCALLS", {})
    with closing(PageFiller()) as filler:
        assert filled(filler) == "in place"
    monkeypatch.undo()
    monkeypatch.setattr(page_filler, "_API", page_filler._API + 1)
    with closing(PageFiller()) as filler:
        assert filled(filler) == "in place"


def test_buffers_are_used_again_and_all_is_let_go_of(filler: PageFiller) -> None:
    for _ in range(3):
        filled(filler)
    assert len(filler._buffers) == 1
    fd = filler._fd
    filler.close()
    filler.close()
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        os.fstat(fd)
    assert filled(filler) == "in place"


@pytest.mark.parametrize("is_damaged", [False, True])
def test_a_restore_makes_pages_of_what_it_has_verified(
    is_damaged: bool, tmp_path: Path, filler: PageFiller, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    make = PageFiller._make

    def recorded(filler: PageFiller, address: int, data: memoryview) -> None:
        make(filler, address, data)
        made.append(data.nbytes)

    monkeypatch.setattr(PageFiller, "_make", recorded)
    saved, memory = torch.arange(MIB // 4, dtype=torch.float32), fresh(MIB)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"w": saved}, wait=True)
    if is_damaged:
        damage_data(LocalStore(tmp_path), 1)
    found = {"w": torch.frombuffer(memory, dtype=torch.float32)}
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(StorageError) if is_damaged else nullcontext():
        checkpointer.restore(found)
    assert torch.equal(found["w"], torch.zeros_like(saved) if is_damaged else saved)
    assert (sum(made) > MIB // 2) is not is_damaged


@pytest.mark.parametrize(
    ("spans", "shared"),
    [
        ([(0, 4), (4, 6), (6, 8)], []),
        ([(0, 4), (0, 4), (4, 8)], [0, 1]),
        ([(6, 8), (1, 4), (0, 7)], [0, 1, 2]),
        ([(0, 8), (1, 2), (5, 6), (8, 9)], [0, 1, 2]),
    ],
    ids=["apart", "tied", "in a chain", "in one"],
)
def test_targets_know_which_of_them_share_memory(spans: list[tuple[int, int]], shared: list[int]) -> None:
    whole = torch.empty(9, dtype=torch.uint8)
    found = [TensorTarget(whole[first:last], lambda: None) for first, last in spans]
    note_shared(found)
    assert [number for number, target in enumerate(found) if target.is_shared] == shared


def test_a_restore_of_tied_weights_watches_none_of_their_pages(
    tmp_path: Path, filler: PageFiller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One thread could read into pages that the kernel watches for another, which it refuses."""
    made: list[int] = []
    monkeypatch.setattr(PageFiller, "_make", lambda filler, address, data: made.append(address))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {key: torch.arange(MIB // 4, dtype=torch.float32) for key in "ab"}, wait=True)
    found = torch.frombuffer(fresh(MIB), dtype=torch.float32)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.restore({"a": found, "b": found})
    assert torch.equal(found, torch.arange(MIB // 4, dtype=torch.float32)) and not made
