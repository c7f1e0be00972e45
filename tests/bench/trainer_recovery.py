"""The second half of `make bench-recovery`: the real trainer loses a node, from the kill to the next step, and what is
done again.

Two nodes of one worker each on this machine train a small model under `elastic-moe run`; the second node is killed at a
random moment between two checkpoints. Rows take turns: the model whole on each node (two replicas), or in halves; its
checkpoints in a folder, or on an S3 server. Prints a table as it goes, and writes JSON beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from tests.bench.recovery import Job, Launcher, kill_node, listens
from tests.cluster import free_port, read_lines, until
from tests.s3 import S3Server, juicefs_gateway

START_S = 180.0
DEADLINE_S = 120.0
EVERY = 20
"""Steps between two checkpoints."""
_JOB = """\
[model]
dim = {dim}
num_layers = 2
num_heads = 4
num_kv_heads = 2
num_experts = 4
top_k = 2
expert_dim = {dim}

[train]
steps = 100000
global_batch = 4
seq_len = 64
metrics = {metrics}

[checkpoint]
url = {url}
every = {every}
{more}

[mesh]
expert = 1
{mesh} = 1
"""


@dataclasses.dataclass(frozen=True)
class Row:
    """One way to lose a node: where checkpoints go, and of what the mesh has one (replicas, or shards)."""

    name: str
    on_s3: bool
    one: str
    more: str = ""
    """Of the section `[checkpoint]`."""


ROWS = [
    Row("halves, folder", False, "replicate"),
    Row("halves, S3", True, "replicate"),
    Row("halves, S3 and RAM", True, "replicate", "ram_every = 2"),
    Row("two replicas, folder", False, "shard"),
    Row("two replicas, S3", True, "shard"),
]


@dataclasses.dataclass(frozen=True)
class Loss:
    """What one lost node cost: seconds to the survivor's next step, and to one that was not done before."""

    next_step_s: float
    new_step_s: float
    steps_redone: int


class TrainerJob(Job):
    """Two nodes that train `JOB.toml` in the folder; its steps are the lines of its metrics."""

    def __init__(self, launcher: Launcher, folder: Path, environment: Mapping[str, str]) -> None:
        super().__init__(launcher, folder)
        self._environment |= environment
        self.script = ("-m", "elastic_moe", "train", str(folder / "job.toml"))

    def steps(self, world_size: int | None = None) -> list[dict[str, float]]:
        lines = read_lines(self.folder / "metrics.jsonl")
        return [line for line in lines if world_size in (None, line["world_size"])]


@contextlib.contextmanager
def training(row: Row, dim: int, server: S3Server) -> Iterator[TrainerJob]:
    """Both nodes train, and a checkpoint is committed."""
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        endpoint = f"127.0.0.1:{free_port()}"
        number = endpoint.rpartition(":")[2]
        url = server.url(f"bench-{number}") if row.on_s3 else str(folder / "checkpoints")
        metrics = json.dumps(str(folder / "metrics.jsonl"))
        (folder / "job.toml").write_text(
            _JOB.format(dim=dim, metrics=metrics, url=json.dumps(url), every=EVERY, mesh=row.one, more=row.more)
        )
        command = (sys.executable, "-m", "elastic_moe", "run", "--nnodes", "1:2", "--nproc-per-node", "1")
        command += ("--max-restarts", "3", "--rdzv-id", f"bench-{number}", "--rdzv-endpoint", endpoint)
        command += ("--rdzv-conf", "last_call=60", "--log-dir", str(folder / "logs"))
        command += ("--mesh", str(folder / "job.toml"))
        job = TrainerJob(Launcher(row.name, command, endpoint), folder, server.environment)
        try:
            job.start_node()
            until("the first node hosts the meeting place", lambda: listens(endpoint), START_S)
            job.start_node()
            until("two checkpoints' steps, or an end", lambda: job.steps(2)[2 * EVERY :] or job.ended(), START_S)
            if job.ended():
                raise AssertionError(f"{row.name} ended at its start:\n{job.last_words()}")
            yield job
        finally:
            job.end()


def lose_a_node(row: Row, dim: int, server: S3Server, chance: random.Random) -> Loss:
    """Kill the second node of a fresh job a random number of steps after a checkpoint."""
    with training(row, dim, server) as job:
        at = (int(job.steps()[-1]["step"]) // EVERY + 1) * EVERY + chance.randrange(2, EVERY)
        until(f"step {at}", lambda: job.steps()[-1]["step"] >= at, DEADLINE_S)
        began_s = time.time()
        kill_node(job)
        alone = until("a step of the survivor", lambda: job.steps(1), DEADLINE_S)[0]
        last = max(int(line["step"]) for line in job.steps(2))
        again = until("a step not done before", lambda: [s for s in job.steps(1) if s["step"] > last], DEADLINE_S)[0]
        return Loss(alone["ts"] - began_s, again["ts"] - began_s, last - int(alone["step"]) + 1)


def told(row: Row, losses: Sequence[Loss]) -> str:
    """One line of the table."""
    next_s = sorted(loss.next_step_s for loss in losses)
    new_s = statistics.median(loss.new_step_s for loss in losses)
    redone = [loss.steps_redone for loss in losses]
    span = f"{statistics.median(redone):g} ({min(redone)}-{max(redone)})"
    return f"{row.name:24}{statistics.median(next_s):>10.2f}{next_s[0]:>9.2f}{next_s[-1]:>9.2f}{new_s:>12.2f}{span:>16}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dim", type=int, default=256, help="width of the model: the state grows with its square")
    parser.add_argument("--rows", nargs="*", default=[row.name for row in ROWS], choices=[row.name for row in ROWS])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/bench-recovery-trainer.json"))
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of all that ends what was started
    machine = f"{os.cpu_count()} cores, torch {torch.__version__}, Python {platform.python_version()}"
    print(f"{machine}; {args.repeats} times each, a checkpoint every {EVERY} steps")
    print(f"{'state':24}{'next step s':>11}{'min':>8}{'max':>9}{'new step s':>12}{'steps redone':>16}", flush=True)
    chance = random.Random(args.seed)
    got: dict[str, list[Loss]] = {name: [] for name in args.rows}
    with tempfile.TemporaryDirectory() as folder, juicefs_gateway(Path(folder)) as server:
        rows = [row for row in ROWS if row.name in args.rows]
        for _ in range(args.repeats):
            for row in rows:
                got[row.name].append(lose_a_node(row, args.dim, server, chance))
        for row in rows:
            print(told(row, got[row.name]), flush=True)
    results = {name: [dataclasses.asdict(loss) for loss in losses] for name, losses in got.items()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"machine": machine, "every": EVERY, "dim": args.dim, "results": results}, indent=1))


if __name__ == "__main__":
    main()
