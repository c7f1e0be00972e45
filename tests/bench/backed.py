"""Memory that the machine has at hand when it is asked for.

The host of a virtual machine may take back what lies free, and back it again piece by piece when it is touched: 2.5 s a
GiB where this was found. That is the machine's time and not the program's that is measured. So a process touches memory
and ends right before it is needed: what was freed a moment ago is still there.
"""

from __future__ import annotations

import contextlib
import mmap
import subprocess
import sys
from collections.abc import Iterator

_READY = b"ready\n"


@contextlib.contextmanager
def at_hand(num_bytes: int) -> Iterator[None]:
    """Have so many bytes of free memory at hand when the block ends; they are held while it lasts. 0: do nothing."""
    if not num_bytes:
        yield
        return
    command = [sys.executable, "-m", __name__, str(num_bytes)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == _READY, "there is not so much memory"
            yield
        finally:
            holder.kill()


def main(num_bytes: int) -> None:
    """Hold so much memory until somebody kills this process, or has closed the other end."""
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)  # faster to free
    memory[:: mmap.PAGESIZE] = b"\1" * -(-num_bytes // mmap.PAGESIZE)
    sys.stdout.buffer.write(_READY)
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    main(int(sys.argv[1]))
