"""`train(job)` as a whole: processes with torchrun's environment and an agent's channels, real checkpoints."""

from __future__ import annotations

import contextlib
import functools
import itertools
import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from elastic_moe.config import JobConfig
from elastic_moe.errors import NotFinite, UserError
from elastic_moe.trainer.schedule import learning_rate
from launcher.rounds.mesh import MeshPlan
from launcher.workers.channel import Channel, StopReason, WorkerPhase
from tests.cluster import free_port, read_lines, until
from tests.moe.cases import SMALL, fitted

_context = multiprocessing.get_context("forkserver")
DEADLINE_S = 120.0


def job(folder: Path, **train: Any) -> JobConfig:
    return JobConfig.model_validate(
        {
            "model": SMALL.model_copy(update={"vocab_size": 256}).model_dump(),
            "train": {
                "steps": 9,
                "global_batch": 6,
                "seq_len": 16,
                "exact": True,
                "metrics": str(folder / "metrics.jsonl"),
                **train,
            },
            "optim": {"warmup_steps": 1},
            "checkpoint": {"url": str(folder / "checkpoints"), "every": 4},
        }
    )


def unsaved(what: JobConfig, folder: Path) -> JobConfig:
    """The same job without checkpoints, its metrics in another folder."""
    return what.model_copy(
        update={
            "train": what.train.model_copy(update={"metrics": str(folder / "metrics.jsonl")}),
            "checkpoint": what.checkpoint.model_copy(update={"url": None}),
        }
    )


def as_it_is() -> None:
    """What most worker processes do before they train."""


def hold_at(step: int, path: Path) -> None:
    """Begin no step after this one before there is a file of that path."""
    from elastic_moe.trainer.step import Stepper

    original = Stepper.step

    def held(self: Stepper, done: int, finish: Any = None) -> Any:
        while done >= step and not path.exists():
            time.sleep(0.01)
        return original(self, done, finish)

    Stepper.step = held  # type: ignore[method-assign]


def run_rank(what: JobConfig, environ: dict[str, str], error_path: Path, prepare: Callable[[], None]) -> None:
    """One worker process, from a job to its exit code."""
    import torch

    from elastic_moe.trainer.run import train

    torch.set_num_threads(1 if not what.train.exact else 2)  # exact mode minds it by itself
    os.environ.update(environ)
    try:
        prepare()
        train(what)
        assert torch.get_num_threads() == 1
    except (UserError, NotFinite) as error:
        error_path.write_text(str(error))
        raise SystemExit(error.exit_code) from None


class World:
    """The workers of one generation, with the channels and the event file that an agent would give them."""

    def __init__(
        self,
        folder: Path,
        what: JobConfig,
        plan: MeshPlan,
        generation: int,
        world_size: int | None = None,
        prepare: Callable[[], None] = as_it_is,
    ) -> None:
        world_size = world_size or plan.world_size
        port = free_port()
        self.channels = []
        self.processes: list[BaseProcess] = []
        self.errors = [folder / f"error-{generation}-{rank}" for rank in range(world_size)]
        for rank in range(world_size):
            path = folder / f"channel-{generation}-{rank}"
            self.channels.append(Channel.create(path))
            environ = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "ELASTIC_MOE_GENERATION": str(generation),
                "ELASTIC_MOE_LINEAGE": "test",
                "ELASTIC_MOE_RUN_ID": "test",
                "ELASTIC_MOE_MESH": plan.to_json(),
                "ELASTIC_MOE_CHANNEL": str(path),
                "ELASTIC_MOE_EVENTS": str(folder / "events.jsonl"),
            }
            self.processes.append(_context.Process(target=run_rank, args=(what, environ, self.errors[rank], prepare)))

    def __enter__(self) -> World:
        for process in self.processes:
            process.start()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def reach(self, step: int) -> None:
        def is_there() -> bool:
            assert any(process.is_alive() for process in self.processes), "the workers ended"
            return min(channel.progress().step for channel in self.channels) >= step

        until(f"step {step}", is_there, DEADLINE_S)

    def exit_codes(self) -> list[int | None]:
        deadline_s = time.monotonic() + DEADLINE_S
        for process in self.processes:
            process.join(max(0.0, deadline_s - time.monotonic()))
        return [process.exitcode for process in self.processes]


