"""What the service does behind a training steps back; what somebody waits for does not."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from storage import Checkpointer, priority
from storage.agent import AgentEnvironment
from storage.arena.arena import Arena
from storage.arena.stager import Stager
from storage.held import node_memory
from storage.service import address, lanes, sidecar
from storage.service.memory import HeldStates
from tests.cluster import until
from tests.storage.service_cases import in_thread, process
from tests.storage.small_runs import state


@pytest.fixture
def niceness() -> Iterator[int]:
    """What threads of the background step back to."""
    niceness = min(19, os.getpriority(os.PRIO_PROCESS, 0) + 3)
    priority.let_background_step_back(niceness)
    yield niceness
    priority._Background.niceness = None


def own_niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def in_a_thread(*calls: Callable[[], object]) -> list[object]:
    """What the calls return, one after the other in a thread of their own."""
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.extend(call() for call in calls))
    thread.start()
    thread.join()
    return found


def is_alone_with_what_it_starts(look: Callable[[], object], call: Callable[[], object], after: object) -> bool:
    """Whether `call` makes of its thread, and of one that it starts, and of no other, what is to be seen `after`."""
    before = look()
    seen = in_a_thread(look, call, look, lambda: in_a_thread(look))
    return seen == [before, None, after, [after]] and look() == before


def test_a_thread_steps_back_alone_and_with_what_it_starts(niceness: int) -> None:
    assert is_alone_with_what_it_starts(own_niceness, priority.step_back, niceness)


def test_who_waits_for_a_turn_does_so_alone_and_with_what_it_starts() -> None:
    def policy() -> int:
        return os.sched_getscheduler(0)

    assert policy() != os.SCHED_BATCH
    assert is_alone_with_what_it_starts(policy, priority.wait_for_turn, os.SCHED_BATCH)
    with contextlib.closing(Arena()) as arena, contextlib.closing(Stager(arena)) as stager:
        assert stager._pool.submit(policy).result() == os.SCHED_BATCH, "who copies behind a training"


def test_nobody_steps_back_unasked() -> None:
    assert in_a_thread(priority.step_back, own_niceness) == [None, own_niceness()]


def test_who_stores_and_copies_steps_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stepped: set[str] = set()
    for module in (lanes, node_memory):
        monkeypatch.setattr(module, "step_back", lambda: stepped.add(threading.current_thread().name.partition("-")[0]))
    path = tmp_path / "node" / "service.sock"
    for name, text in {"service": str(path), "node": "a"}.items():
        monkeypatch.setenv(AgentEnvironment.variable(name), text)
    with in_thread(path, held=HeldStates()), Checkpointer(tmp_path / "run") as ckpt:
        ckpt.save(1, state(1), wait=True)
    assert stepped == {"lane", "hold", "storage"}, "lanes, what they hold, and storage-copies"


def test_a_service_itself_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its main thread, and those that answer callers: a capture is waited for by the whole job."""
    path, before = tmp_path / "node" / "service.sock", own_niceness()
    niceness = str(min(19, before + 3))
    for name, text in {"service": str(path), "node": "a"}.items():
        monkeypatch.setenv(AgentEnvironment.variable(name), text)
    with process(path, "--nice", niceness) as service, Checkpointer(tmp_path / "run") as ckpt:
        ckpt.save(1, state(1), wait=True)
        tasks = Path(f"/proc/{service.pid()}/task")
        # a thread begins as the one that has started it; the copies' is there as long as the service
        until("the copies' thread to step back", lambda: int(niceness) in _niceness_of(tasks).values())
        found = _niceness_of(tasks)
        assert found.pop(service.pid()) == before
        assert set(found.values()) == {before, int(niceness)}


def _niceness_of(tasks: Path) -> dict[int, int]:
    found = {}
    for task in tasks.iterdir():
        with contextlib.suppress(OSError):  # it has ended
            found[int(task.name)] = int((task / "stat").read_text().rpartition(")")[2].split()[16])
    return found


def test_what_a_capture_needs_is_imported_before_it_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By an agent whose workers use the service, once they have settled; by no other."""
    imported: list[str] = []
    monkeypatch.setattr(sidecar, "importlib", SimpleNamespace(import_module=imported.append))
    monkeypatch.setattr(sidecar, "_SETTLED_S", 0.01)
    monkeypatch.setattr(sidecar, "_LOOK_S", 0.01)
    service = sidecar.CheckpointService()
    service._path = tmp_path / "service.sock"
    preparing = threading.Thread(target=service._prepare)
    preparing.start()
    address.used(service._path).touch()
    preparing.join()
    assert imported == ["storage.service.capture_request"]
    address.used(service._path).unlink()
    service.close()
    service._prepare()
    assert len(imported) == 1


def test_a_process_that_is_forked_while_cycles_are_not_looked_for_looks_for_them() -> None:
    with priority.without_collections():
        assert not gc.isenabled()
        if (child := os.fork()) == 0:
            os._exit(not gc.isenabled())
    assert os.waitpid(child, 0)[1] == 0
    assert gc.isenabled()
