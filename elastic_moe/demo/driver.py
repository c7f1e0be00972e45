"""Runs the demo: two nodes of real processes, one of them killed and brought back, and an unbroken run beside it.

Every wait is for a condition in what the nodes wrote, with a deadline, while their story is told.
"""

from __future__ import annotations

import enum
import json
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from elastic_moe.demo.console import Console
from elastic_moe.demo.job import MARK, job_toml, unbroken_sets
from elastic_moe.demo.plot import draw
from elastic_moe.demo.processes import Process, Processes
from elastic_moe.demo.records import Record, Tail, merge
from elastic_moe.demo.story import Story
from elastic_moe.demo.summary import Summary, summarize
from elastic_moe.errors import UserError
from launcher import EventName

SLOTS_PER_NODE = 2
# Node 2 is killed after this part of the steps, and starts again after a few steps without it: on a busy machine half
# of the rest may pass before it is taken in, because importing torch takes as long as many steps of so small a model.
KILL_AT = 0.2
STEPS_ALONE = 8

_RECORDS = (
    "meet",
    "checkpoints",
    "events.jsonl",
    "job.toml",
    "metrics.jsonl",
    "node-1",
    "node-2",
    "story.png",
    "summary.json",
    "unbroken",
)
_POLL_S = 0.05
_STEP_DEADLINE_S = 120.0
_START_DEADLINE_S = 90.0


class DemoFailed(Exception):
    """The demo could not go on; one line says at what point."""

    exit_code = 1


class Fault(enum.Enum):
    """What happens to node 2."""

    KILLED = "killed"
    FROZEN = "frozen"


@dataclass(frozen=True)
class Script:
    """What is to be played. `sharded`: one replica of the state, of which each node holds a half."""

    steps: int
    seed: int
    sharded: bool = False
    fault: Fault = Fault.KILLED


