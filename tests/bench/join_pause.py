"""The second half of `make bench-restore`: how long a training stands still when a node joins, from step to step.

A node of one worker trains under `elastic-moe run` with a state of `--mib`, and has saved it to an S3 gateway; a
second node comes, and takes half of that state over. The pause is from the last step of one rank to the first of two:
the save at the step boundary, the round, the new workers, the restore. `link` is what one connection of the loopback
interface carries from one process to another, of the bytes that the node which joins needs; `allowed` is twice that
and 0.5 s. Of the parts it is told when they had come to an end, in seconds after the last step.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.bench.family import ends_with_its_family
from tests.bench.recovery import SCRIPT, Job, Launcher
from tests.bench.restore_tiers import MIB, OVER_LINK, OVER_S, link_s, shared_memory
from tests.cluster import free_port, read_lines, until
from tests.s3 import S3Server, juicefs_gateway

STATE_SCRIPT = str(Path(SCRIPT).with_name("state.py"))
START_S, DEADLINE_S = 120.0, 120.0
PARTS = ("checkpoint_staged", "workers_yielded", "round_formed", "workers_started", "restored")
PARTS += ("script_imported", "ranks_met", "run_claimed")
QUICK = 3


def launcher(folder: Path) -> Launcher:
    """Nodes that wait for a second one for no longer than they must."""
    endpoint = f"127.0.0.1:{free_port()}"
    options = ("--nnodes", "1:2", "--nproc-per-node", "1", "--rdzv-id", f"join-{endpoint.rpartition(':')[2]}")
    options += ("--rdzv-endpoint", endpoint, "--rdzv-conf", "last_call=1,join_cooldown=1")
    command = (sys.executable, "-m", "elastic_moe", "run", *options, "--log-dir", str(folder / "logs"))
    return Launcher("elastic-moe run", command, endpoint)


def measure(server: S3Server, mib: int) -> tuple[float, dict[str, float]]:
    """The pause of one join in a fresh job, and when its parts had come to an end."""
    with tempfile.TemporaryDirectory(dir=shared_memory(), ignore_cleanup_errors=True) as text:
        folder = Path(text)
        job = Job(launcher(folder), folder)
        job.script = (STATE_SCRIPT, text, server.url(folder.name), str(mib))
        try:
            job.start_node()
            until("a checkpoint", lambda: told(folder, "checkpoint_committed") or job.ended(), START_S)
            job.start_node()
            until("a step of two", lambda: job.steps(2) or job.ended(), DEADLINE_S)
            assert not job.ended(), job.last_words()
        finally:
            job.end()
        last_ts, next_ts = job.steps(1)[-1]["ts"], job.steps(2)[0]["ts"]
        assert job.steps(2)[0]["step"] == job.steps(1)[-1]["step"] + 1, "no step is done again"
        events = told(folder)
        ends = {
            part: max(e["ts"] for e in events if e["event"] == part and last_ts <= e["ts"] <= next_ts) - last_ts
            for part in PARTS
            if any(e["event"] == part and last_ts <= e["ts"] <= next_ts for e in events)
        }
        return next_ts - last_ts, ends


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
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    pauses, links = [], []
    with (
        tempfile.TemporaryDirectory(dir=shared_memory(), ignore_cleanup_errors=True) as text,
        ends_with_its_family(Path(text)),
        juicefs_gateway(Path(text)) as server,
    ):
        os.environ.update(server.environment)
        for _ in range(QUICK if options.quick else options.repeats):
            pause_s, ends = measure(server, options.mib)
            pauses.append(pause_s)
            links.append(link_s(options.mib * MIB // 2))
            shown = ", ".join(f"{part} {seconds:.2f}" for part, seconds in sorted(ends.items(), key=lambda row: row[1]))
            print(f"a join: {pause_s:.2f} s ({shown}), link {links[-1]:.2f} s", file=sys.stderr, flush=True)
    if options.json:
        print(json.dumps({"mib": options.mib, "cores": os.cpu_count(), "seconds": pauses, "link": links}))
        return 0
    allowed_s = OVER_LINK * statistics.median(links) + OVER_S
    pause_s = statistics.median(pauses)
    print(f"{options.mib} MiB, {os.cpu_count()} cores, torch {torch.__version__}, Python {platform.python_version()}")
    print(
        f"a join stands still for {pause_s:.2f} s ({min(pauses):.2f} to {max(pauses):.2f}), allowed {allowed_s:.2f} s:"
        f" {'met' if pause_s <= allowed_s else 'MISSED'}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
