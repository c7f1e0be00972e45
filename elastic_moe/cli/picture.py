"""`elastic-moe report --picture`: from files of metrics and events to a picture. Imports matplotlib where it draws."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from elastic_moe.cli.parser import PROG
from elastic_moe.errors import UserError
from elastic_moe.pictures.story import MetricsRecord, RunStory, read_lines, tell
from launcher import EventRecord
from launcher.reports import Cause, account, jobs_of, offsets, set_right, steady

_NAME = "metrics.jsonl"
_FAULTS = (Cause.FAILURE, Cause.NODE_LOSS, Cause.HANG, Cause.STORE)
_FORMATS = (".png", ".svg", ".pdf")
_MOST_MARKS = 12


def check_picture(path: Path) -> None:
    """Raises UserError where no picture of this name can be drawn here."""
    if path.suffix.lower() not in _FORMATS:
        raise UserError(f"--picture {path}: the name must end with {', '.join(_FORMATS)}")
    if find_spec("matplotlib") is None:
        raise UserError(
            "--picture draws with matplotlib: pip install matplotlib, or install elastic-moe with its extra demo"
        )


def find_metrics(paths: Sequence[Path]) -> list[Path]:
    """The files of metrics in and beside the folders of a report, each once.

    Raises:
        UserError: there is none.
    """
    found: dict[Path, None] = {}
    for path in paths:
        folder = path if path.is_dir() else path.parent
        for one in (*sorted(folder.rglob(_NAME)), folder.absolute().parent / _NAME):
            if one.is_file():
                found.setdefault(one.resolve())
    if not found:
        where = ", ".join(map(str, paths))
        raise UserError(f"no {_NAME} in or beside {where}: give --metrics what the job has as train.metrics")
    return list(found)


def read_metrics(paths: Sequence[Path]) -> list[MetricsRecord]:
    """The records of all files; lines that are none are counted on stderr.

    Raises:
        UserError: a file cannot be read, or there is no step in any.
    """
    records: list[MetricsRecord] = []
    unreadable = 0
    for path in paths:
        try:
            with path.open(encoding="utf-8", errors="replace") as file:
                found, bad = read_lines(file)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from error
        records += found
        unreadable += bad
    if not records:
        raise UserError(f"there is no step in {', '.join(map(str, paths))}")
    if unreadable:
        print(f"{unreadable} lines are no metrics and were left out", file=sys.stderr)
    return records


def draw_picture(path: Path, metrics: Sequence[Path], events: Sequence[EventRecord]) -> None:
    """Draw what the files of metrics tell, with what the events tell of it, if there are any.

    Raises:
        UserError: the metrics cannot be read, or the picture cannot be written.
    """
    records = read_metrics(metrics)
    where = ", ".join(map(str, metrics))
    try:
        if len(experts := sorted({len(layer) for record in records for layer in record.get("load") or []})) > 1:
            raise UserError(f"{where}: lines of models with {experts[0]} and {experts[-1]} experts: give those of one")
        _draw(path, tell(records), events)
    except OSError as error:
        raise UserError(f"--picture {path}: {error.strerror}") from error
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        why = f"{type(error).__name__}: {error}"
        raise UserError(f"{where}: its lines are not as this version of {PROG} writes them ({why})") from error


def _draw(path: Path, story: RunStory, events: Sequence[EventRecord]) -> None:
    from elastic_moe.pictures.training import Mark, draw_training

    marks = []
    for _, of_job in jobs_of(steady(events)[0]):
        for one in account(set_right(of_job, offsets(of_job))).interruptions:
            step = story.step_at(one.began_ts)
            if step is not None:
                marks.append(Mark(step, str(one.cause.value), one.cause in _FAULTS))
    draw_training(path, story, marks if len(marks) <= _MOST_MARKS else [], _title(story, len(marks)))


def _title(story: RunStory, num_marks: int) -> str:
    worlds: list[int] = []
    for span in story.spans:
        if not worlds or worlds[-1] != span.world_size:
            worlds.append(span.world_size)
    shown = worlds if len(worlds) <= 8 else [*worlds[:4], 0, *worlds[-3:]]
    ranks = " → ".join(str(world) if world else "…" for world in shown)
    again = sum(map(len, story.lost))
    redone = f", {again} step{'s' if again != 1 else ''} done again" if again else ""
    many = f", {num_marks} interruptions" if num_marks > _MOST_MARKS else ""
    return f"{story.kept[-1]['step']} steps on {ranks} rank{'s' if ranks != '1' else ''}{redone}{many}"
