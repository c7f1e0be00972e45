"""How much memory may still be taken here: what is not asked for ends with the OOM killer, and not with an error."""

from __future__ import annotations

import contextlib
from pathlib import Path

_NO_LIMIT_BYTES = 1 << 60


def free_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What the machine has available, or less where this process's cgroup (v1 or v2) allows less; None if unknown."""
    known = [_available(proc / "meminfo"), *_left_in_cgroups(proc, cgroups)]
    return min((size for size in known if size is not None), default=None)


def _available(meminfo: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _left_in_cgroups(proc: Path, cgroups: Path) -> list[int | None]:
    """By each limit from this process's cgroup to the root; a container sees its own as the root."""
    found: list[int | None] = []
    with contextlib.suppress(OSError, ValueError):
        for line in (proc / "self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                top, names = cgroups, ("memory.max", "memory.current", "inactive_file")
            elif "memory" in controllers.split(","):
                top = cgroups / "memory"
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            else:
                continue
            folder = top / path.lstrip("/")
            found += [_left(at, *names) for at in (folder, *folder.parents) if at == top or top in at.parents]
    return found


def _left(folder: Path, limit: str, usage: str, reclaimable: str) -> int | None:
    """What may still be taken below one limit: pages of files that nobody uses make room."""
    with contextlib.suppress(OSError, ValueError):
        limit_bytes = int((folder / limit).read_text())  # "max" is no number
        if limit_bytes >= _NO_LIMIT_BYTES:
            return None
        rows = [line.split() for line in (folder / "memory.stat").read_text().splitlines()]
        of_files = next((int(row[1]) for row in rows if row[0] == reclaimable), 0)
        return max(0, limit_bytes - int((folder / usage).read_text()) + of_files)
    return None
