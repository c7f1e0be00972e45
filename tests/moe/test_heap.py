"""Memory that is freed stays with the process."""

from __future__ import annotations

import ctypes
import resource
import subprocess
import sys

import pytest

from elastic_moe import heap

_NUM_BYTES = 48 << 20
_PAGE = resource.getpagesize()


def faults(num_turns: int = 3) -> int:
    """Pages that one turn of taking, writing and freeing a large block has mapped, after the first; for a process of
    its own, since what glibc is told stays so."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    found = []
    for _ in range(num_turns):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        block = libc.malloc(_NUM_BYTES)
        ctypes.memset(block, 1, _NUM_BYTES)
        libc.free(block)
        found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(found[1:])


def test_a_block_is_mapped_once_and_not_at_each_use() -> None:
    if not hasattr(ctypes.CDLL(None), "mallopt"):
        pytest.skip("this C library has no mallopt")
    code = "from elastic_moe import heap; assert heap.keep_freed(); import tests.moe.test_heap as t; print(t.faults())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    num_pages = _NUM_BYTES // _PAGE
    assert int(done.stdout) < num_pages / 10, f"{done.stdout} of {num_pages} pages"


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert not heap.keep_freed.__wrapped__()
