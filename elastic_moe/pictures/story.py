"""What a `metrics.jsonl` says of a run that was interrupted: what became of each step, and who trained it. Pure."""

from __future__ import annotations

import bisect
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

MetricsRecord = dict[str, Any]

_DRAWN = ("loss", "val_loss", "tokens_per_s", "mfu", "load_max", "load_min")
_STEPS_MAX = 1 << 53  # more are no numbers of a picture's


@dataclass(frozen=True)
class Span:
    """Steps in a row of one generation and world, as they were kept."""

    generation: int
    world_size: int
    mesh: dict[str, int]
    first: int
    last: int


@dataclass(frozen=True)
class RunStory:
    """The lines of a run.

    Attributes:
        kept: the last line of each step, by step.
        lost: what was done again later: lines in a row of one process.
        spans: of `kept`, in order.
    """

    kept: list[MetricsRecord]
    lost: list[list[MetricsRecord]]
    spans: list[Span]

    def curve(self, name: str) -> tuple[list[float], list[float]]:
        """Steps and numbers of `kept`; where steps or numbers are missing the curve breaks."""
        return curve(self.kept, name)

    def step_at(self, ts: float) -> int | None:
        """The last step that was complete at a time, None before the first."""
        at = bisect.bisect_right([record["ts"] for record in self.kept], ts)
        return int(self.kept[at - 1]["step"]) if at else None


def read_lines(lines: Iterable[str]) -> tuple[list[MetricsRecord], int]:
    """Records of the lines, and how many lines are none."""
    found, unreadable = [], 0
    for line in lines:
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            is_one = isinstance(record, dict) and math.isfinite(record["ts"]) and _is_drawable(record)
        except (ValueError, KeyError, TypeError, RecursionError):
            is_one = False
        if is_one:
            found.append(record)
        else:
            unreadable += 1
    return found, unreadable


def _is_drawable(record: MetricsRecord) -> bool:
    """Whether what is drawn of a record are numbers: text would be drawn as the name of a place on the axis."""
    step, drawn = record["step"], [record.get(name) for name in _DRAWN]
    is_step = isinstance(step, int) and not isinstance(step, bool) and 0 <= step < _STEPS_MAX
    return is_step and all(value is None or type(value) in (int, float) for value in drawn)


def tell(records: Iterable[MetricsRecord]) -> RunStory:
    """Find the story in records of one or more files, in any order."""
    in_time = sorted(records, key=lambda record: record["ts"])
    last = {record["step"]: at for at, record in enumerate(in_time)}
    kept = [in_time[last[step]] for step in sorted(last)]
    lost: list[list[MetricsRecord]] = []
    before: MetricsRecord | None = None
    for at, record in enumerate(in_time):
        if last[record["step"]] == at:
            before = None
            continue
        if before is not None and _follows(record, before):
            lost[-1].append(record)
        else:
            lost.append([record])
        before = record
    return RunStory(kept, lost, _spans(kept))


def curve(records: Sequence[MetricsRecord], name: str) -> tuple[list[float], list[float]]:
    """Steps and numbers of records by step, with a gap where some are missing."""
    steps: list[float] = []
    numbers: list[float] = []
    for record in records:
        number = record.get(name)
        if steps and record["step"] > steps[-1] + 1:
            steps.append(record["step"] - 0.5)
            numbers.append(math.nan)
        steps.append(record["step"])
        numbers.append(math.nan if number is None else number)
    return steps, numbers


def loads(records: Sequence[MetricsRecord]) -> tuple[list[int], list[list[float]]]:
    """The steps whose lines have loads, and for each the load of each expert over the mean, averaged over layers."""
    steps, columns = [], []
    for record in records:
        layers = [layer for layer in record.get("load") or [] if sum(layer)]
        if layers:
            over_mean = [[rows * len(layer) / sum(layer) for rows in layer] for layer in layers]
            steps.append(record["step"])
            columns.append([sum(of_expert) / len(layers) for of_expert in zip(*over_mean, strict=True)])
    return steps, columns


def _follows(record: MetricsRecord, before: MetricsRecord) -> bool:
    return (record["step"], record.get("generation")) == (before["step"] + 1, before.get("generation"))


def _spans(kept: Sequence[MetricsRecord]) -> list[Span]:
    spans: list[Span] = []
    for record in kept:
        generation, world_size = record.get("generation", 0), record.get("world_size", 1)
        mesh, step = record.get("mesh") or {}, record["step"]
        if spans and (spans[-1].generation, spans[-1].world_size, spans[-1].mesh) == (generation, world_size, mesh):
            step_before = spans.pop()
            spans.append(Span(generation, world_size, mesh, step_before.first, step))
        else:
            spans.append(Span(generation, world_size, mesh, step, step))
    return spans
