"""A job of two nodes on this machine that loses one of them again and again, and takes it back each time.

Its processes end with this one, however it ends.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from elastic_moe.demo.phases import phases
from elastic_moe.demo.processes import Process, Processes
from elastic_moe.demo.records import Record, Tail, merge

T = TypeVar("T")

START_S = 180.0
DEADLINE_S = 120.0
"""As long as no step is done."""
_POLL_S = 0.02
NODES = ("node-1", "node-2")


@dataclass(frozen=True)
class NodeLoss:
    """What one lost node cost: seconds to the next step, and to one that was not done before; steps done again.

    `captured`: after which step which ranks' states were kept, as the survivor tells it.
    """

    step: int
    next_step_s: float
    new_step_s: float
    steps_redone: int
    phases_s: Mapping[str, float]
    captured: Mapping[str, int]


class JobEnded(Exception):
    """The job has ended, or does not go on; with the end of its logs."""


class LossyJob:
    """The job that `job.toml` in the folder describes, whose metrics go to `metrics.jsonl` beside it.

    Args:
        options: of `elastic-moe run`, for each node; its name and its logs are added.
        environment: variables for the nodes.
    """

    def __init__(
        self, folder: Path, processes: Processes, options: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> None:
        self._folder = folder
        self._processes = processes
        self._options = options
        self._environment = environment or {}
        self._metrics_tail = Tail(folder / "metrics.jsonl")
        self._event_tails = {name: Tail(folder / name / "events.jsonl") for name in NODES}
        self.metrics: list[Record] = []
        self.events: list[Record] = []

    def start(self, name: str) -> None:
        """Start a node, for the first time or again."""
        folder, job = self._folder / name, str(self._folder / "job.toml")
        command = ["-m", "elastic_moe", "run", *self._options, "--node-name", name, "--log-dir", str(folder)]
        command += ["--mesh", job, "-m", "elastic_moe", "train", job]
        self._processes.start(name, command, log_path=folder / "agent.log", environment=self._environment)

    def start_both(self) -> None:
        """Start both, and wait until they train together."""
        self.start(NODES[0])
        self.until("node 1 to join", lambda: self.told("node_joined"), START_S)
        self.start(NODES[1])
        self.until("a step of both", lambda: self.metrics, START_S)

    def lose(self, victim: str, chance: random.Random, *, freezes: bool = False) -> NodeLoss:
        """Kill, or freeze, a node at a random moment of a step, and wait until the other has done a new one."""
        self.hear()
        before = self.metrics[-1]
        time.sleep(before["step_s"] * chance.random())
        lost_ts = time.time()
        process = self._processes.all[victim]
        process.freeze() if freezes else process.kill()
        after = self.until("a step of the survivor", lambda: self._since(before))
        last = max(line["step"] for line in self.metrics if line["generation"] == before["generation"])
        new = self.until("a new step", lambda: [line for line in self._since(before) if line["step"] > last])
        self.hear()
        captured = [event["steps"] for event in self.told("live_state_captured") if event["ts"] >= lost_ts]
        return NodeLoss(
            step=last,
            next_step_s=after[0]["ts"] - lost_ts,
            new_step_s=new[0]["ts"] - lost_ts,
            steps_redone=last + 1 - after[0]["step"],
            phases_s=phases(self.events, lost_ts, after[0]["ts"]),
            captured=captured[0] if captured else {},
        )

    def take_back(self, victim: str) -> None:
        """Start the lost node again, and wait until all train together."""
        whole = self.metrics[0]["world_size"]
        self._processes.all[victim].kill()  # one that was frozen ends here
        self.start(victim)
        since = self.metrics[-1]
        self.until("a step of both", lambda: [m for m in self._since(since) if m["world_size"] == whole])

    def train(self, num_steps: int) -> None:
        """Let it train for so many steps."""
        step = self.metrics[-1]["step"] + num_steps
        self.until(f"step {step}", lambda: self.metrics[-1]["step"] >= step)

    def told(self, event: str) -> list[Record]:
        """The events of that name so far."""
        return [each for each in self.events if each["event"] == event]

    def hear(self) -> bool:
        """Read what the nodes have written; whether a step was done."""
        self.events = merge(self.events, *(tail.read() for tail in self._event_tails.values()))
        new = self._metrics_tail.read()
        self.metrics += new
        return bool(new)

    def until(self, what: str, condition: Callable[[], T], within_s: float = DEADLINE_S) -> T:
        """Wait for a condition; steps that are done meanwhile move the deadline. Raises JobEnded."""
        deadline_s = time.monotonic() + within_s
        while True:
            running = [process for process in self._processes.all.values() if not process.killed]
            ended = [process for process in running if process.poll() is not None]
            if self.hear():
                deadline_s = max(deadline_s, time.monotonic() + DEADLINE_S)
            if found := condition():
                return found
            if ended or time.monotonic() > deadline_s:
                raise JobEnded(f"waited for {what}\n" + "\n".join(map(_last_words, running)))
            time.sleep(_POLL_S)

    def _since(self, before: Record) -> list[Record]:
        return [line for line in self.metrics if line["generation"] > before["generation"]]


def _last_words(process: Process) -> str:
    return "\n".join((f"--- {process.name} (exit code {process.poll()})", *process.tail(25)))
