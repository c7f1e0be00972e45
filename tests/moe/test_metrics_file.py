"""A file of metrics whose disk is full, or fails: the training goes on, and says so once."""

from __future__ import annotations

import errno
import json
import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from elastic_moe.errors import UserError
from elastic_moe.trainer import metrics as module
from elastic_moe.trainer.metrics import MetricsFile, StepMetrics


def line(step: int) -> StepMetrics:
    return StepMetrics(step, 2.5, 1.0, 1e-3, 1024 * step, 1.2, 0.1, 3, 4, {"shard": 2}, 1e9)


class Disk:
    """Takes `room` bytes, and no more until it gets some."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room = 1 << 30
        self.events: list[tuple[str, dict[str, Any]]] = []
        write = os.write

        def limited(fd: int, data: bytes) -> int:
            if self.room <= 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            written = write(fd, bytes(data)[: self.room])
            self.room -= written
            return written

        monkeypatch.setattr(os, "write", limited)
        told = SimpleNamespace(event=lambda name, **fields: self.events.append((name, fields)))
        monkeypatch.setattr(module, "worker", told)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Disk:
    caplog.set_level(logging.INFO)
    return Disk(monkeypatch)


def steps(path: Path) -> list[int]:
    return [json.loads(text)["step"] for text in path.read_text().splitlines()]


def test_a_full_disk_is_told_once_and_lines_wait(tmp_path: Path, disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as file:
        file.append(line(1))
        disk.room = 40  # of the next line
        for step in (2, 3, 4):
            file.append(line(step))
        assert path.read_bytes().count(b"\n") == 1
        disk.room = 1 << 30
        file.append(line(5))
        file.append(line(6))
    assert steps(path) == [1, 2, 3, 4, 5, 6]
    told = {"path": str(path), "step": 2, "reason": "No space left on device"}
    assert disk.events == [("metrics_failed", told)]
    assert [record.getMessage().partition(str(path))[2] for record in caplog.records] == [
        " cannot be written: No space left on device; it is tried again with each step",
        " is written again; 0 of its lines were lost",
    ]


def test_a_job_starts_on_a_full_disk_and_each_time_is_told(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 7, "lo')
    disk.room = 0
    with MetricsFile(path) as file:
        assert file.last_step == 7
        file.append(line(8))
        disk.room = 1 << 30
        file.append(line(9))
        disk.room = 0
        file.append(line(10))
        disk.room = 1 << 30  # as it ends
    assert path.read_text().splitlines()[0] == '{"step": 7, "lo'
    assert [json.loads(text)["step"] for text in path.read_text().splitlines()[1:]] == [8, 9, 10]
    assert [fields["step"] for _, fields in disk.events] == [0, 10]

    def refuse(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    new = tmp_path / "new.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        file = MetricsFile(new)
        file.append(line(1))
    with file:
        file.append(line(2))
    assert steps(new) == [1, 2]


def test_an_end_that_cannot_be_read_is_read_before_the_first_line(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the line would be written behind half of another one."""
    path, num_fds = tmp_path / "metrics.jsonl", len(os.listdir("/proc/self/fd"))
    path.write_text('{"step": 6, "x": 1}\n{"step": 7, "lo')

    def fail(*_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", fail)
        file = MetricsFile(path)
        file.append(line(8))
        assert len(os.listdir("/proc/self/fd")) == num_fds
    with file:
        file.append(line(9))
        assert file.last_step == 7
    assert path.read_text().splitlines()[1] == '{"step": 7, "lo'
    assert [json.loads(text)["step"] for text in path.read_text().splitlines()[2:]] == [8, 9]
    assert [fields["reason"] for _, fields in disk.events] == ["Input/output error"]


def test_memory_for_lines_is_bounded(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_WAITING_BYTES", 600)
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as file:
        disk.room = 0
        for step in range(1, 6):
            file.append(line(step))
        disk.room = 1 << 30
        file.append(line(6))
        file.append(line(7))
        disk.room = 0
        file.append(line(8))
    kept = steps(path)
    assert kept[-1] == 7
    assert 1 < len(kept) < 6
    assert f"is written again; {7 - len(kept)} of its lines were lost" in caplog.text
    assert "lacks 1 lines" in caplog.text


def test_other_errors_are_the_jobs_own(tmp_path: Path, disk: Disk) -> None:
    with pytest.raises(UserError, match=r"train\.metrics .* cannot be written: Is a directory"):
        MetricsFile(tmp_path)
    assert disk.events == []
