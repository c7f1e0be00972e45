"""What the process that forks workers imports ahead: what is known, and what a first worker has shown."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from elastic_moe.cli.run import _imported_by
from launcher.workers import imports_ahead
from launcher.workers.imports_ahead import num_threads_alive
from launcher.workers.learnt_imports import ImportLearner, ImportReporter, _digest, _line_of, _variable_in
from tests.cluster import until

SETS_A_DEFAULT = """
import os
folder = os.environ.setdefault("PROBE_FOLDER", "/default")
"""


@pytest.mark.parametrize(("value", "is_learnt"), [("/default", True), ("/of-the-script", False)])
def test_a_variable_that_the_import_itself_has_set_does_not_keep_it_from_being_learnt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], value: str, is_learnt: bool
) -> None:
    """As torch's compiler does with its folder; but what a script has set before, a fork would come too late for."""
    (tmp_path / "probe_of_defaults.py").write_text(SETS_A_DEFAULT)
    monkeypatch.syspath_prepend(tmp_path)
    learner = ImportLearner()
    ours, theirs = learner.open() or pytest.fail("it learns from the first worker")
    learner.begin(ours)
    with theirs:
        theirs.send(f"{_line_of('PROBE_FOLDER', value)}\nprobe_of_defaults\n".encode())
    learner.hear()
    learner.learn([])
    found: list[str] = []

    def has_ended() -> bool:
        found.extend(learner.reap())
        return learner._trial is None

    until("the trial's end", has_ended)
    assert found == (["probe_of_defaults"] if is_learnt else [])
    assert ("imports nothing more: that reads PROBE_FOLDER" in capfd.readouterr().err) == (not is_learnt)


