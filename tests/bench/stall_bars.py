"""What is asked of a save's cost, and whether a run of `bench-stall` shows it. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

NOTHING, MEMCPY = "no save", "one memcpy"
DCP, THREAD, PROCESS, SHARED = "dcp.save", "async thread", "async process", "async shared"
ASYNC = (THREAD, PROCESS, SHARED)
SYNC, OVERLAPPED = ("ours, sync", "service, sync"), ("ours, overlapped", "service, overlapped")
SYNC_MAX, OVERLAPPED_MAX, LENGTHENED_MAX = 1.15, 0.2, 0.5


@dataclass
class StallCell:
    """One way to one target: a value a save, or a run."""

    target: str
    way: str
    blocked_s: list[float] = field(default_factory=list)
    held_s: list[float] = field(default_factory=list)
    commit_s: list[float] = field(default_factory=list)
    steps_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    passes_s: list[float] = field(default_factory=list)
    """Forward and backward of a step."""
    state_bytes: int = 0
    num_saves: int = 1
    """Of each run."""


Cells = Mapping[tuple[str, str], StallCell]


@dataclass(frozen=True)
class Bar:
    """One thing that is asked: of which way to which target, what came out, what is allowed, and whether it holds."""

    asked: str
    target: str
    way: str
    found: str
    allowed: str
    holds: bool


def memcpys(cell: StallCell, cells: Cells) -> float | None:
    """How many times as long as one memcpy of the same bytes a save has blocked; None where none was measured."""
    reference = cells.get((cell.target, MEMCPY)) or cells.get(("folder", MEMCPY))  # which goes to neither
    if reference is None or reference.state_bytes != cell.state_bytes:
        return None
    return statistics.median(cell.blocked_s) / statistics.median(reference.blocked_s)


def lengthened_s(cell: StallCell, cells: Cells) -> float | None:
    """By how much a run took longer for each save than one without; None where that was not measured."""
    quiet = cells.get((cell.target, NOTHING))
    if quiet is None or cell.way == NOTHING:
        return None
    return (statistics.median(cell.steps_s) - statistics.median(quiet.steps_s)) / cell.num_saves


def bars(cells: Cells) -> list[Bar]:
    """All that is asked of what was measured."""
    return [*_blocked(cells), *_lengthened(cells)]


def _blocked(cells: Cells) -> list[Bar]:
    found = []
    memcpy = cells.get(("folder", MEMCPY))
    for way in (*SYNC, *OVERLAPPED):
        cell = cells.get(("folder", way))
        if cell is None or memcpy is None or (times := memcpys(cell, cells)) is None:
            continue
        limit, asked = SYNC_MAX, "a save that copies all before it returns blocks"
        if way in OVERLAPPED:
            limit, asked = OVERLAPPED_MAX, "a save that copies beside the passes blocks"
            if statistics.median(cell.passes_s) < statistics.median(memcpy.blocked_s):
                asked += " (passes too short for this bar)"
        allowed = f"<= {limit:.2f} memcpys"
        found.append(Bar(asked, "folder", way, f"{times:.2f} memcpys", allowed, times <= limit))
    return found


def _lengthened(cells: Cells) -> list[Bar]:
    found = []
    for target, others in (("folder", ASYNC), ("s3", (DCP, *ASYNC))):
        theirs = _of_ways(target, others, cells)
        if not theirs:
            continue
        best = min(theirs, key=theirs.__getitem__)
        share = LENGTHENED_MAX if target == "folder" else 1.0
        what = "half of the best async_save's" if target == "folder" else "less than every way's of DCP"
        limit_s = theirs[best] * share
        for way, ours_s in _of_ways(target, (*SYNC, *OVERLAPPED), cells).items():
            holds = ours_s <= limit_s if target == "folder" else ours_s < limit_s
            asked = f"a save lengthens the run by {what}"
            found.append(Bar(asked, target, way, f"{ours_s:.3f} s", f"{limit_s:.3f} s ({best})", holds))
    return found


def _of_ways(target: str, ways: Sequence[str], cells: Cells) -> dict[str, float]:
    found = {}
    for way in ways:
        cell = cells.get((target, way))
        if cell is not None and (seconds := lengthened_s(cell, cells)) is not None:
            found[way] = seconds
    return found


COLUMNS = ("what is asked", "target", "way", "measured", "allowed", "")
WIDTHS = (-68, -8, -21, 14, 26, 6)


def table(found: Sequence[Bar]) -> str:
    """Lines for a reader."""
    rows = [COLUMNS, *((b.asked, b.target, b.way, b.found, b.allowed, "yes" if b.holds else "NO") for b in found)]
    return "\n".join(aligned(row, WIDTHS) for row in rows)


def aligned(texts: Sequence[str], widths: Sequence[int]) -> str:
    """A line of a table; a negative width is of a column that begins at its left."""
    line = "".join(f"{text:{'<' if width < 0 else '>'}{abs(width)}}" for text, width in zip(texts, widths, strict=True))
    return line.rstrip()
