"""`elastic-moe status`: who is in a job, asked from its store. Imports no torch."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from elastic_moe.cli.store_options import add_store_options, open_store
from launcher.coordination.roster import Roster, run_prefix
from launcher.errors import Compacted, KVUnavailable
from launcher.kv import KV
from launcher.reports.snapshot import Seat, Snapshot, snapshot

if TYPE_CHECKING:
    from rich.console import RenderableType

    from elastic_moe.cli.parser import Subparsers

_WAIT_S = 1.0
_EPILOG = """\
The first node of the table leads: it decides on rounds. A node without ranks is
a spare, or waits for a round.

--json writes one object: "run_id", "state", "leader", "nodes", and "round"
(null before the first); with --watch one a line for each change. --watch ends
when the job does.

Exit codes: 0 done; 1 the store knows no such job; 2 wrong usage, or there is no
store at the endpoint.
"""


def register(verbs: Subparsers) -> None:
    """Add the verb `status`."""
    parser = verbs.add_parser(
        "status",
        help="show who is in a job, and its round",
        description="Show the nodes of a job and its current round, as its store knows them.",
        epilog=_EPILOG,
    )
    add_store_options(parser)
    parser.add_argument("--watch", action="store_true", help="show every change until the job ends")
    parser.add_argument("--json", action="store_true", help="write JSON")
    parser.set_defaults(handler=handle, ends_with_reader=True)


def handle(args: argparse.Namespace) -> int:
    """Print the state of the job; 1 when the store knows nothing of it."""
    with open_store(args) as store:
        states = follow(store.kv, store.run_id)
        first, _ = next(states)
        if args.watch:
            with _json_lines() if args.json else _live() as show:
                show(first, "")
                for found, trouble in states:
                    show(found, trouble)
                    if found.round is not None and found.round.outcome:
                        break
        elif args.json:
            print(json.dumps(as_json(first), indent=2))
        else:
            print("\n".join(as_lines(first)))
    return 0 if first.seats or first.round or args.watch else 1


def follow(kv: KV, run_id: str) -> Iterator[tuple[Snapshot, str]]:
    """The job's state now, and then whenever something changed; with it why the store does not answer, or "".

    Raises:
        KVUnavailable: the store does not answer the first question. Later it is waited for.
    """
    prefix = run_prefix(run_id)
    roster = Roster("", time.monotonic())
    told = False
    while True:
        try:
            listing = kv.list(prefix)
            entries = [(entry.key.removeprefix(prefix), entry) for entry in listing.entries]
            roster.replace(entries, time.monotonic())
            yield snapshot(run_id, roster.view()), ""
            told = True
            watch = kv.watch(prefix, listing.revision + 1)
            try:
                while True:
                    if events := watch.next(_WAIT_S):
                        changes = [(event.key.removeprefix(prefix), event.entry) for event in events]
                        roster.apply(changes, time.monotonic())
                        yield snapshot(run_id, roster.view()), ""
            finally:
                watch.cancel()
        except Compacted:
            continue
        except KVUnavailable as error:
            if not told:
                raise
            yield snapshot(run_id, roster.view()), str(error)
            time.sleep(_WAIT_S)


def as_json(found: Snapshot) -> dict[str, Any]:
    """What `--json` prints."""
    current = found.round
    return {
        "run_id": found.run_id,
        "state": found.state,
        "leader": next((seat.node_id for seat in found.seats if seat.leads), None),
        "nodes": [{**dataclasses.asdict(seat), "ranks": list(seat.ranks)} for seat in found.seats],
        "round": {
            **dataclasses.asdict(current),
            "world_size": current.world_size,
            "broken": found.broken,
            "missing": list(found.missing),
        }
        if current
        else None,
    }


def as_lines(found: Snapshot) -> list[str]:
    """The same for a person."""
    lines = [f"job {found.run_id}: {found.state}"]
    if current := found.round:
        mesh = f", mesh {current.mesh}" if current.mesh else ""
        nodes = f"{len(current.participants)} node{'s' if len(current.participants) != 1 else ''}"
        lines.append(f"generation {current.generation}: {current.world_size} ranks on {nodes}{mesh}")
        lines.append(f"  formed because: {current.reason}; restarts used: {current.restarts}")
        if current.spares:
            lines.append(f"  spares: {', '.join(current.spares)}")
        if found.missing:
            lines.append(f"  no longer there: {', '.join(found.missing)}")
    if found.seats:
        rows: list[tuple[str, ...]] = [("NODE", "HOST", "ADDRESS", "SLOTS", "STATUS", "GENERATION", "RANKS", "REASON")]
        rows += [_row(seat) for seat in found.seats]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines += ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return lines


def _row(seat: Seat) -> tuple[str, ...]:
    status = f"{seat.status}, draining" if seat.draining else seat.status
    ranks = f"{seat.ranks[0]}-{seat.ranks[-1]}" if len(seat.ranks) > 1 else "".join(map(str, seat.ranks)) or "-"
    generation = str(seat.generation) if seat.generation else "-"
    return seat.node_id, seat.host, seat.address, str(seat.slots), status, generation, ranks, seat.reason


_Show = Callable[[Snapshot, str], None]


@contextlib.contextmanager
def _json_lines() -> Iterator[_Show]:
    def show(found: Snapshot, trouble: str) -> None:
        if trouble:
            print(f"the store does not answer: {trouble}", file=sys.stderr, flush=True)
        else:
            print(json.dumps(as_json(found)), flush=True)

    yield show


@contextlib.contextmanager
def _live() -> Iterator[_Show]:
    """Redraws in place on a terminal; elsewhere every state follows the one before."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(highlight=False)

    def drawn(found: Snapshot, trouble: str) -> RenderableType:
        lines = [*as_lines(found), *([f"the store does not answer: {trouble}"] if trouble else [])]
        return Text("\n".join(lines), no_wrap=console.is_terminal, overflow="ellipsis")

    if not console.is_terminal:
        yield lambda found, trouble: print(drawn(found, trouble), "\n", sep="", flush=True)
        return
    with Live(console=console, auto_refresh=False) as live:
        yield lambda found, trouble: live.update(drawn(found, trouble), refresh=True)
