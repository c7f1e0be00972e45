"""The second half of `make bench-restore`: how long a training stands still when a node joins, from step to step.

A node of one worker trains under `elastic-moe run` with a state of `--mib`, and has saved it to an S3 gateway; a
second node comes, and takes half of that state over. The pause is from the last step of one rank to the first of two:
the save at the step boundary, the round, the new workers, the restore. `link` is what one connection of the loopback
interface carries from one process to another, of the bytes that the node which joins needs; `allowed` is twice that
and 0.5 s. What it is made of is told part by part: each is from the end of the one before to its own on all nodes.

`--folder` saves to a folder in memory instead, beside which no gateway works; `--upload-limit` is that of the nodes'
services, in MiB a second. `--at-hand` has so many GiB of free memory at hand when the workers are asked to stop: else
the pause holds what a virtual machine's host takes to back memory that lay free (`tests.bench.backed`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.bench.backed import at_hand
from tests.bench.family import ends_with_its_family
from tests.bench.recovery import SCRIPT, Job, Launcher
from tests.bench.restore_tiers import MIB, OVER_LINK, OVER_S, link_s, shared_memory
from tests.cluster import free_port, read_lines, until
from tests.s3 import S3Server, juicefs_gateway

STATE_SCRIPT = str(Path(SCRIPT).with_name("state.py"))
START_S, DEADLINE_S = 120.0, 120.0
PARTS = {
    "checkpoint_staged": "copy of the state",
    "workers_yielded": "in the service's hands",
    "workers_stopped": "end of the old workers",
    "round_formed": "round",
    "workers_started": "start of the new ones",
    "script_imported": "their imports",
    "ranks_met": "process group",
    "run_claimed": "Checkpointer",
    "restored": "restore",
}
"""By the event that ends it, or the script's mark. What it takes to end and start workers no checkpointer can save."""
FIRST_STEP = "first step"
QUICK = 3
LINE_BYTES = 200
"""More than a step takes in its file."""


def launcher(folder: Path, upload_limit: str) -> Launcher:
    """Nodes that wait for a second one for no longer than they must."""
    endpoint = f"127.0.0.1:{free_port()}"
    options = ("--nnodes", "1:2", "--nproc-per-node", "1", "--rdzv-id", f"join-{endpoint.rpartition(':')[2]}")
    options += ("--rdzv-endpoint", endpoint, "--rdzv-conf", "last_call=1,join_cooldown=1")
    options += ("--upload-limit", upload_limit) if upload_limit else ()
    command = (sys.executable, "-m", "elastic_moe", "run", *options, "--log-dir", str(folder / "logs"))
    return Launcher("elastic-moe run", command, endpoint)


def measure(server: S3Server | None, mib: int, upload_limit: str, at_hand_bytes: int) -> tuple[float, dict[str, float]]:
    """The pause of one join in a fresh job, and of it the seconds of each part."""
    with tempfile.TemporaryDirectory(dir=shared_memory(), ignore_cleanup_errors=True) as text:
        folder = Path(text)
        job = Job(launcher(folder, upload_limit), folder)
        job.script = (STATE_SCRIPT, text, server.url(folder.name) if server else str(folder / "run"), str(mib))
        try:
            job.start_node()
            until("a checkpoint", lambda: told(folder, "checkpoint_committed") or job.ended(), START_S)
            with at_hand(at_hand_bytes):
                job.start_node()
                until("the wish to stop", lambda: told(folder, "stop_requested") or job.ended(), DEADLINE_S)
            until("a step of two", lambda: is_a_step_of_two(folder) or job.ended(), DEADLINE_S)
            assert not job.ended(), job.last_words()
        finally:
            job.end()
        last_ts, next_ts = job.steps(1)[-1]["ts"], job.steps(2)[0]["ts"]
        assert job.steps(2)[0]["step"] == job.steps(1)[-1]["step"] + 1, "no step is done again"
        return next_ts - last_ts, parts_of(told(folder), last_ts, next_ts)