class Demo:
    """One demo, whose records go to the folder `out`; `run` it once."""

    def __init__(self, out: Path, script: Script, console: Console) -> None:
        self._out = out
        self._script = script
        self._steps = script.steps
        self._seed = script.seed
        self._console = console
        self._processes = Processes()
        self._story = Story(time.time())
        self._job = out / "job.toml"
        self._meet = out / "meet"
        self._tails = {name: Tail(out / name / "events.jsonl") for name in ("node-1", "node-2")}
        self._metrics_tail = Tail(out / "metrics.jsonl")
        self._events: list[Record] = []
        self._metrics: list[Record] = []
        self._whole_again = False  # node 2 is back: from here on processes may end

    def run(self) -> Summary:
        """Play the whole story and leave its records in the folder.

        Raises:
            UserError: The folder holds something else.
            DemoFailed: A node ended, or something took too long; the records so far are kept.
        """
        _prepare(self._out)
        checkpoints = self._out / "checkpoints"
        self._job.write_text(
            job_toml(
                steps=self._steps,
                seed=self._seed,
                metrics=self._metrics_tail.path,
                checkpoints=checkpoints,
                sharded=self._script.sharded,
            )
        )
        try:
            with self._processes:
                self._interrupted_run()
                unbroken = self._unbroken_run()
        except DemoFailed:
            for process in self._processes.all.values():
                self._console.tail(process.name, process.log_path, process.tail(25))
            raise
        finally:
            _write_records(self._out / "events.jsonl", self._events)
        summary = summarize(
            events=self._events, metrics=self._metrics, unbroken=unbroken, steps=self._steps, seed=self._seed
        )
        (self._out / "summary.json").write_text(summary.to_json())
        draw(
            self._out / "story.png",
            summary=summary,
            metrics=self._metrics,
            unbroken=unbroken,
            events=self._events,
        )
        return summary

    # --- the story's acts

    def _interrupted_run(self) -> None:
        with self._console.progress("two nodes", self._steps):
            self._start_node("node-1")
            self._wait(lambda: self._heard(EventName.NODE_JOINED, "node-1"), "node 1 to join", _START_DEADLINE_S)
            self._start_node("node-2")
            self._wait(lambda: bool(self._metrics), "the first step", _START_DEADLINE_S)
            self._wait_for_step(max(2, round(KILL_AT * self._steps)))
            self._lose_node("node-2")
            alone = self._wait_for_generation(self._generation() + 1, SLOTS_PER_NODE)
            self._wait_for_step(alone["step"] + STEPS_ALONE)
            self._processes.all["node-2"].kill()  # one that was frozen ends here
            self._start_node("node-2")
            self._wait_for_generation(alone["generation"] + 1, 2 * SLOTS_PER_NODE)
            self._whole_again = True
            nodes = [self._processes.all[name] for name in ("node-1", "node-2")]
            self._wait(lambda: all(node.poll() == 0 for node in nodes), "both nodes to finish", _STEP_DEADLINE_S)
            self._hear()

    def _unbroken_run(self) -> list[Record]:
        folder = self._out / "unbroken"
        tail = Tail(folder / "metrics.jsonl")
        metrics: list[Record] = []
        sets = unbroken_sets(metrics=tail.path, checkpoints=folder / "checkpoints")
        arguments = ["-m", "elastic_moe", "train", str(self._job)]
        for each in sets:
            arguments += ["--set", each]
        process = self._processes.start("unbroken", arguments, log_path=folder / "train.log")

        def hear() -> int:
            new = tail.read()
            metrics.extend(new)
            if new:
                self._console.step(new[-1])
            return len(new)

        self._console.say(self._story.stamped(time.time(), "the same job is trained again, unbroken, in one process"))
        with self._console.progress("unbroken", self._steps):
            self._wait(lambda: process.poll() == 0, "the unbroken run to finish", _STEP_DEADLINE_S, hear=hear)
            hear()
        return metrics

    # --- what the driver does

    def _start_node(self, name: str) -> None:
        self._tell("demo_node_started", name)
        folder = self._out / name
        run = ["run", "--nnodes", "1:2", "--nproc-per-node", str(SLOTS_PER_NODE), "--node-name", name]
        run += ["--rdzv-backend", "bucket", "--rdzv-endpoint", str(self._meet), "--rdzv-id", "demo"]
        # The first round waits for both nodes, however slowly the second one imports torch.
        run += ["--rdzv-conf", f"last_call={_START_DEADLINE_S:g}", "--log-dir", str(folder)]
        train = ["--mesh", str(self._job), "-m", "elastic_moe", "train", str(self._job)]
        self._processes.start(name, ["-m", "elastic_moe", *run, *train], log_path=folder / "agent.log")

    def _lose_node(self, name: str) -> None:
        """Kill or freeze a node's agent and workers at once, in the middle of a step."""
        last, process = self._metrics[-1], self._processes.all[name]
        time.sleep(last["step_s"] * random.Random(self._seed).random())
        lost_ts = time.time()
        if self._script.fault is Fault.KILLED:
            process.kill()
        else:
            process.freeze()
        fields = {"step": last["step"], "num_workers": SLOTS_PER_NODE, "fault": self._script.fault.value}
        self._tell("demo_node_killed", name, ts=lost_ts, **fields)

    def _tell(self, event: str, node: str, *, ts: float | None = None, **fields: int | str) -> None:
        """Record an event of the driver's own."""
        record: Record = {
            "ts": time.time() if ts is None else ts,
            "run_id": "demo",
            "node": node,
            "generation": self._generation(),
            "event": event,
            **fields,
        }
        self._events.append(record)
        self._console.say(*self._story.hear(record))

    # --- what the driver waits for

    def _hear(self) -> int:
        """Read what the nodes have written since the last look, tell it, and return how many steps were in it."""
        events = merge(*(tail.read() for tail in self._tails.values()))
        metrics = self._metrics_tail.read()
        self._events = merge(self._events, events)
        self._metrics += metrics
        for record in merge(events, metrics):
            self._console.say(*(self._story.hear(record) if "event" in record else self._story.hear_metrics(record)))
        if metrics:
            self._console.step(metrics[-1])
        return len(metrics)

    def _generation(self) -> int:
        return max((record["generation"] for record in self._metrics), default=0)

    def _heard(self, event: str, node: str) -> bool:
        return any(each["event"] == event and _is_of(each, node) for each in self._events)

    def _wait_for_step(self, step: int) -> None:
        self._wait(lambda: self._metrics[-1]["step"] >= step, f"step {step}", _STEP_DEADLINE_S)

    def _wait_for_generation(self, least: int, world_size: int) -> Record:
        """Wait until a generation of this size has completed a step, and return that step."""

        def first() -> Record | None:
            later = (each for each in self._metrics if each["generation"] >= least)
            return next((each for each in later if each["world_size"] == world_size), None)

        self._wait(lambda: first() is not None, f"a step of {world_size} ranks", _STEP_DEADLINE_S)
        found = first()
        assert found is not None, "just waited for"
        return found

    def _wait(
        self,
        condition: Callable[[], bool],
        what: str,
        deadline_in_s: float,
        *,
        hear: Callable[[], int] | None = None,
    ) -> None:
        """Hear until the condition holds; each step that is trained meanwhile moves the deadline: slow is not stuck."""
        hear = hear or self._hear
        deadline_s = time.monotonic() + deadline_in_s
        while True:
            ended = [process for process in self._processes.all.values() if process.poll() is not None]
            if hear():
                deadline_s = max(deadline_s, time.monotonic() + _STEP_DEADLINE_S)
            if condition():
                return
            for process in ended:
                self._check(process, what)
            if time.monotonic() > deadline_s:
                raise DemoFailed(f"waited too long for {what}")
            time.sleep(_POLL_S)

    def _check(self, process: Process, what: str) -> None:
        """Raise DemoFailed where a process has ended early: only those that were killed or are done may end."""
        code = process.poll()
        if code == 0 and not self._whole_again:
            raise DemoFailed(f"{process.name} ended while waiting for {what}: try more --steps")
        if code != 0 and not process.killed:
            raise DemoFailed(f"{process.name} ended with exit code {code} while waiting for {what}")


def _is_of(event: Record, name: str) -> bool:
    """Whether a node id is of that node: it is the name that the demo gave, and a suffix for each start."""
    return str(event["node"]).startswith(f"{name}-") or event["node"] == name


def _prepare(out: Path) -> None:
    """Make the folder, without the records of an earlier demo; anything else in it is refused."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: not a directory")
    if out.is_dir() and any(out.iterdir()):
        job = out / "job.toml"
        if not job.is_file() or not job.read_text(errors="replace").startswith(MARK):
            raise UserError(f"--out {out}: not empty, and not of an earlier demo; choose another directory")
        for name in _RECORDS:  # and nothing that somebody else put there
            _remove(out / name)
    out.mkdir(parents=True, exist_ok=True)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _write_records(path: Path, records: list[Record]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