def lines(path: Path) -> list[dict[str, Any]]:
    """Without one that a killed process has not written to its end."""
    return read_lines(path)


def take_away(folder: Path, aside: Path) -> None:
    """Have a file in its place, though others may make it anew in between; where it is then, by number."""
    aside.mkdir()
    for number in itertools.count():
        folder.rename(aside / f"{number}")
        with contextlib.suppress(IsADirectoryError):
            folder.write_text("no folder")
            return


def test_a_stop_waits_until_the_state_is_safe(tmp_path: Path) -> None:
    what = job(tmp_path, steps=4000)
    staging = tmp_path / "checkpoints" / ".tmp"  # where the local store writes an object before it has its name
    with World(tmp_path, what, fitted(what, expert=2), generation=1) as world:
        world.reach(2)
        until("something was written", staging.exists)
        take_away(staging, tmp_path / "aside")
        asked_at = world.channels[0].progress().step
        world.channels[0].request_stop(StopReason.DRAIN)
        world.reach(asked_at + 4)
        assert all(channel.progress().phase is WorkerPhase.RUNNING for channel in world.channels)
        staging.unlink()
        assert world.exit_codes() == [0, 0]
        assert {channel.progress().phase for channel in world.channels} == {WorkerPhase.YIELDED}
        stopped_at = world.channels[0].progress().step
    events = lines(tmp_path / "events.jsonl")
    assert [e["reason"] for e in events if e["event"] == "stop_postponed"]
    assert max(e["step"] for e in events if e["event"] == "checkpoint_committed") == stopped_at


def test_a_job_whose_last_state_is_not_saved_is_not_done(tmp_path: Path) -> None:
    what, go_on = job(tmp_path, steps=9), tmp_path / "go on"
    held = functools.partial(hold_at, 5, go_on)
    with World(tmp_path, what, fitted(what, expert=2), generation=1, prepare=held) as world:
        world.reach(5)
        # The step of the end is taken: nothing can be committed there.
        (tmp_path / "checkpoints" / "step-000000009").write_text("no folder")
        go_on.touch()
        assert world.exit_codes() == [1, 1]
    failed = [e for e in lines(tmp_path / "events.jsonl") if e["event"] == "checkpoint_failed"]
    assert {e["step"] for e in failed} == {9}


def test_a_run_through_a_stop_and_a_kill_equals_an_unbroken_one(tmp_path: Path) -> None:
    """Stopped at a boundary: no step again. Killed: only steps since the last checkpoint again. Same curve."""
    broken, unbroken = tmp_path / "broken", tmp_path / "unbroken"
    broken.mkdir()
    unbroken.mkdir()
    what = job(broken, steps=4000)  # more than it comes to
    what = what.model_copy(update={"model": what.model.model_copy(update={"balance": "quantile", "num_experts": 5})})
    with World(broken, what, fitted(what, expert=2), generation=1) as first:
        first.reach(2)
        first.channels[1].request_stop(StopReason.MEMBERSHIP)
        assert first.exit_codes() == [0, 0]
        assert {channel.progress().phase for channel in first.channels} == {WorkerPhase.YIELDED}
    stopped_at = first.channels[0].progress().step
    assert stopped_at >= 2
    assert [line["step"] for line in lines(broken / "metrics.jsonl")] == list(range(1, stopped_at + 1))

    with World(broken, what, fitted(what, replicate=2), generation=2) as second:
        second.reach(stopped_at + 6)
    before = lines(broken / "metrics.jsonl")
    assert [line["step"] for line in before] == list(range(1, before[-1]["step"] + 1))

    last_step = before[-1]["step"] + 3
    # The length of the run decides the learning rate: the same job, asked to stop instead of ending.
    with World(broken, what, fitted(what), generation=3) as third:
        third.reach(last_step)
        third.channels[0].request_stop(StopReason.DRAIN)
        assert third.exit_codes() == [0]
    again = lines(broken / "metrics.jsonl")[len(before) :]
    num_replayed = before[-1]["step"] + 1 - again[0]["step"]
    # Where the store is slow two saves may be under way, and the third one be waiting.
    assert 0 <= num_replayed <= 3 * what.checkpoint.every
    assert {line["generation"] for line in again} == {3}

    alone = unsaved(what, unbroken)
    with World(unbroken, alone, fitted(alone), generation=1) as whole:
        whole.reach(last_step)
    expected = {line["step"]: line["loss"] for line in lines(unbroken / "metrics.jsonl")}
    assert set(range(1, last_step)) <= expected.keys()
    for line in lines(broken / "metrics.jsonl"):
        if line["step"] in expected:
            assert line["loss"] == pytest.approx(expected[line["step"]], rel=1e-14), line
    events = lines(broken / "events.jsonl")
    first_steps = [(e["generation"], e["step"]) for e in events if e["event"] == "first_step"]
    assert first_steps == [(1, 1), (2, stopped_at + 1), (3, again[0]["step"])]
    restored = {(e["generation"], e["step"]) for e in events if e["event"] == "restored"}
    assert restored == {(2, stopped_at), (3, again[0]["step"] - 1)}


