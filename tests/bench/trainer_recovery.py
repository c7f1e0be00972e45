"""The second half of `make bench-recovery`: the real trainer loses a node, from the kill to the next step, and what is
done again.

Two nodes of one worker each on this machine train a small model under `elastic-moe run`; one of them is killed at a
random moment between two checkpoints, and taken back, again and again. Rows: the model whole on each node (two
replicas), or in halves; with the checkpoint service, so that the state comes from the nodes' memory, or without, so
that it comes from an S3 server. Prints a table as it goes, and writes JSON beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import random
import signal
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from elastic_moe.demo.processes import Processes
from tests.bench.lossy_job import NODES, LossyJob, NodeLoss
from tests.s3 import S3Server, juicefs_gateway

EVERY = 10
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
    """One way to lose a node: of what the mesh has one (replicas, or shards), and where the state comes from then.

    `more` is of the section `[checkpoint]`, `options` are of `elastic-moe run`.
    """

    name: str
    one: str
    more: str = ""
    options: tuple[str, ...] = ()


ROWS = [
    Row("two replicas, memory", "shard"),
    Row("two replicas, S3", "shard", options=("--no-checkpoint-service",)),
    Row("halves, memory", "replicate", more="ram_every = 2"),
    Row("halves, S3", "replicate", options=("--no-checkpoint-service",)),
]


def lose_nodes(row: Row, dim: int, server: S3Server, chance: random.Random, repeats: int) -> list[NodeLoss]:
    """Kill nodes of one job, each a random number of steps after a checkpoint."""
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        metrics, url = json.dumps(str(folder / "metrics.jsonl")), json.dumps(server.url(f"bench-{folder.name}"))
        (folder / "job.toml").write_text(
            _JOB.format(dim=dim, metrics=metrics, url=url, every=EVERY, mesh=row.one, more=row.more)
        )
        options = ["--nnodes", "1:2", "--nproc-per-node", "1", "--rdzv-backend", "bucket"]
        options += ["--rdzv-endpoint", str(folder / "meet"), "--rdzv-id", folder.name]
        options += ["--rdzv-conf", "last_call=60,strikes=1000"]  # or a node that is lost thrice is kept out
        with Processes() as processes:
            job = LossyJob(folder, processes, [*options, *row.options], server.environment)
            job.start_both()
            losses = []
            while True:
                job.train(chance.randrange(EVERY + 1, 2 * EVERY))
                victim = chance.choice(NODES)
                losses.append(job.lose(victim, chance))
                if len(losses) == repeats:
                    break
                job.take_back(victim)
            for process in processes.all.values():
                process.kill()
        return losses


def told(row: Row, losses: Sequence[NodeLoss]) -> str:
    """One line of the table."""
    next_s = sorted(loss.next_step_s for loss in losses)
    new_s = statistics.median(loss.new_step_s for loss in losses)
    redone = [loss.steps_redone for loss in losses]
    span = f"{statistics.median(redone):g} ({min(redone)}-{max(redone)})"
    return f"{row.name:24}{statistics.median(next_s):>11.2f}{next_s[0]:>8.2f}{next_s[-1]:>9.2f}{new_s:>12.2f}{span:>16}"


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
    chance, got = random.Random(args.seed), dict[str, list[NodeLoss]]()
    with tempfile.TemporaryDirectory() as folder, juicefs_gateway(Path(folder)) as server:
        for row in ROWS:
            if row.name in args.rows:
                got[row.name] = lose_nodes(row, args.dim, server, chance, args.repeats)
                print(told(row, got[row.name]), flush=True)
    results = {name: [dataclasses.asdict(loss) for loss in losses] for name, losses in got.items()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"machine": machine, "every": EVERY, "dim": args.dim, "results": results}, indent=1))


if __name__ == "__main__":
    main()
