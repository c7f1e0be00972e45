"""What becomes of memory that a step on a CPU has freed."""

from __future__ import annotations

import ctypes
import functools

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_NEVER = -1
_NO_BLOCKS = 0


@functools.cache
def keep_freed() -> bool:
    """Let this process keep what it frees, for what it takes next; whether that could be had.

    A step takes and frees the same tensors as the one before it. Of its own accord glibc gives large ones back to the
    kernel, which has to map and clear each page anew: a third of a millisecond a MiB, ten times what writing it takes.
    Memory stays what it was when it was the most. Where the C library is another, nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt and mallopt(_M_MMAP_MAX, _NO_BLOCKS) and mallopt(_M_TRIM_THRESHOLD, _NEVER))
