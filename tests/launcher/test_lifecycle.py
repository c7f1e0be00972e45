"""What runs for a while begins with `start` and ends with `close`; making it starts nothing."""

from __future__ import annotations

import ast
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.coordination.vitals_publisher import VitalsPublisher
from launcher.drain.deadline import DrainDeadline
from launcher.drain.draining import DrainRequests
from launcher.drain.preemption import FileWatcher, NoticeWatch
from launcher.health.liveness import LivenessListener, is_refused
from launcher.health.peers import PeerWatch
from launcher.kv.embedded.server import EmbeddedServer
from launcher.kv.memory import MemoryKV
from launcher.lifecycle import Lifecycle
from launcher.workers.console import Console
from launcher.workers.leftovers import Leftovers
from launcher.workers.warm import WarmStart

LAUNCHER = Path(__file__).parent.parent.parent / "launcher"
STARTS = {"start", "Popen", "fork", "create_server", "pipe"}


def started_in_init(source: str) -> list[str]:
    """The calls by which an `__init__` begins something that would have to be ended."""
    return [
        f"{owner.name}: {ast.unparse(node.func)}"
        for owner in ast.walk(ast.parse(source))
        if isinstance(owner, ast.ClassDef)
        for method in owner.body
        if isinstance(method, ast.FunctionDef) and method.name == "__init__"
        for node in ast.walk(method)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in STARTS
    ]


def test_nothing_is_started_in_init() -> None:
    files = {str(path.relative_to(LAUNCHER)): path.read_text() for path in LAUNCHER.rglob("*.py")}
    found = {name: calls for name, source in files.items() if (calls := started_in_init(source))}
    found.pop("workers/zygote.py", None)  # its server is the process itself
    assert not found


def test_a_thread_that_an_init_starts_is_found() -> None:
    source = "class A:\n    def __init__(self):\n        self.t = Thread(target=f)\n        self.t.start()\n"
    assert started_in_init(source) == ["A: self.t.start"]


def nothing(*_: object, **__: object) -> None: ...


MADE: dict[str, Callable[[Path], Lifecycle]] = {
    "console": lambda folder: Console(),
    "deadline": lambda folder: DrainDeadline(DrainRequests(grace_s=30, stop_s=1), nothing, nothing),
    "leftovers": lambda folder: Leftovers(folder, None, keep=False),
    "listener": lambda folder: LivenessListener("127.0.0.1"),
    "notices": lambda folder: NoticeWatch({"f": FileWatcher(str(folder / "none"))}, nothing, nothing),
    "peers": lambda folder: PeerWatch(nothing, nothing),
    "store's server": lambda folder: EmbeddedServer("127.0.0.1", 0, token="t"),
    "vitals": lambda folder: VitalsPublisher(MemoryKV(), "job", "a", lambda: None),
    "warm start": lambda folder: WarmStart(folder, nothing),
}


@pytest.mark.parametrize("name", MADE)
def test_what_was_made_may_be_closed_unstarted_and_twice(name: str, tmp_path: Path) -> None:
    before = set(threading.enumerate())
    made = MADE[name](tmp_path)
    assert not set(threading.enumerate()) - before
    made.close()
    made.close()


@pytest.mark.parametrize("name", ["deadline", "leftovers", "listener", "notices", "peers", "store's server", "vitals"])
def test_a_context_manager_starts_and_closes(name: str, tmp_path: Path) -> None:
    before = set(threading.enumerate())
    with MADE[name](tmp_path) as made:
        pass
    made.close()
    left = {thread.name for thread in set(threading.enumerate()) - before}
    assert not left & {"liveness", "peers", "member-vitals"}, "these are waited for"


def test_a_listener_listens_while_it_is_open() -> None:
    listener = LivenessListener("127.0.0.1")
    with pytest.raises(AssertionError, match="not started"):
        _ = listener.port
    with listener:
        assert not is_refused("127.0.0.1", listener.port)
    assert is_refused("127.0.0.1", listener.port)
