"""`elastic-moe ckpt`: look at the checkpoints of a run, copy them, and clean up.

Imports torch only for checkpoints that stock DCP wrote.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import storage
from elastic_moe.cli import transfer, weights
from elastic_moe.cli.s3_options import size_text, with_s3_options
from elastic_moe.errors import UserError

if TYPE_CHECKING:
    from elastic_moe.cli.parser import Subparsers

_URL_HELP = "a run's folder or URL (s3://bucket/run), or one step of it (RUN/step-000000120)"
_EPILOG = """\
--json writes one object for `show`, a list of objects for the others.

Exit codes: 0 done, for `verify` every byte is good; 1 a checkpoint is damaged;
2 wrong usage, or there is no checkpoint at the URL.
"""


def register(verbs: Subparsers) -> None:
    """Add the verb `ckpt` with its own verbs `ls`, `show`, `verify`, `gc`, `push`, `pull`, `export` and `import`."""
    parser = verbs.add_parser(
        "ckpt",
        help="list, show, verify, copy and clean up checkpoints",
        description="List, show, verify and copy the checkpoints of a run, and clean up.",
        epilog=_EPILOG,
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", dest="action", required=True)
    for name, handler, text in (
        ("ls", _list, "list the steps of a run: size, age, who saved, state"),
        ("show", _show, "show what a checkpoint holds: tensors and their shards"),
        ("verify", _verify, "read every byte and compare it with its checksum"),
        ("gc", _collect, "remove what dead jobs left behind: attempts that never committed, unfinished uploads"),
    ):
        action = actions.add_parser(name, help=text, description=text.capitalize() + ".", epilog=_EPILOG)
        action.add_argument("url", metavar="URL", help=_URL_HELP)
        action.add_argument("--json", action="store_true", help="write JSON")
        action.add_argument("--endpoint-url", metavar="URL", help="another server than AWS for s3:// URLs")
        action.add_argument("--profile", metavar="NAME", help="the profile of the AWS configuration for s3:// URLs")
        if name == "gc":
            action.add_argument("--dry-run", action="store_true", help="only say what would be removed")
            action.add_argument(
                "--older-than", type=_hours, default=24.0, metavar="HOURS", help="only what is older (default 24)"
            )
        action.set_defaults(handler=handler)
    transfer.register(actions)
    weights.register(actions)


def _list(args: argparse.Namespace) -> int:
    with _locate(args) as location:
        rows = storage.summaries(location)
    if args.json:
        _print_json([dataclasses.asdict(row) for row in rows])
        return 0
    now_s = time.time()
    table = [("STEP", "STATE", "SIZE", "AGE", "WORLD", "GENERATION", "MESH")]
    table += [
        (
            _or_dash(row.step),
            row.state,
            "-" if row.size_bytes is None else size_text(row.size_bytes),
            "-" if row.created_unix_s is None else _age(now_s - row.created_unix_s),
            _or_dash(row.world_size),
            _or_dash(row.generation),
            _mesh(row.mesh),
        )
        for row in rows
    ]
    _print_table(table)
    for row in rows:
        if row.reason:
            print(f"step {row.step}: {row.reason}")
    return 0


def _show(args: argparse.Namespace) -> int:
    with _locate(args) as location:
        found = storage.details(location.store, storage.checkpoints(location)[0])
    if args.json:
        _print_json(dataclasses.asdict(found))
        return 0
    summary = found.summary
    print(f"step {_or_dash(summary.step)}, {summary.state}, {size_text(summary.size_bytes or 0)}")
    if summary.world_size is not None:
        lineage = f" of lineage {summary.lineage}" if summary.lineage else ""
        print(
            f"saved by {summary.world_size} ranks, generation {summary.generation}{lineage}; mesh {_mesh(summary.mesh)}"
        )
    table = [("TENSOR", "DTYPE", "SHAPE", "SHARDS")]
    for tensor in found.tensors:
        table.append((tensor.key, tensor.dtype, _dims(tensor.shape), str(len(tensor.shards))))
        if len(tensor.shards) > 1:
            for shard in tensor.shards:
                place = f"  at {_dims(shard.offsets)}"
                table.append((place, "", _dims(shard.sizes), shard.object.rpartition("/")[2]))
    _print_table(table)
    if found.values:
        print(f"values: {', '.join(found.values)}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    verdicts = []
    with _locate(args) as location:
        for prefix in storage.checkpoints(location):
            verdict = storage.verify(location.store, prefix)
            verdicts.append(verdict)
            if not args.json:
                _print_verdict(verdict)
    if args.json:
        _print_json([{"good": not v.problems, **dataclasses.asdict(v)} for v in verdicts])
    return 1 if any(verdict.problems for verdict in verdicts) else 0


def _collect(args: argparse.Namespace) -> int:
    with _locate(args) as location:
        if location.prefix is not None:
            raise UserError(f"gc works on a whole run, and {args.url!r} is one checkpoint; give the folder above it")
        now_s = time.time()
        found = storage.find_garbage(location.store, now_s, args.older_than * 3600.0)
        for row in found:
            if not args.dry_run:
                storage.remove_garbage(location.store, row)
            if not args.json:
                did = "would remove" if args.dry_run else "removed"
                size = f", {size_text(row.size_bytes)} in {row.num_objects} objects" if row.keys else ""
                print(f"{did} {row.kind} {row.name}{size}, {_age(now_s - row.modified_unix_s)} old")
    if args.json:
        shown = ("name", "kind", "num_objects", "size_bytes", "modified_unix_s")
        _print_json([{"removed": not args.dry_run, **{name: getattr(row, name) for name in shown}} for row in found])
    elif not found:
        print("nothing to remove")
    return 0


def _hours(text: str) -> float:
    """For argparse's `type`."""
    least = storage.GARBAGE_AGE_S_MIN / 3600.0
    try:
        hours = float(text)
    except ValueError:
        hours = 0.0
    if not hours >= least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of hours >= {least:g}: a job may still be saving")
    return hours


@contextlib.contextmanager
def _locate(args: argparse.Namespace) -> Iterator[storage.Location]:
    """Open the URL with what the options add to it, close it, and tell on stderr what was not smooth meanwhile.

    Raises UserError for options that the URL cannot have.
    """
    (url,) = with_s3_options(args, args.url)
    with storage.locate(url) as location:
        yield location
        retries = location.store.retries.snapshot()
    if retries.num_by_cause:
        print(f"the store had to be asked again: {retries}", file=sys.stderr)


def _print_verdict(verdict: storage.Verification) -> None:
    name = verdict.folder or "checkpoint"
    if not verdict.problems:
        print(f"{name}: good, {size_text(verdict.size_bytes)} in {verdict.num_objects} objects")
        return
    print(f"{name}: DAMAGED")
    for problem in verdict.problems:
        print(f"  {problem}")


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def _or_dash(value: object) -> str:
    return "-" if value is None else str(value)


def _dims(sizes: Sequence[int]) -> str:
    return "[" + ", ".join(map(str, sizes)) + "]"


def _mesh(mesh: dict[str, Any] | None) -> str:
    if not mesh:
        return "-"
    return " x ".join(f"{name} {mesh[name]}" for name in ("replicate", "shard", "expert") if name in mesh) or "-"


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
