"""How many processors a process may use: those that it may run on, less what a container's quota allows."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def num_usable(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """The processors that this process may run on, or fewer where its cgroup (v1 or v2) has a quota; at least one."""
    return max(1, min([len(os.sched_getaffinity(0)), *map(int, _quotas(proc, cgroups))]))


def _quotas(proc: Path, cgroups: Path) -> Iterator[float]:
    """By each quota from this process's cgroup to the root; a container sees its own as the root."""
    with contextlib.suppress(OSError):
        for line in (proc / "self/cgroup").read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            if number == "0":
                top, names = cgroups, ["cpu.max"]
            elif "cpu" in controllers.split(","):
                top, names = cgroups / "cpu", ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
            else:
                continue
            own = top / path.lstrip("/")
            for folder in (own, *(above for above in own.parents if above.is_relative_to(top))):
                with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
                    quota, period = " ".join((folder / name).read_text() for name in names).split()
                    if quota not in ("max", "-1"):
                        yield int(quota) / int(period)