def parts_of(events: Sequence[Mapping[str, Any]], last_ts: float, next_ts: float) -> dict[str, float]:
    """Of the seconds between two steps those of each part that has left its event, in the order in which they ended."""
    of_pause = [e for e in events if last_ts <= e["ts"] <= next_ts]
    ends = {part: [e["ts"] for e in of_pause if e["event"] == part] for part in PARTS}
    found, at = dict[str, float](), last_ts
    for part, ts in sorted(((part, max(ts)) for part, ts in ends.items() if ts), key=lambda row: row[1]):
        found[PARTS[part]], at = ts - at, ts
    for event in (e for e in of_pause if e["event"] == "restored"):
        for phase, seconds in event["phases"].items():
            found[f"of it {phase}"] = max(found.get(f"of it {phase}", 0.0), seconds)
    return found | {FIRST_STEP: next_ts - at}


def is_a_step_of_two(folder: Path) -> bool:
    """Whether the last step was. It is looked at often, and reading all of them would take a part of the processor."""
    with (folder / "steps.jsonl").open("rb") as steps:
        steps.seek(-min(steps.seek(0, os.SEEK_END), LINE_BYTES), os.SEEK_END)
        return b'"world_size": 2' in steps.read()


def told(folder: Path, event: str = "") -> list[dict[str, Any]]:
    """The events of that name so far, or all, and what the script has written down."""
    files = [*folder.glob("logs/**/events.jsonl"), folder / "marks.jsonl"]
    return [e for file in files if file.exists() for e in read_lines(file) if event in ("", e["event"])]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and say whether the bar is met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=1024, help="size of the state (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} repeats")
    parser.add_argument("--folder", action="store_true", help="save to a folder, not to S3")
    parser.add_argument("--upload-limit", default="", metavar="MIB_PER_S", help="what the services send at most")
    parser.add_argument("--at-hand", type=float, default=0.0, metavar="GIB", help="free memory that is backed before")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    at_hand_bytes = int(options.at_hand * 1024) * MIB
    pauses, links, parts = [], [], list[dict[str, float]]()
    with contextlib.ExitStack() as stack:
        folder = tempfile.TemporaryDirectory(dir=shared_memory(), ignore_cleanup_errors=True)
        text = stack.enter_context(folder)
        stack.enter_context(ends_with_its_family(Path(text)))
        server = None if options.folder else stack.enter_context(juicefs_gateway(Path(text)))
        os.environ.update(server.environment if server else {})
        for _ in range(QUICK if options.quick else options.repeats):
            pause_s, of_it = measure(server, options.mib, options.upload_limit, at_hand_bytes)
            pauses.append(pause_s)
            parts.append(of_it)
            links.append(link_s(options.mib * MIB // 2))
            shown = ", ".join(f"{part} {seconds:.2f}" for part, seconds in of_it.items())
            print(f"a join: {pause_s:.2f} s ({shown}), link {links[-1]:.2f} s", file=sys.stderr, flush=True)
    if options.json:
        found = {
            "mib": options.mib,
            "at_hand_gib": options.at_hand,
            "cores": os.cpu_count(),
            "seconds": pauses,
            "link": links,
            "parts": parts,
        }
        print(json.dumps(found))
        return 0
    allowed_s = OVER_LINK * statistics.median(links) + OVER_S
    pause_s = statistics.median(pauses)
    print(f"{options.mib} MiB, {os.cpu_count()} cores, torch {torch.__version__}, Python {platform.python_version()}")
    if at_hand_bytes:
        print(f"{options.at_hand:g} GiB of free memory at hand when the workers are asked to stop")
    for part in dict.fromkeys(part for of_it in parts for part in of_it):
        print(f"    {statistics.median(of_it.get(part, 0.0) for of_it in parts):6.3f} s  {part}")
    print(
        f"a join stands still for {pause_s:.2f} s ({min(pauses):.2f} to {max(pauses):.2f}), allowed {allowed_s:.2f} s:"
        f" {'met' if pause_s <= allowed_s else 'MISSED'}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
