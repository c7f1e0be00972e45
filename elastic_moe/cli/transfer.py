"""`elastic-moe ckpt push` and `pull`: copy checkpoints between a folder and a store, or between two stores."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from elastic_moe.cli.parser import natural_int, positive_int
from elastic_moe.cli.s3_options import size_text, with_s3_options
from elastic_moe.errors import UserError
from storage import RetryCounts, locate
from storage.transfer import Advance, Copier, CopyState, Found, Outcome, look, open_target, plan

if TYPE_CHECKING:
    from elastic_moe.cli.parser import Subparsers

_TELL_INTERVAL_S = 5.0
_MIB = 1024 * 1024
_EPILOG = """\
All committed checkpoints are copied, newest first, unless --step or --last says
which. The target shows one only when all of it is there and right. What a copy
that was killed has left at the target is compared, and only the rest is sent.

--json writes one object: what came of each step, objects and bytes sent and
already there, seconds, MiB/s, what stores were asked again.

Exit codes: 0 done; 1 a checkpoint is damaged, or a store failed; 2 wrong usage,
there is no checkpoint at the source, or the target holds another one there.
"""


def register(actions: Subparsers) -> None:
    """Add the actions `push` and `pull` to those of `ckpt`."""
    for name, text, source, target in (
        ("push", "copy checkpoints from a folder to a store", "FOLDER", "URL"),
        ("pull", "copy checkpoints from a store into a folder", "URL", "FOLDER"),
    ):
        action = actions.add_parser(name, help=text, description=text.capitalize() + ".", epilog=_EPILOG)
        run_help = "a run, or one step of it (RUN/step-000000120); a folder or any URL"
        action.add_argument("source", metavar=source, help=f"where from: {run_help}")
        action.add_argument("target", metavar=target, help="where to: a run; a folder or any URL")
        which = action.add_mutually_exclusive_group()
        which.add_argument("--step", type=natural_int, metavar="N", help="only the checkpoint of this step")
        which.add_argument("--last", type=positive_int, metavar="N", help="only the newest N checkpoints")
        action.add_argument("--dry-run", action="store_true", help="only say what would be copied")
        action.add_argument("--quiet", action="store_true", help="show no progress")
        action.add_argument("--json", action="store_true", help="write JSON")
        action.add_argument("--endpoint-url", metavar="URL", help="another server than AWS for s3:// URLs")
        action.add_argument("--profile", metavar="NAME", help="the profile of the AWS configuration for s3:// URLs")
        action.set_defaults(handler=_copy)


def _copy(args: argparse.Namespace) -> int:
    _check_direction(args)
    source_url, target_url = with_s3_options(args, args.source, args.target)
    with locate(source_url) as source, open_target(target_url) as target:
        started_s = time.monotonic()
        jobs = plan(source, target, args.step, args.last)
        looked = [look(source.store, target.store, job) for job in jobs]
        if args.dry_run:
            outcomes = [_planned(row) if isinstance(row, Found) else row for row in looked]
        else:
            total_bytes = sum(row.size_bytes for row in looked if isinstance(row, Found))
            with _progress(total_bytes, quiet=args.quiet) as advance:
                copier = Copier(source.store, target.store, time.time(), advance)
                outcomes = [copier.copy(row) if isinstance(row, Found) else row for row in looked]
        seconds = time.monotonic() - started_s
        retries = _sum(source.store.retries.snapshot(), target.store.retries.snapshot())
    if args.json:
        print(json.dumps(as_json(outcomes, seconds, retries, dry_run=args.dry_run), indent=2))
    else:
        _print(outcomes, seconds, retries)
    return 1 if any(row.state is CopyState.DAMAGED for row in outcomes) else 0


def _check_direction(args: argparse.Namespace) -> None:
    """Refuse `push` with what is meant for `pull`, which would fill the wrong side. Raises UserError."""
    is_remote = ["://" in url and not url.startswith("file://") for url in (args.source, args.target)]
    if is_remote == ([True, False] if args.action == "push" else [False, True]):
        other = "pull" if args.action == "push" else "push"
        raise UserError(f"{args.action} {args.source} {args.target}: the other way round, or `ckpt {other}`?")


def _planned(found: Found) -> Outcome:
    """The outcome that a copy would have, as far as sizes tell."""
    there = [entry for entry in found.objects if found.sizes_there.get(entry.name) == entry.size_bytes]
    there_bytes = sum(entry.size_bytes for entry in there)
    return Outcome(
        found.job.folder,
        found.job.step,
        CopyState.PLANNED,
        num_objects_sent=len(found.objects) - len(there),
        num_objects_present=len(there),
        sent_bytes=found.size_bytes - there_bytes,
        present_bytes=there_bytes,
    )


def as_json(outcomes: Sequence[Outcome], seconds: float, retries: RetryCounts, *, dry_run: bool) -> dict[str, Any]:
    """The result as `--json` prints it. Pure."""
    sent_bytes = sum(row.sent_bytes for row in outcomes)
    return {
        "dry_run": dry_run,
        "steps": [dataclasses.asdict(row) for row in outcomes],
        "num_objects_sent": sum(row.num_objects_sent for row in outcomes),
        "num_objects_present": sum(row.num_objects_present for row in outcomes),
        "sent_bytes": sent_bytes,
        "present_bytes": sum(row.present_bytes for row in outcomes),
        "seconds": round(seconds, 3),
        "mib_per_s": 0.0 if dry_run else round(sent_bytes / _MIB / max(seconds, 1e-9), 1),
        "retries": dict(retries.num_by_cause),
    }


def _print(outcomes: Sequence[Outcome], seconds: float, retries: RetryCounts) -> None:
    for row in outcomes:
        print(told(row))
    copied = [row for row in outcomes if row.state is CopyState.COPIED]
    if copied:
        sent_bytes = sum(row.sent_bytes for row in copied)
        rate = size_text(round(sent_bytes / max(seconds, 1e-9)))
        print(f"{len(copied)} of {len(outcomes)} copied: {size_text(sent_bytes)} in {seconds:.1f} s, {rate}/s")
    if retries.num_by_cause:
        print(f"a store had to be asked again: {retries}", file=sys.stderr)


def told(row: Outcome) -> str:
    """The line of one checkpoint. Pure."""
    name = row.folder or "checkpoint"
    sent = f"{size_text(row.sent_bytes)} in {row.num_objects_sent} objects"
    there = f"{size_text(row.present_bytes)} in {row.num_objects_present} objects"
    rest = f"; {there} there already" if row.num_objects_present else ""
    match row.state:
        case CopyState.COPIED:
            return f"{name}: copied, {sent}{rest}"
        case CopyState.PLANNED:
            return f"{name}: would copy {sent}{rest}"
        case CopyState.PRESENT:
            return f"{name}: there already, {there}"
        case CopyState.DAMAGED:
            return f"{name}: DAMAGED, not copied: {row.reason}"
        case _:
            return f"{name}: not copied: {row.reason}"


def _sum(one: RetryCounts, other: RetryCounts) -> RetryCounts:
    """Add up what both stores had to try again; a store that is source and target counts once as each."""
    counts = Counter(one.num_by_cause) + Counter(other.num_by_cause)
    return RetryCounts(dict(sorted(counts.items())), one.waited_s + other.waited_s)


@contextlib.contextmanager
def _progress(total_bytes: int, *, quiet: bool) -> Iterator[Advance]:
    """Show progress on stderr: a bar on a terminal, else a line every few seconds."""
    if quiet or not total_bytes:
        yield lambda num_bytes: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        lines = ProgressLines(total_bytes, time.monotonic, lambda line: print(line, file=sys.stderr, flush=True))
        yield lines.advance
        return
    columns = (BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("copy", total=total_bytes)
        yield lambda num_bytes: bar.advance(task, num_bytes)


class ProgressLines:
    """Tells progress in a line every few seconds, for logs. Thread-safe."""

    def __init__(self, total_bytes: int, clock: Callable[[], float], write: Callable[[str], None]) -> None:
        self._total_bytes = total_bytes
        self._clock = clock
        self._write = write
        self._lock = threading.Lock()
        self._started_s = self._told_s = clock()
        self._num_bytes = 0

    def advance(self, num_bytes: int) -> None:
        """Count bytes that were copied, and tell how many if it is time to."""
        with self._lock:
            self._num_bytes += num_bytes
            now_s = self._clock()
            if now_s - self._told_s < _TELL_INTERVAL_S:
                return
            self._told_s = now_s
            rate = self._num_bytes / (now_s - self._started_s)
            left = f", {(self._total_bytes - self._num_bytes) / rate:.0f} s left" if rate > 0 else ""
            done = f"{size_text(self._num_bytes)} of {size_text(self._total_bytes)}"
            self._write(f"{done}, {size_text(round(rate))}/s{left}")
