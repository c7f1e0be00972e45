"""The shared memory between an agent and a worker, and the worker's side of the contract."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.environment import Environment
from launcher.script.worker import Worker
from launcher.workers.channel import Channel, StopReason, WorkerPhase, started_ticks
from launcher.workers.process_tree import look_up
from storage.service.processes import is_alive
from tests.cluster import until

WORKER = """
import sys, time
from elastic_moe import worker
worker.heartbeat(7)
print(worker.context(), flush=True)
while not (reason := worker.should_stop()):
    time.sleep(0.01)
worker.event("stopping", why=reason)
worker.yielded(8)
assert "torch" not in sys.modules, "a single worker needs no collective, and must not wait for torch"
"""


FIRST_THREAD_ENDS = """
import ctypes, platform, threading
threading.Thread(target=input).start()
number = {"x86_64": 60, "aarch64": 93}[platform.machine()]  # exit(2), of one thread
ctypes.CDLL(None).syscall(number, 0)
"""


def test_a_process_whose_first_thread_has_ended_is_there_until_the_others_have() -> None:
    """So it is when a worker is killed: the last of its threads frees its memory, and closes its files and devices."""
    with subprocess.Popen([sys.executable, "-c", FIRST_THREAD_ENDS], stdin=subprocess.PIPE) as process:
        try:
            state = Path(f"/proc/{process.pid}/stat")
            until("the first thread has ended", lambda: state.read_text().rpartition(")")[2].split()[0] == "Z")
            assert started_ticks(process.pid)
            assert look_up(process.pid)
            assert is_alive(process.pid)
        finally:
            process.kill()
        until("all have", lambda: started_ticks(process.pid) is None)
        assert look_up(process.pid) is None
        assert not is_alive(process.pid)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "channel"


def test_a_fresh_channel_says_that_nothing_happened(path: Path) -> None:
    channel = Channel.create(path)
    assert channel.progress().phase is WorkerPhase.STARTING
    assert channel.progress().step == -1
    assert channel.progress().beat_s == 0
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    channel.close()


def test_both_sides_see_each_other(path: Path) -> None:
    agent = Channel.create(path)
    worker = Channel.attach(path)
    assert agent.progress().phase is WorkerPhase.ATTACHED
    before_s = time.monotonic()
    worker.beat(41)
    assert agent.progress().step == 41
    assert before_s <= agent.progress().beat_s <= time.monotonic()
    assert worker.stop_request() is StopReason.NONE
    agent.request_stop(StopReason.DRAIN)
    assert worker.stop_request() is StopReason.DRAIN
    worker.yielded()
    assert agent.progress().phase is WorkerPhase.YIELDED
    agent.close()
    worker.close()


def test_a_new_generation_forgets_the_old_one(path: Path) -> None:
    old = Channel.create(path)
    Channel.attach(path).beat(3)
    new = Channel.create(path)
    assert new.progress().step == -1
    assert old.progress().step == 3, "a straggling worker of the old generation writes to the old file"


@pytest.mark.parametrize("content", [b"", b"x" * 64, b"x" * 10])
def test_another_file_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a worker channel"):
        Channel.attach(path)


def test_a_worker_process_keeps_the_contract(path: Path, tmp_path: Path) -> None:
    agent = Channel.create(path)
    environment = {
        **os.environ,
        "ELASTIC_MOE_CHANNEL": str(path),
        "ELASTIC_MOE_EVENTS": str(tmp_path / "events.jsonl"),
        "ELASTIC_MOE_GENERATION": "3",
        "ELASTIC_MOE_NODE": "n",
        "ELASTIC_MOE_MESH": '{"replicate":1,"shard":2,"expert":2,"idle":0,"micro_batch":1,"rounds":1}',
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    with subprocess.Popen([sys.executable, "-c", WORKER], env=environment, stdout=subprocess.PIPE, text=True) as worker:
        try:
            assert worker.stdout is not None
            assert "generation=3" in (context := worker.stdout.readline())
            assert "MeshPlan(replicate=1, shard=2, expert=2" in context
            assert agent.progress().step == 7
            agent.request_stop(StopReason.MEMBERSHIP)
            assert worker.wait(60) == 0
        finally:
            worker.kill()
    assert agent.progress().phase is WorkerPhase.YIELDED
    assert agent.progress().step == 8
    first, event = map(json.loads, (tmp_path / "events.jsonl").read_text().splitlines())
    assert (first["event"], first["step"], first["node"]) == ("first_step", 7, "n")
    assert (event["event"], event["why"], event["generation"]) == ("stopping", "membership", 3)


def test_without_an_agent_every_call_is_a_no_op() -> None:
    script = (
        "from elastic_moe import worker\n"
        "worker.heartbeat(1); worker.yielded(1); worker.event('x')\n"
        "assert worker.should_stop() is None\n"
        "context = worker.context()\n"
        "assert (context.rank, context.world_size, context.generation, context.mesh) == (0, 1, 0, None)\n"
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("ELASTIC_MOE", "RANK", "WORLD"))}
    clean["PYTHONPATH"] = os.pathsep.join(sys.path)
    subprocess.run([sys.executable, "-c", script], env=clean, check=True)


def test_a_worker_that_is_at_work_says_so_and_completes_no_step(tmp_path: Path) -> None:
    channel = Channel.create(tmp_path / "c")
    worker = Worker(Environment(channel=channel.path).to_env())
    worker.context(set_device=False)
    before = channel.progress()
    worker.alive()
    after = channel.progress()
    assert after != before
    assert (after.phase, after.step, after.beat_s, after.untimed) == (WorkerPhase.ATTACHED, -1, 0.0, False)
    channel.close()


def test_what_may_take_long_may_lie_within_another_such(tmp_path: Path) -> None:
    channel = Channel.create(tmp_path / "c")
    worker = Worker(Environment(channel=channel.path).to_env())
    with worker.untimed():
        with worker.untimed():
            assert channel.progress().untimed
        assert channel.progress().untimed, "the outer one goes on"
    assert not channel.progress().untimed
    channel.close()
