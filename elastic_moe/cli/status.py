"""`elastic-moe status`: who is in a job, asked from its store. Imports no torch."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from elastic_moe.cli.job_options import add_job_options, open_named_job
from elastic_moe.cli.timeline import moment
from elastic_moe.errors import UserError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from elastic_moe.cli.parser import Subparsers
    from launcher import JobStatus, NodeStatus

    _Show = Callable[[JobStatus, str], None]

_HEADINGS = ("NODE", "HOST", "ADDRESS", "SLOTS", "STATUS", "GENERATION", "RANKS", "STEP", "HEARTBEAT", "REASON")
_NOBODY_S = 60.0
_SILENT_S = 120.0
_EPILOG = """\
The first node of the table leads: it decides on rounds. A node without ranks is
a spare, or waits for a round.

Ages are of what nodes tell every few seconds, by their clocks. A heartbeat
is the last one of the worker that has been silent for the longest.

--json writes one object: "run_id", "ts", "state", "leader", "step",
"heartbeat_ts", "failure", "checkpoint", "nodes", and "round" (null before the
first); with --watch one a line for each change. Times are epoch seconds, null
where there is none. --watch ends when the job does, when it has had no node
for a minute, or when its store has not answered for two.

Exit codes: 0 done; 1 the store knows no such job, or --watch found nobody left;
2 wrong usage, or there is no store at the endpoint. --watch ends as the job
does: 0 if it has succeeded, else with what `run` ends with on its nodes.
"""


def register(verbs: Subparsers) -> None:
    """Add the verb `status`."""
    parser = verbs.add_parser(
        "status",
        help="show who is in a job, and its round",
        description="Show the nodes of a job and its current round, as its store knows them.",
        epilog=_EPILOG,
    )
    add_job_options(parser)
    parser.add_argument("--watch", action="store_true", help="show every change until the job ends")
    parser.add_argument("--json", action="store_true", help="write JSON")
    parser.set_defaults(handler=handle, ends_with_reader=True)


def handle(args: argparse.Namespace) -> int:
    """Print the state of the job; 1 when the store knows nothing of it."""
    with open_named_job(args) as job:
        states = job.follow()
        first, _ = next(states)
        if args.watch:
            with _json_lines() if args.json else _live() as show:
                return _watch(itertools.chain([(first, "")], states), show)
        if args.json:
            print(json.dumps(as_json(first, time.time()), indent=2))
        else:
            print("\n".join(as_lines(first, time.time())))
    return 0 if first.nodes or first.round else 1


def _watch(states: Iterator[tuple[JobStatus, str]], show: _Show) -> int:
    """Show every state to the end of the job, and return the exit code."""
    some_s = heard_s = time.monotonic()  # when there was last somebody, and when the store last answered
    for found, trouble in states:
        now_s = time.monotonic()
        show(found, trouble)
        if found.round is not None and found.round.outcome:
            return found.round.verdict.exit_code
        some_s = now_s if found.nodes or trouble else some_s
        heard_s = heard_s if trouble else now_s
        if now_s - some_s > _NOBODY_S:
            print(f"no node of the job has been there for {_NOBODY_S:.0f} s", file=sys.stderr)
            return 1
        if now_s - heard_s > _SILENT_S:
            raise UserError(
                f"the store has not answered for {_SILENT_S:.0f} s, so the job's end is not known: {trouble}"
            )
    raise AssertionError("states have no end")


def as_json(found: JobStatus, now_ts: float) -> dict[str, Any]:
    """The state as `--json` prints it."""
    current = found.round
    failure, checkpoint = found.failure, found.checkpoint
    return {
        "run_id": found.run_id,
        "ts": round(now_ts, 3),
        "state": found.state,
        "leader": next((node.node_id for node in found.nodes if node.leads), None),
        "step": found.step,
        "heartbeat_ts": found.beat_ts or None,
        "failure": {"ts": failure.ts, "message": failure.text} if failure else None,
        "checkpoint": {"ts": checkpoint.ts, "step": checkpoint.step} if checkpoint else None,
        "nodes": [_node_json(node) for node in found.nodes],
        "round": {
            **dataclasses.asdict(current),
            "world_size": current.world_size,
            "broken": found.broken,
            "missing": list(found.missing),
        }
        if current
        else None,
    }


def _node_json(node: NodeStatus) -> dict[str, Any]:
    fields = dataclasses.asdict(node)
    beat_ts = fields.pop("beat_ts")
    return {**fields, "ranks": list(node.ranks), "heartbeat_ts": beat_ts or None}


def as_lines(found: JobStatus, now_ts: float) -> list[str]:
    """The state for a person."""
    lines = [f"job {found.run_id}: {found.state}, at {moment(now_ts)}"]
    if current := found.round:
        mesh = f", mesh {current.mesh}" if current.mesh else ""
        nodes = f"{len(current.participants)} node{'s' if len(current.participants) != 1 else ''}"
        lines.append(f"generation {current.generation}: {current.world_size} ranks on {nodes}{mesh}")
        formed = f" {_ago(current.formed_ts, now_ts)}" if current.formed_ts else ""
        lines.append(f"  formed{formed} because: {current.reason}; restarts used: {current.restarts}")
        if current.spares:
            lines.append(f"  spares: {', '.join(current.spares)}")
        if found.missing:
            lines.append(f"  no longer there: {', '.join(found.missing)}")
    lines += _signs(found, now_ts)
    if found.nodes:
        rows: list[tuple[str, ...]] = [_HEADINGS]
        rows += [_row(node, now_ts) for node in found.nodes]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines += ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return lines


def _signs(found: JobStatus, now_ts: float) -> list[str]:
    """The lines of how the workers are, as far as nodes tell."""
    told = []
    if found.step >= 0:
        told.append(f"step {found.step}")
    if found.beat_ts:
        told.append(f"last heartbeat {_ago(found.beat_ts, now_ts)}")
    if checkpoint := found.checkpoint:
        told.append(f"last checkpoint of step {checkpoint.step}, {_ago(checkpoint.ts, now_ts)}")
    lines = [f"  {'; '.join(told)}"] if told else []
    if failure := found.failure:
        lines.append(f"  last failure {_ago(failure.ts, now_ts)}: {failure.text}")
    return lines


def _ago(ts: float, now_ts: float) -> str:
    """How long ago `ts` was, in words. Clocks differ: a time that is yet to come counts as now."""
    seconds = max(0.0, now_ts - ts)
    for unit, length_s, up_to_s in (("s", 1, 120), ("min", 60, 7200), ("h", 3600, 172800), ("d", 86400, math.inf)):
        if seconds < up_to_s:
            return f"{seconds / length_s:.0f} {unit} ago"
    raise AssertionError


def _row(node: NodeStatus, now_ts: float) -> tuple[str, ...]:
    status = f"{node.status}, draining" if node.draining else node.status
    ranks = f"{node.ranks[0]}-{node.ranks[-1]}" if len(node.ranks) > 1 else "".join(map(str, node.ranks)) or "-"
    generation = str(node.generation) if node.generation else "-"
    step = str(node.step) if node.step >= 0 else "-"
    beat = _ago(node.beat_ts, now_ts) if node.beat_ts else "-"
    place = node.node_id, node.host, node.address, str(node.slots)
    return *place, status, generation, ranks, step, beat, node.reason


class _Changes:
    """Tells which states are news: one in which only ages have grown or steps were done is not."""

    def __init__(self) -> None:
        self._last: tuple[object, str] | None = None

    def has(self, found: JobStatus, trouble: str) -> bool:
        """Whether this state differs from the one before."""
        nodes = tuple(dataclasses.replace(node, step=-1, beat_ts=0.0) for node in found.nodes)
        state = dataclasses.replace(found, nodes=nodes), trouble
        is_news, self._last = state != self._last, state
        return is_news


@contextlib.contextmanager
def _json_lines() -> Iterator[_Show]:
    changes = _Changes()

    def show(found: JobStatus, trouble: str) -> None:
        if not changes.has(found, trouble):
            return
        if trouble:
            print(f"the store does not answer: {trouble}", file=sys.stderr, flush=True)
        else:
            print(json.dumps(as_json(found, time.time())), flush=True)

    yield show


@contextlib.contextmanager
def _live() -> Iterator[_Show]:
    """Draw each state in the place of the one before on a terminal, and below it elsewhere."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(highlight=False)

    def drawn(found: JobStatus, trouble: str) -> RenderableType:
        lines = [*as_lines(found, time.time()), *([f"the store does not answer: {trouble}"] if trouble else [])]
        return Text("\n".join(lines), no_wrap=console.is_terminal, overflow="ellipsis")

    if not console.is_terminal:
        changes = _Changes()

        def printed(found: JobStatus, trouble: str) -> None:
            if changes.has(found, trouble):
                print(drawn(found, trouble), "\n", sep="", flush=True)

        yield printed
        return
    with Live(console=console, auto_refresh=False) as live:
        yield lambda found, trouble: live.update(drawn(found, trouble), refresh=True)
