"""`elastic-moe report`: what happened to a job and where its time went, from its events. Imports no torch."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from elastic_moe.cli.parser import PROG, local, one_line
from elastic_moe.cli.picture import check_picture, draw_picture, find_metrics
from elastic_moe.cli.timeline import moment, timeline
from elastic_moe.errors import UserError
from launcher import EventName, EventRecord, hide_secrets
from launcher.reports import (
    Cause,
    ClockJump,
    Goodput,
    Interruption,
    Outage,
    account,
    doubtful,
    find_files,
    jobs_of,
    name_some,
    offsets,
    read_events,
    set_right,
    steady,
)

if TYPE_CHECKING:
    from elastic_moe.cli.parser import Subparsers

T = TypeVar("T")
Tell = Callable[[str, Sequence[EventRecord], Sequence[ClockJump]], T]

_SHOWN_S = 0.05
_JUMPS_SHOWN = 4

_EPILOG = """\
LOG_DIR is what `run` was given as --log-dir, or an events.jsonl. Give those of
all nodes where each has its own: together they tell the whole story. In folders
every events.jsonl below is read, and what a log rotation made of it.

The seconds of all causes add up to the wall time, from the first event to the
last. Goodput is the part of it in which the job made progress that it kept.
Times are those of this machine's time zone. Where a node's clock was set while
it ran, that is undone; where the clocks of nodes differ so much that effects
come before causes, they are set right. Either is told.

--picture draws loss, validation, throughput and the experts' load by step, with
generations and what happened. It reads --metrics, or each metrics.jsonl in and
beside LOG_DIR; without LOG_DIR it tells of nothing else.

--json writes one object: "runs", one for each job, with "outcome" or "end",
"began" and "ended", "wall_s", "goodput", "steps_redone", "seconds" by cause,
"interruptions" (cause, root, nodes, victims, times, steps_redone), "outages" of
stores, "clock_offsets", "clock_jumps", "clocks_in_doubt" (pairs of nodes) and
"events" (how many of each); "unreadable_lines".

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
    parser.add_argument("paths", nargs="*", type=Path, metavar="LOG_DIR", help="folder of `run --log-dir`, or a file")
    parser.add_argument("--json", action="store_true", help="write JSON")
    parser.add_argument("--picture", type=local, metavar="FILE", help="draw the training as well: .png, .svg or .pdf")
    parser.add_argument(
        "--metrics", nargs="+", type=Path, metavar="FILE", help="of the picture: the job's train.metrics, of each node"
    )
    parser.set_defaults(handler=handle)


def handle(args: argparse.Namespace) -> int:
    """Print the report of every run in the files, and draw the training if asked to."""
    if args.picture is None:
        if args.metrics or not args.paths:
            raise UserError(
                "--metrics is for --picture" if args.metrics else "give LOG_DIR, what `run` had as --log-dir"
            )
        return _report(args)
    check_picture(args.picture)
    metrics = args.metrics or find_metrics(args.paths or [Path()])
    code = _report(args) if args.paths else 0
    events = read_events(find_files(args.paths))[0] if args.paths else []
    draw_picture(args.picture, metrics, events)
    if not args.json:
        print(f"{args.picture} shows the training")
    return code


def _report(args: argparse.Namespace) -> int:
    try:
        events, num_unreadable = read_events(find_files(args.paths))
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}" if error.strerror else str(error)) from error
    if not events:
        raise UserError(f"no events in {', '.join(map(str, args.paths))}; did `run` get --log-dir?")
    if args.json:
        reports = _told(as_json, events)
        print(json.dumps({"runs": reports, "unreadable_lines": num_unreadable}, indent=2))
        return 0
    print("\n\n".join("\n".join(map(_harmless, lines)) for lines in _told(as_lines, events)))
    if num_unreadable:
        print(f"{num_unreadable} lines are no events and were left out", file=sys.stderr)
    return 0


def _told(tell: Tell[T], events: Sequence[EventRecord]) -> list[T]:
    """What `tell` makes of each job; those whose events this version does not write are named on stderr.

    Raises:
        UserError: there is no other.
    """
    told: list[T] = []
    left_out = list[str]()
    events, jumps = steady(events)
    for run_id, of_run in jobs_of(events):
        try:
            told.append(tell(run_id, of_run, jumps))
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, OSError, RecursionError) as error:
            why = one_line(f"{type(error).__name__}: {error}")
            left_out.append(f"job {run_id!r}: its events are not as this version of {PROG} writes them ({why})")
    if not told:
        raise UserError(left_out[0])
    for line in left_out:
        print(f"left out: {line}", file=sys.stderr)
    return told


def _harmless(line: str) -> str:
    """The line without what a terminal would obey, and secrets: scripts write events of their own, with any text."""
    plain = line if line.isprintable() else "".join(char if char.isprintable() else " " for char in line)
    return hide_secrets(plain)


def as_json(run_id: str, events: Sequence[EventRecord], jumps: Sequence[ClockJump]) -> dict[str, Any]:
    """One job's report as `--json` prints it; `jumps` are those of all jobs' nodes."""
    clocks, doubts = offsets(events), doubtful(events)
    events, jumps = set_right(events, clocks), _of_job(jumps, events)
    result = account(events)
    return {
        "run_id": run_id,
        "outcome": result.outcome,
        "end": result.end,
        "began": moment(result.began_ts),
        "ended": moment(result.ended_ts),
        "began_ts": result.began_ts,
        "ended_ts": result.ended_ts,
        "wall_s": result.wall_s,
        "goodput": result.fraction,
        "last_step": result.last_step,
        "steps_redone": result.steps_redone,
        "seconds": dict(result.seconds),
        "interruptions": [{**dataclasses.asdict(one), "seconds": one.seconds} for one in result.interruptions],
        "outages": [dataclasses.asdict(one) for one in result.outages],
        "clock_offsets": clocks,
        "clock_jumps": [dataclasses.asdict(jump) for jump in jumps],
        "clocks_in_doubt": doubts,
        "events": dict(collections.Counter(event["event"] for event in events)),
    }


