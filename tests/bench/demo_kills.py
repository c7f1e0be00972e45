"""The demo's job loses a node at many random moments: steps done again, time to the next step, losses to the last bit.

    python -m tests.bench.demo_kills [--kills 20] [--freeze] [--seed 0] [--victims node-1 node-2]

One job, a node of which is lost as in the demo, and taken back each time; then the same job is trained unbroken, as far
as that came, and every loss compared. It prints a line for each kill, and what the bars say.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from elastic_moe.demo.job import job_toml
from elastic_moe.demo.processes import Processes
from elastic_moe.demo.records import Record, Tail, last_by_step
from tests.bench.lossy_job import DEADLINE_S, NODES, START_S, JobEnded, LossyJob, NodeLoss

_STEPS = 100_000  # it is ended before
_STEPS_BETWEEN = (2, 8)
_START_DEADLINE_S = 90.0


@dataclass(frozen=True)
class Plan:
    """What is to be played. `victims`: of which nodes one is lost each time."""

    num_kills: int
    seed: int = 0
    freezes: bool = False
    victims: tuple[str, ...] = ("node-2",)


@dataclass
class Outcome:
    """What all kills have cost, and the steps whose loss differs from the unbroken run's in any bit."""

    losses: list[NodeLoss] = field(default_factory=list)
    num_steps: int = 0
    different: list[int] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)

    def told(self) -> str:
        """The whole in a few lines."""
        seconds = sorted(loss.next_step_s for loss in self.losses)
        redone = Counter(loss.steps_redone for loss in self.losses)
        medians = {
            name: statistics.median(loss.phases_s.get(name, 0.0) for loss in self.losses)
            for name in dict.fromkeys(name for loss in self.losses for name in loss.phases_s)
        }
        return "\n".join(
            (
                f"{len(self.losses)} times; steps done again: "
                + ", ".join(f"{steps} in {num}" for steps, num in sorted(redone.items())),
                f"lost to next step: median {statistics.median(seconds):.2f} s, {seconds[0]:.2f} to {seconds[-1]:.2f}",
                "medians of its phases: " + ", ".join(f"{name} {each:.3f}" for name, each in medians.items()),
                f"{self.num_steps} steps, {len(self.missing)} without a loss, {len(self.different)} with another loss"
                " than the unbroken run's",
            )
        )


def play(plan: Plan, folder: Path, say: Callable[[str], object] = print) -> Outcome:
    """Lose nodes, and compare. Raises JobEnded."""
    chance, outcome = random.Random(plan.seed), Outcome()
    checkpoints = folder / "checkpoints"
    text = job_toml(
        steps=_STEPS, seed=plan.seed, metrics=folder / "metrics.jsonl", checkpoints=checkpoints, sharded=False
    )
    (folder / "job.toml").write_text(text)
    options = ["--nnodes", "1:2", "--nproc-per-node", "2", "--rdzv-backend", "bucket"]
    options += ["--rdzv-endpoint", str(folder / "meet"), "--rdzv-id", "demo"]
    options += ["--rdzv-conf", f"last_call={_START_DEADLINE_S:g},strikes=1000"]  # or a node lost thrice is kept out
    with Processes() as processes:
        job = LossyJob(folder, processes, options)
        job.start_both()
        for number in range(1, plan.num_kills + 1):
            job.train(chance.randint(*_STEPS_BETWEEN))
            victim = chance.choice(plan.victims)
            loss = job.lose(victim, chance, freezes=plan.freezes)
            outcome.losses.append(loss)
            say(f"{number:3} {victim} in step {loss.step + 1}: {_told(loss)}")
            if number < plan.num_kills:
                job.take_back(victim)
        job.train(1)
        metrics = job.metrics
        for process in processes.all.values():
            process.kill()
    unbroken = _unbroken(folder, metrics[-1]["step"])
    _compare(outcome, metrics, unbroken)
    return outcome


def _told(loss: NodeLoss) -> str:
    spent = ", ".join(f"{name} {seconds:.2f}" for name, seconds in loss.phases_s.items())
    kept = ", ".join(f"rank {rank} after {step}" for rank, step in sorted(loss.captured.items()))
    return f"{loss.steps_redone} done again, next step {loss.next_step_s:.2f} s ({spent}); kept: {kept or 'nothing'}"


def _unbroken(folder: Path, last: int) -> dict[int, Record]:
    """The same job on one node, up to that step. In exact mode the number of ranks changes no bit."""
    path, job = folder / "unbroken", str(folder / "job.toml")
    tail, found = Tail(path / "metrics.jsonl"), list[Record]()
    arguments = ["-m", "elastic_moe", "run", "--nnodes", "1", "--nproc-per-node", "2", "--no-checkpoint-service"]
    arguments += ["--rdzv-backend", "bucket", "--rdzv-endpoint", str(path / "meet"), "--rdzv-id", "unbroken"]
    arguments += ["--mesh", job, "-m", "elastic_moe", "train", job]
    for name, place in {"train.metrics": tail.path, "checkpoint.url": path / "checkpoints"}.items():
        arguments += ["--set", f"{name}={json.dumps(str(place))}"]
    arguments += ["--set", f"checkpoint.every={_STEPS}"]
    with Processes() as processes:
        process = processes.start("unbroken", arguments, log_path=path / "train.log")
        deadline_s = time.monotonic() + START_S
        while not found or found[-1]["step"] < last:
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise JobEnded("\n".join(("the unbroken run has ended, or does not go on", *process.tail(25))))
            time.sleep(0.1)
            if new := tail.read():
                found += new
                deadline_s = time.monotonic() + DEADLINE_S
        process.kill()
    return last_by_step(found)


def _compare(outcome: Outcome, metrics: list[Record], unbroken: dict[int, Record]) -> None:
    """Every line counts, also of a step that was done again."""
    outcome.num_steps = metrics[-1]["step"]
    outcome.missing = sorted(set(range(1, outcome.num_steps + 1)) - {line["step"] for line in metrics})
    outcome.different = sorted({line["step"] for line in metrics if line["loss"] != unbroken[line["step"]]["loss"]})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--freeze", action="store_true", help="stop the node (SIGSTOP) instead of killing it")
    parser.add_argument("--victims", nargs="+", choices=NODES, default=["node-2"])
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of all that ends what was started
    plan = Plan(args.kills, args.seed, args.freeze, tuple(args.victims))
    with tempfile.TemporaryDirectory() as folder:
        outcome = play(plan, Path(folder), lambda line: print(line, flush=True))
    print(outcome.told())
    return 1 if outcome.different or outcome.missing or max(loss.steps_redone for loss in outcome.losses) > 1 else 0


if __name__ == "__main__":
    sys.exit(main())