def test_a_worker_tells_of_a_variable_without_its_value(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = ImportLearner().open() or pytest.fail("it learns from the first worker")
    with ours, theirs:
        monkeypatch.setenv("PROBE_SECRET", "hunter2 hunter2")
        ImportReporter(theirs, {n: v for n, v in os.environ.items() if n != "PROBE_SECRET"}).look()
        told = ours.recv(65536).decode()
    assert f"={b'PROBE_SECRET'.hex()} {_digest('hunter2 hunter2')}\n" in told
    assert "hunter2" not in told


@pytest.mark.parametrize("name", ["PROBE\nOF LINES", "PROBE \udcff", "PROBE 1 2\n"])
def test_a_variable_may_have_any_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a shell's exported functions are, or what a container was given by mistake."""
    learner = ImportLearner()
    ours, theirs = learner.open() or pytest.fail("it learns from the first worker")
    learner.begin(ours)
    with theirs, monkeypatch.context() as patch:
        patch.setattr(os, "environ", {**os.environ, name: "a\nvalue"})
        ImportReporter(theirs, {n: v for n, v in os.environ.items() if n != name}).look()
    learner.hear()
    assert learner._told.decode() == _line_of(name, "a\nvalue") + "\n"
    assert _variable_in(_line_of(name, "a\nvalue")) == (name, _digest("a\nvalue"))
    learner.learn([])
    assert learner.reap() == []


def test_a_thread_that_has_ended_keeps_nobody_from_forking(tmp_path: Path) -> None:
    """Whoever has waited for it finds it listed for a moment longer: it would be started cold for nothing."""
    for number, flags in {"7": 0x400040, "8": 0x400044, "9": None}.items():
        (tmp_path / number).mkdir()
        if flags is not None:  # else it has gone from the list since
            (tmp_path / number / "stat").write_text(f"{number} (a) S) S 1 7 7 0 -1 {flags} 90 0 0 0\n")
    assert num_threads_alive(str(tmp_path)) == 1
    ends = threading.Event()
    thread = threading.Thread(target=ends.wait)
    thread.start()
    assert num_threads_alive() > 1
    ends.set()
    thread.join()


@pytest.mark.parametrize("num_alive", [1, 2])
def test_nothing_is_forked_for_threads_where_there_are_none(num_alive: int, monkeypatch: pytest.MonkeyPatch) -> None:
    waited_for: list[int] = []
    monkeypatch.setattr(imports_ahead, "num_threads_alive", lambda: num_alive)
    monkeypatch.setattr(os, "fork", lambda: 7)
    monkeypatch.setattr(os, "waitpid", lambda pid, _: waited_for.append(pid))
    imports_ahead.settle_threads()
    assert waited_for == [7] * (num_alive - 1)


def test_what_our_own_trainer_imports_is_known_before() -> None:
    run = ["--nnodes", "1:2", "-m", "elastic_moe", "train", "job.toml"]
    assert "elastic_moe.trainer.run" in _imported_by(run)
    assert _imported_by(["--nnodes", "1:2", "-m", "elastic_moe", "ckpt", "train"]) == ()
    assert _imported_by(["script.py", "train"]) == ()


def test_what_a_script_that_saves_imports_is_known_by_its_text(tmp_path: Path) -> None:
    script, job = tmp_path / "train.py", tmp_path / "job.toml"
    script.write_text("import torch\n\ndef main():\n    from storage import Checkpointer\n")
    assert _imported_by(["--nnodes", "1:2", str(script)]) == ("storage.checkpointer",)
    assert _imported_by([str(script), "s3://bucket/run"]) == ("storage.checkpointer", "storage.stores.s3.ahead")
    script.write_text("from elastic_moe import worker\nurl = 's3://x'  # of the data\n")
    assert _imported_by([str(script)]) == ("elastic_moe.worker",)
    script.write_text("from elastic_moe.integrations.session import Session\n")
    assert _imported_by([str(script), "s3://bucket/run"]) == (
        "elastic_moe.worker",
        "elastic_moe.integrations.session",
        "storage.checkpointer",
        "storage.stores.s3.ahead",
    )
    for name in ("storage.py", "elastic_moe", "launcher"):
        (tmp_path / name).touch()
        assert _imported_by([str(script)]) == (), "it is another one"
        (tmp_path / name).unlink()
    script.write_text("import torch  # and no storage\nurl = 's3://x'\n")
    assert _imported_by([str(script)]) == ()
    job.write_text('[checkpoint]\nurl = "s3://bucket/run"\n')
    assert "storage.stores.s3.ahead" in _imported_by(["-m", "elastic_moe", "train", str(job)])


def test_it_is_imported_ahead() -> None:
    program = """
import socket
from launcher.workers.imports_ahead import Imports
from launcher.workers.zygote import _Server
listener, news = socket.socketpair(), socket.socketpair()
print(*_Server(listener[0], news[0], Imports(["json", "colorsys"]))._to_import)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    names = done.stdout.split()
    assert names[0] == "torch"
    assert names[-1] == "colorsys", "json is there already"


def test_what_has_half_imported_torch_is_not_forked() -> None:
    """torch registers what it imports: after an import that fails, as without a folder for its cache, all others do."""
    program = """
import socket
from launcher.workers.imports_ahead import Imports
from launcher.workers.zygote import _Server
listener, news = socket.socketpair(), socket.socketpair()
server = _Server(listener[0], news[0], imports := Imports())
imports.make("no_such_module")
print(server._imports.half_imported)
imports.make("torch.no_such_module")
print(server._differs(None))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == [
        "",
        "torch.no_such_module could not be imported ahead: No module named 'torch.no_such_module'",
    ]


def test_an_agent_that_goes_without_having_read_its_news_is_gone() -> None:
    """It is told of an error then, and not of an end: no traceback in the log of an agent that was stopped."""
    program = """
import socket
from launcher.workers.forked import tell
from launcher.workers.imports_ahead import Imports
from launcher.workers.zygote import _Server
listener, news = socket.socketpair(), socket.socketpair()
server = _Server(listener[0], news[0], Imports())
tell(news[0], ready=True)
news[1].close()
server._hear_agent()
print(news[0] in [key.fileobj for key in server._selector.get_map().values()])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("False\n", "")