def as_lines(run_id: str, events: Sequence[EventRecord], jumps: Sequence[ClockJump]) -> list[str]:
    """One job's report for a person; `jumps` are those of all jobs' nodes."""
    clocks, doubts = offsets(events), doubtful(events)
    events, jumps = set_right(events, clocks), _of_job(jumps, events)
    result = account(events)
    return [
        f"job {run_id}: {result.outcome or result.end or 'no end in these events'}",
        f"from {moment(result.began_ts)} to {moment(result.ended_ts)}",
        *_clocks(jumps),
        *(f"the clock of {node} was {-seconds:+.1f} s off, and is set right here" for node, seconds in clocks.items()),
        *([_doubt(doubts)] if doubts else []),
        *_failures(result),
        "",
        "what happened",
        *timeline(events, result.began_ts),
        "",
        *_table(result),
        *_checkpoints(events),
        *map(_outage, result.outages),
    ]


def _of_job(jumps: Sequence[ClockJump], events: Sequence[EventRecord]) -> list[ClockJump]:
    nodes = {str(event.get("node", "")) for event in events}
    return [jump for jump in jumps if jump.node in nodes]


def _clocks(jumps: Sequence[ClockJump]) -> list[str]:
    lines = [
        f"the clock of {jump.node} was set {'forward' if jump.seconds > 0 else 'back'} by {abs(jump.seconds):.1f} s at "
        f"{moment(jump.ts)}, which is undone here"
        for jump in jumps[:_JUMPS_SHOWN]
    ]
    more = len(jumps) - len(lines)
    return [*lines, *([f"clocks were set {more} times more, which is undone here as well"] if more else [])]


def _doubt(doubts: Sequence[tuple[str, str]]) -> str:
    pairs = name_some([f"{one} and {other}" for one, other in doubts], "; ")
    return f"clocks disagree by more and less in turn, so that seconds below may be booked to a wrong cause: {pairs}"


def _failures(result: Goodput) -> list[str]:
    """The lines of what failed: each root cause, then the failures that it took with it."""
    lines = []
    for one in result.interruptions:
        if one.cause in (Cause.FAILURE, Cause.NODE_LOSS, Cause.HANG, Cause.STORE):
            lines.append(f"  root cause at {moment(one.began_ts)}, {one.began_ts - result.began_ts:.1f} s: {one.root}")
            lines += [f"    then: {victim}" for victim in one.victims]
    return ["", "what failed", *lines] if lines else []


def _table(result: Goodput) -> list[str]:
    lines = [f"where {result.wall_s:.1f} s went{'':14}seconds   share  times"]
    for cause, seconds in result.seconds.items():
        stops = [one for one in result.interruptions if one.cause is cause]
        if seconds >= _SHOWN_S or stops:
            share = seconds / result.wall_s if result.wall_s else 0.0
            line = f"  {cause.value:<26} {seconds:9.1f}  {share:6.1%}  {len(stops) or '':>5}{_detail(stops)}"
            lines.append(line.rstrip())
    lines.append(f"  {'all':<26} {sum(result.seconds.values()):9.1f}")
    step = f", step {result.last_step}" if result.last_step else ""
    again = f", {result.steps_redone} steps done again" if result.steps_redone else ""
    lines.append(f"goodput {result.fraction:.1%}{step}{again}")
    return lines


def _checkpoints(events: Sequence[EventRecord]) -> list[str]:
    committed = {
        (e.get("generation"), e.get("step")): e for e in events if e["event"] == EventName.CHECKPOINT_COMMITTED
    }
    failed = {(e.get("generation"), e.get("step")): e for e in events if e["event"] == EventName.CHECKPOINT_FAILED}
    told = []
    if committed:
        size_gib = sum(int(event.get("bytes", 0)) for event in committed.values()) / (1 << 30)
        last = list(committed.values())[-1]
        told = [f"{len(committed)} committed, {size_gib:.2f} GiB, the last of step {last.get('step')}"]
    if failed:
        last = list(failed.values())[-1]
        told.append(f"{len(failed)} failed, the last of step {last.get('step')}: {last.get('reason')}")
    return [f"checkpoints: {'; '.join(told)}"] if told else []


def _outage(outage: Outage) -> str:
    """The line of a store that was away, whether or not that interrupted anything."""
    name = f"{outage.store} {outage.where}".rstrip()
    lasted = (
        f"for {outage.ended_ts - outage.began_ts:.1f} s" if outage.ended_ts else "and nobody told that it came back"
    )
    since, tellers = moment(outage.began_ts), name_some(outage.nodes)
    return f"{name} was away from {since} on, {lasted} (told by {tellers}): {outage.reason}"


def _detail(stops: Sequence[Interruption]) -> str:
    """How long interruptions of one cause took until training went on, and the steps that they cost."""
    if not stops:
        return ""
    told = []
    if took := [one.resumed_ts - one.began_ts for one in stops if one.resumed_ts is not None]:
        told.append(f"{sum(took) / len(took):.1f} s each")
    if cut_short := sum(1 for one in stops if one.followed_by):
        told.append("something else came before it trained" if len(stops) == 1 else f"{cut_short} before they trained")
    if ended := len(stops) - len(took) - cut_short:
        told.append("never resumed" if len(stops) == 1 else f"{ended} never resumed")
    known = [one.steps_redone for one in stops if one.steps_redone is not None]
    if known:
        told.append(f"{sum(known)} steps done again")
    return "  " + ", ".join(told)