def draw_nothing() -> None:
    """Whoever restores has no use for initial weights: to draw them takes minutes for a large model."""
    import elastic_moe.trainer.run

    def refuse(*args: object) -> None:
        raise AssertionError("initial weights were drawn before a restore")

    elastic_moe.trainer.run.init_weights = refuse  # type: ignore[attr-defined]


def test_a_run_ends_and_a_longer_one_goes_on(tmp_path: Path) -> None:
    """From its checkpoint alone, and at the least learning rate, where its schedule had ended."""
    for generation, (steps, prepare) in enumerate(((3, as_it_is), (5, draw_nothing)), start=1):
        what = job(tmp_path, steps=steps)
        validates = what.train.model_copy(update={"validate_every": 2, "validation_sequences": 2})
        held_out = what.data.model_copy(update={"validation": 0.01})
        what = what.model_copy(update={"train": validates, "data": held_out})
        with World(tmp_path, what, fitted(what), generation, prepare=prepare) as world:
            assert world.exit_codes() == [0]
            assert world.channels[0].progress().phase is WorkerPhase.RUNNING
    metrics = lines(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [1, 2, 3, 4, 5]
    assert [line["step"] for line in metrics if line["val_loss"] is not None] == [2, 3, 4, 5]
    horizon_3 = [learning_rate(step, 3, what.optim) for step in range(5)]
    assert [line["lr"] for line in metrics] == horizon_3
    assert horizon_3 != [learning_rate(step, 5, what.optim) for step in range(5)]
    anew = what.model_copy(
        update={
            "train": what.train.model_copy(update={"steps": 6}),
            "optim": what.optim.model_copy(update={"decay_steps": 40}),
        }
    )
    with World(tmp_path, anew, fitted(anew), generation=3) as world:
        assert world.exit_codes() == [0]
    assert lines(tmp_path / "metrics.jsonl")[-1]["lr"] == learning_rate(5, 40, anew.optim)


@pytest.mark.parametrize(
    ("change", "plan", "message"),
    [
        ({}, MeshPlan(1, 1, 4, 0, 1, 6), "needs 4 ranks and WORLD_SIZE is 2"),
        ({"exact": False, "global_batch": 60}, MeshPlan(1, 1, 2, 0, 1, 6), "train.global_batch is 60"),
    ],
)
def test_a_mistake_ends_every_rank_with_one_line(
    tmp_path: Path, change: dict[str, Any], plan: MeshPlan, message: str
) -> None:
    what = job(tmp_path, **change)
    with World(tmp_path, what, plan, generation=1, world_size=2) as world:
        assert world.exit_codes() == [2, 2]
    for path in world.errors:
        text = path.read_text()
        assert message in text
        assert "\n" not in text


def test_a_checkpoint_of_other_data_or_another_model_is_refused(tmp_path: Path) -> None:
    what = job(tmp_path, steps=2)
    with World(tmp_path, what, fitted(what), generation=1) as world:
        assert world.exit_codes() == [0]
    other = job(tmp_path, steps=4, seed=5)
    with World(tmp_path, other, fitted(other), generation=2) as world:
        assert world.exit_codes() == [2]
    assert "train.seed is 5 but the checkpoint was trained with 0" in world.errors[0].read_text()
    other = what.model_copy(update={"model": what.model.model_copy(update={"top_k": 1})})
    with World(tmp_path, other, fitted(other), generation=3) as world:
        assert world.exit_codes() == [2]
    assert "model.top_k is 1 but the checkpoint was trained with 2" in world.errors[0].read_text()
