"""Memory that nobody has touched is filled by the page, and any other as it is."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from storage import Checkpointer
from storage.arena import page_filler
from storage.arena.mapping import MADE_FROM_BYTES, PAGE_BYTES, is_made
from storage.arena.page_filler import PageFiller
from storage.errors import StorageError
from storage.stores.buffers import address_of
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
import fcntl, mmap, os
from contextlib import closing
from storage.arena import page_filler
from storage.arena.mapping import PAGE_BYTES, make_pages
memory = memoryview(mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
file, places, ioctl = os.memfd_create("x"), iter(range((1 << 20) - PAGE_BYTES, 0, -PAGE_BYTES)), fcntl.ioctl
os.ftruncate(file, PAGE_BYTES)
def touch():
    memory[next(places)] = 1
    at = next(places)
    assert os.preadv(file, [memory[at : at + PAGE_BYTES]], 0) == PAGE_BYTES
    make_pages(page_filler.address_of(memory) + (made := next(places)), PAGE_BYTES)
    assert page_filler.is_made(page_filler.address_of(memory) + made)
def touched(*request):
    touch()
    try:
        return ioctl(*request)
    finally:
        touch()
with closing(page_filler.PageFiller()) as filler:
    fcntl.ioctl = touched
    with filler.instead_of([memory]) as (given,):
        given[:] = b"x" * (1 << 20)
assert memory == b"x" * (1 << 20) and next(places) < (1 << 20) - 18 * PAGE_BYTES
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
    used, short = memoryview(bytearray(MIB)), fresh(MADE_FROM_BYTES - 1)
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


@pytest.mark.usefixtures("filler")
def test_others_may_touch_those_pages_at_any_moment() -> None:
    """By an access, a read and a call that makes them, around each call of ours: nobody waits or is refused."""
    subprocess.run([sys.executable, "-c", TOUCHED], check=True, timeout=60)


def test_where_the_kernel_has_no_room_for_another_mapping_bytes_are_copied(
    filler: PageFiller, monkeypatch: pytest.MonkeyPatch
) -> None:
    ioctl = fcntl.ioctl
    for refused in (page_filler._REGISTER, page_filler._COPY, page_filler._UNREGISTER):

        def without_room(fd: int, request: int, argument: bytearray, refused: int = refused) -> int:
            if request == refused:
                raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
            return ioctl(fd, request, argument)

        monkeypatch.setattr(fcntl, "ioctl", without_room)
        assert filled(filler) == "elsewhere"


def test_a_kernel_without_that_call_or_a_filter_that_forbids_it_makes_pages_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    subprocess.run([sys.executable, "-c", FORBIDDEN], check=True, timeout=120)
    monkeypatch.setattr(page_filler, "_SYSCALLS", {})
    with closing(PageFiller()) as filler:
        assert filled(filler) == "in place"
    monkeypatch.undo()
    monkeypatch.setattr(page_filler, "_HAS_WP", 1 << 60)
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


def test_a_restore_of_tied_weights(tmp_path: Path) -> None:
    """Two threads may fill the same pages."""
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {key: torch.arange(MIB // 4, dtype=torch.float32) for key in "ab"}, wait=True)
    found = torch.frombuffer(fresh(MIB), dtype=torch.float32)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.restore({"a": found, "b": found})
    assert torch.equal(found, torch.arange(MIB // 4, dtype=torch.float32))
