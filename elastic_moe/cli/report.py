"""`elastic-moe report`: what happened to a job and where its time went, from its events. Imports no torch."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from elastic_moe.cli.parser import PROG
from elastic_moe.cli.timeline import timeline
from elastic_moe.errors import UserError
from launcher.reports.goodput import Cause, Goodput, Interruption, account
from launcher.wording import Event

if TYPE_CHECKING:
    from elastic_moe.cli.parser import Subparsers

T = TypeVar("T")

_EPILOG = """\
LOG_DIR is what `run` was given as --log-dir, or an events.jsonl. Give those of
all nodes where each has its own: together they tell the whole story. In folders
every events.jsonl below is read.

The seconds of all causes add up to the wall time, from the first event to the
last. Goodput is the part of it in which the job made progress that it kept.

--json writes one object: "runs", one for each run id, with "outcome", "wall_s",
"goodput", "seconds" by cause, "interruptions" (cause, root, victims, times,
steps_redone) and "events" (how many of each); and "unreadable_lines".

Exit codes: 0 done; 2 wrong usage, or there are no events.
"""


def register(verbs: Subparsers) -> None:
    """Add the verb `report`."""
    parser = verbs.add_parser(
        "report",
        help="what happened to a job, and its goodput by cause",
        description="Tell what happened to a job, what failed first, and where its time went.",
        epilog=_EPILOG,
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="LOG_DIR", help="folder of `run --log-dir`, or a file")
    parser.add_argument("--json", action="store_true", help="write JSON")
    parser.set_defaults(handler=handle)


def handle(args: argparse.Namespace) -> int:
    """Print the report of every run in the files."""
    events, num_unreadable = read_events(find_files(args.paths))
    if not events:
        raise UserError(f"no events in {', '.join(map(str, args.paths))}; did `run` get --log-dir?")
    runs: dict[str, list[Event]] = collections.defaultdict(list)
    for event in sorted(events, key=lambda event: float(event["ts"])):
        runs[str(event.get("run_id", ""))].append(event)
    if args.json:
        reports = [_told(as_json, run_id, of_run) for run_id, of_run in runs.items()]
        print(json.dumps({"runs": reports, "unreadable_lines": num_unreadable}, indent=2))
        return 0
    print("\n\n".join("\n".join(_told(as_lines, run_id, of_run)) for run_id, of_run in runs.items()))
    if num_unreadable:
        print(f"{num_unreadable} lines are no events and were left out", file=sys.stderr)
    return 0


def _told(tell: Callable[[str, Sequence[Event]], T], run_id: str, events: Sequence[Event]) -> T:
    """What `tell` makes of one run, if these are events as this version writes them."""
    try:
        return tell(run_id, events)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise UserError(f"job {run_id!r}: its events are not as this version of {PROG} writes them ({why})") from error


def find_files(paths: Iterable[Path]) -> list[Path]:
    """The event files that the paths name, each once.

    Raises:
        UserError: a path does not exist.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        files = sorted(path.rglob("events.jsonl")) if path.is_dir() else [path]
        found.update((file.resolve(), file) for file in files)
    return list(found.values())


def read_events(files: Iterable[Path]) -> tuple[list[Event], int]:
    """All events of the files, and how many lines were none (the last line of a job that writes may be half)."""
    events: list[Event] = []
    num_unreadable = 0
    for file in files:
        try:
            lines = file.read_bytes().split(b"\n")
        except OSError as error:
            raise UserError(f"{file}: {error.strerror}") from error
        for line in filter(None, lines):
            event = _event(line)
            if event is None:
                num_unreadable += 1
            else:
                events.append(event)
    return events, num_unreadable


def _event(line: bytes) -> Event | None:
    try:
        found = json.loads(line)
        float(found["ts"])
        return found if isinstance(found["event"], str) else None
    except (ValueError, TypeError, KeyError):
        return None


def as_json(run_id: str, events: Sequence[Event]) -> dict[str, Any]:
    """What `--json` prints of one run."""
    result = account(events)
    return {
        "run_id": run_id,
        "outcome": result.outcome,
        "began_ts": result.began_ts,
        "ended_ts": result.ended_ts,
        "wall_s": result.wall_s,
        "goodput": result.fraction,
        "last_step": result.last_step,
        "seconds": dict(result.seconds),
        "interruptions": [dataclasses.asdict(one) for one in result.interruptions],
        "events": dict(collections.Counter(event["event"] for event in events)),
    }


def as_lines(run_id: str, events: Sequence[Event]) -> list[str]:
    """The report of one run for a person."""
    result = account(events)
    return [
        f"job {run_id}: {result.outcome or 'no end in these events'}",
        *_failures(result),
        "",
        "what happened",
        *timeline(events, result.began_ts),
        "",
        *_table(result),
        *_checkpoints(events),
    ]


def _failures(result: Goodput) -> list[str]:
    """What failed, each root cause before what it took with it."""
    lines = []
    for one in result.interruptions:
        if one.cause in (Cause.FAILURE, Cause.NODE_LOSS, Cause.HANG):
            lines.append(f"  root cause at {one.began_ts - result.began_ts:.1f} s: {one.root}")
            lines += [f"    then: {victim}" for victim in one.victims]
    return ["", "what failed", *lines] if lines else []


def _table(result: Goodput) -> list[str]:
    lines = [f"where {result.wall_s:.1f} s went{'':14}seconds   share  times"]
    for cause, seconds in result.seconds.items():
        stops = [one for one in result.interruptions if one.cause is cause]
        if seconds > 0 or stops:
            share = seconds / result.wall_s if result.wall_s else 0.0
            line = f"  {cause.value:<26} {seconds:9.1f}  {share:6.1%}  {len(stops) or '':>5}{_detail(stops)}"
            lines.append(line.rstrip())
    lines.append(f"  {'all':<26} {sum(result.seconds.values()):9.1f}")
    lines.append(f"goodput {result.fraction:.1%}" + (f", step {result.last_step}" if result.last_step else ""))
    return lines


def _checkpoints(events: Iterable[Event]) -> list[str]:
    committed = [event for event in events if event["event"] == "checkpoint_committed"]
    if not committed:
        return []
    size_gib = sum(int(event.get("bytes", 0)) for event in committed) / (1 << 30)
    return [
        f"checkpoints: {len(committed)} committed, {size_gib:.2f} GiB, the last of step {committed[-1].get('step')}"
    ]


def _detail(stops: Sequence[Interruption]) -> str:
    """How long each took until training went on, and the steps it cost."""
    if not stops:
        return ""
    took = [one.resumed_ts - one.began_ts for one in stops if one.resumed_ts is not None]
    mean = f"  {sum(took) / len(took):.1f} s each" if took else "  never resumed"
    told = [one.steps_redone for one in stops if one.steps_redone is not None]
    return mean + (f", {sum(told)} steps done again" if told else "")
