"""What whoever started the launcher finds in the file that it named."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from launcher.elastic import error_file
from launcher.rounds.records import FailedWorker, Failure, Round, Verdict


def failed(*causes: FailedWorker) -> Round:
    return Round(
        generation=3,
        lineage="",
        participants=(),
        mesh=None,
        spares=(),
        reason="",
        outcome="failed: too few nodes",
        verdict=Verdict.NO_QUORUM,
        causes=causes,
    )


FAILURE = Failure(rank=1, exit_code=-9, message="ValueError: no batch", ts=1700000000.7, traceback="Traceback\nhere")
CAUSE = FailedWorker("b-1", "host-b", FAILURE)


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "error.json"
    path.write_text("of an earlier run, and longer than what comes" * 50)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    return path


def read(path: Path) -> tuple[str, int, str, int]:
    """As TorchX reads it (torchx/specs/api.py, `_format_error_message`)."""
    message = json.loads(path.read_text())["message"]
    extra = message["extraInfo"]
    return message["message"], message["errorCode"], extra["py_callstack"], int(extra["timestamp"])


def test_the_root_cause_of_another_node(told: Path) -> None:
    error_file.tell_failed(failed(CAUSE), "")
    assert read(told) == ("ValueError: no batch", -9, "Traceback\nhere", 1700000000)


def test_the_root_cause_of_this_node_with_all_that_its_worker_wrote(told: Path, tmp_path: Path) -> None:
    written: dict[str, Any] = {"message": "ValueError: no batch", "extraInfo": {"py_callstack": "x", "timestamp": "7"}}
    worker = tmp_path / "worker.json"
    worker.write_text(json.dumps({"message": {**written, "mine": 1}}))
    error_file.tell_failed(failed(CAUSE), str(worker))
    assert read(told) == ("ValueError: no batch", -9, "x", 7)
    assert json.loads(told.read_text())["message"]["mine"] == 1


@pytest.mark.parametrize("content", ["", "{", '{"message": "a text"}', "[]"])
def test_a_worker_that_wrote_something_else(told: Path, tmp_path: Path, content: str) -> None:
    worker = tmp_path / "worker.json"
    worker.write_text(content)
    error_file.tell_failed(failed(CAUSE), str(worker))
    assert read(told)[0] == "ValueError: no batch"


def test_a_job_without_a_failed_worker(told: Path) -> None:
    error_file.tell_failed(failed(), "")
    assert read(told)[:2] == ("the job failed: too few nodes", 75)


def test_an_error_of_the_launcher(told: Path) -> None:
    told.unlink()
    error_file.tell_raised(RuntimeError("no store"), 2)
    assert read(told)[:2] == ("RuntimeError: no store", 2)
    assert stat.S_IMODE(told.stat().st_mode) == 0o600


def test_what_kubernetes_cuts_off_is_left_out_instead(told: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(error_file._MAX_BYTES, str(told), 4096)
    long = Failure(rank=0, exit_code=1, message="no", ts=1.0, traceback='File "a\nb"\n' * 1000 + "ValueError: no")
    error_file.tell_failed(failed(FailedWorker("a", "a", long)), "")
    assert 3000 < told.stat().st_size <= 4096
    assert read(told)[2].endswith("ValueError: no")


def test_a_file_that_cannot_be_written_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "/dev/full")
    error_file.tell_failed(failed(CAUSE), "")
    assert "No space left" in caplog.text
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE")
    error_file.tell_failed(failed(CAUSE), "")
    assert "TORCHELASTIC_ERROR_FILE" not in os.environ
