"""What workers that failed leave, and what is made of it."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure, record

from launcher.health.postmortem import NodeCircumstances, WorkerExit, examine, oom_kills, summarise
from launcher.node.round_events import tell
from launcher.reports.sentences import last_words
from launcher.rounds.failures import TRACEBACK_MAX_CHARS, FailureClass
from launcher.rounds.history import Exclusion, History
from launcher.rounds.records import FailedWorker, Failure, Participant, Round, Verdict
from launcher.workers.channel import Progress, WorkerPhase
from launcher.workers.program import record_error

NOW = NodeCircumstances(lived_s=10.0)
GLOO = "RuntimeError: [../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1"


def worker_exit(
    folder: Path, rank: int = 0, exit_code: int | None = 1, *, error: str = "", log: str = ""
) -> WorkerExit:
    """A worker that left an error file as torch's `record` writes it, or a log."""
    error_file, stderr = folder / f"error-{rank}.json", folder / f"stderr-{rank}.log"
    if error:
        stack = f'Traceback (most recent call last):\n  File "/job/x.py", line 1, in f\n{error}'
        told = {"message": {"message": error, "extraInfo": {"py_callstack": stack, "timestamp": "1"}}}
        error_file.write_text(json.dumps(told))
        os.utime(error_file, (100.0 - rank, 100.0 - rank))
    if log:
        stderr.write_text(log)
    progress = Progress(WorkerPhase.RUNNING, 7, 1.0)
    return WorkerExit(rank, 1000 + rank, exit_code, str(error_file), str(stderr) if log else "", progress)


class TestExamination:
    def test_workers_that_do_well_are_left_alone(self, tmp_path: Path) -> None:
        assert examine([worker_exit(tmp_path, 0, None), worker_exit(tmp_path, 1, 0)], NOW) == []

    def test_the_cause_goes_before_its_victims_whoever_was_first(self, tmp_path: Path) -> None:
        workers = [worker_exit(tmp_path, 0, error="ValueError: boom"), worker_exit(tmp_path, 1, error=GLOO)]
        found = summarise(examine(workers, NOW))
        assert found is not None
        assert (found.rank, found.kind, found.step, found.pid) == (0, FailureClass.PROGRAM, 7, 1000)
        assert found.place == "ValueError at /job/x.py:1 in f"
        assert found.traceback.endswith("ValueError: boom")
        (victim,) = found.victims
        assert (victim.rank, victim.kind, victim.traceback) == (1, FailureClass.LOST_PEER, "")

    def test_a_worker_that_still_unwinds_counts(self, tmp_path: Path) -> None:
        """Its peers saw its connections close, and may have ended before it."""
        found = examine(
            [worker_exit(tmp_path, 0, None, error="ValueError: boom"), worker_exit(tmp_path, 1, error=GLOO)], NOW
        )
        assert [(f.rank, f.exit_code) for f in found] == [(0, 1), (1, 1)]

    def test_of_equals_the_first_in_time_leads(self, tmp_path: Path) -> None:
        found = examine([worker_exit(tmp_path, rank, error="ValueError: boom") for rank in (0, 1, 2)], NOW)
        assert [f.rank for f in found] == [2, 1, 0]

    def test_the_log_speaks_where_there_is_no_error_file(self, tmp_path: Path) -> None:
        (raised,) = examine([worker_exit(tmp_path, log="Traceback (most recent call last):\nKeyError: 1\n")], NOW)
        assert (raised.message, raised.kind) == ("KeyError: 1", FailureClass.PROGRAM)
        (refused,) = examine([worker_exit(tmp_path, exit_code=2, log="usage: x\nx: error: no such option\n\n")], NOW)
        assert refused.message == "x: error: no such option"

    def test_the_kernel_and_the_drain_explain_signals(self, tmp_path: Path) -> None:
        killed = worker_exit(tmp_path, exit_code=-signal.SIGKILL)
        kinds = [
            examine([killed], around)[0].kind
            for around in (NOW, NodeCircumstances(1.0, oom_kills=1), NodeCircumstances(1.0, draining=True))
        ]
        assert kinds == [FailureClass.SIGNAL, FailureClass.OUT_OF_MEMORY, FailureClass.PREEMPTION]

    @pytest.mark.parametrize(
        "left", ["", "{", "[]", '{"message": {}}', '{"message": {"message": "x", "extraInfo": 3}}']
    )
    def test_an_error_file_of_another_kind_is_no_obstacle(self, tmp_path: Path, left: str) -> None:
        worker = worker_exit(tmp_path)
        Path(worker.error_file).write_text(left)
        (found,) = examine([worker], NOW)
        assert found.place == "exit code 1"

    def test_a_record_stays_small(self, tmp_path: Path) -> None:
        workers = [worker_exit(tmp_path, rank, error="ValueError: " + "x" * 100_000) for rank in range(64)]
        found = summarise(examine(workers, NOW))
        assert found is not None
        assert len(found.traceback) < TRACEBACK_MAX_CHARS + 100
        assert len(repr(found)) < 12_000
        assert summarise([]) is None


class TestOutOfMemory:
    def test_the_cgroup_is_asked_before_the_host(self, tmp_path: Path) -> None:
        proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
        (proc / "self").mkdir(parents=True)
        (proc / "vmstat").write_text("nr_free_pages 1\noom_kill 9\n")
        assert oom_kills(proc, cgroups) == 9
        (proc / "self/cgroup").write_text("4:cpu,memory:/job\n0::/\n")
        v1 = cgroups / "memory/job"
        v1.mkdir(parents=True)
        (v1 / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 3\n")
        assert oom_kills(proc, cgroups) == 3
        (proc / "self/cgroup").write_text("0::/job.slice\n")
        (cgroups / "job.slice").mkdir()
        (cgroups / "job.slice/memory.events").write_text("low 0\noom 2\noom_kill 1\noom_group_kill 0\n")
        assert oom_kills(proc, cgroups) == 1

    def test_where_nothing_is_told_nothing_is_known(self, tmp_path: Path) -> None:
        assert oom_kills(tmp_path, tmp_path) == 0
        assert oom_kills() >= 0


class TestErrorFile:
    def fail(self) -> None:
        raise ValueError("boom")

    def test_is_one_that_torch_reads(self, tmp_path: Path) -> None:
        path = tmp_path / "error.json"
        try:
            self.fail()
        except ValueError as error:
            record_error(str(path), error)
        read = ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file=str(path))
        assert isinstance(read.message, dict)
        assert read.message["message"] == "ValueError: boom"
        assert "in fail" in read.message["extraInfo"]["py_callstack"]
        assert path.stat().st_mode & 0o777 == 0o600
        assert list(tmp_path.iterdir()) == [path]

    def test_leaves_what_record_wrote(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "error.json"
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
        with pytest.raises(ValueError, match="boom"):
            record(self.fail)()
        before = path.read_text()
        record_error(str(path), KeyError("later"))
        assert path.read_text() == before


class TestTelling:
    causes = (
        FailedWorker("b-1", "host-b", Failure(3, 1, "ValueError: boom", 1.0, step=7, place="ValueError at x.py:1",
                                       traceback="Traceback ...\nValueError: boom")),
        FailedWorker("a-1", "host-a", Failure(0, -6, "gloo", 1.0, kind=FailureClass.LOST_PEER, step=7)),
        FailedWorker("a-1", "host-a", Failure(1, -9, "", 1.0, kind=FailureClass.SIGNAL)),
    )  # fmt: skip

    def round_of(self, **fields) -> Round:
        participants = (Participant("a-1", 2), Participant("b-1", 2))
        return Round(**{"generation": 2, "lineage": "L", "participants": participants, "mesh": None,
                        "spares": (), "reason": "", **fields})  # fmt: skip

    def test_the_last_words(self) -> None:
        ended = self.round_of(outcome="failed: it did", verdict=Verdict.FAILS_AGAIN, causes=self.causes)
        assert last_words(ended).splitlines() == [
            "failed: it did",
            "root cause: rank 3 on b-1 (host host-b): a program error after step 7 (exit code 1, ValueError at x.py:1)",
            "    Traceback ...",
            "    ValueError: boom",
            "victim: rank 0 on a-1 (host host-a): lost its connection after step 7 (SIGABRT), because rank 3 failed",
            "victim: rank 1 on a-1 (host host-a): killed by a signal (SIGKILL)",
            "exit code 70: running it again as it is will not help",
        ]
        short = self.round_of(outcome="failed: 1 of at least 2 nodes after 9 s", verdict=Verdict.NO_QUORUM)
        assert last_words(short).splitlines()[-1].startswith("exit code 75: ")

    def told(self, after: Round, before: Round | None) -> list[tuple[str, dict[str, object]]]:
        events: list[tuple[str, dict[str, object]]] = []
        tell(lambda event, /, **fields: events.append((event, fields)), after, before)
        return events

    def test_a_restart_tells_its_cause_once(self) -> None:
        before, after = self.round_of(generation=1), self.round_of(causes=self.causes)
        (cause, fields), (formed, _) = self.told(after, before)
        assert (cause, formed) == ("root_cause", "round_formed")
        assert (fields["generation"], fields["rank"], fields["host"]) == (1, 3, "host-b")
        assert fields["victims"][1] == {"rank": 1, "node": "a-1", "failure_class": "signal"}  # type: ignore[index]
        assert self.told(self.round_of(causes=self.causes, complete=True), after) == []

    def test_exclusions_are_told_as_they_begin_and_end(self) -> None:
        out = Exclusion("d", "bad", 60.0)
        before, after = self.round_of(generation=1), self.round_of(history=History(exclusions=(out,), waived=("e",)))
        assert [e for e, _ in self.told(after, before)] == ["node_excluded", "exclusion_waived", "round_formed"]
        back = self.round_of(history=History(exclusions=(Exclusion("d", "bad", 60.0, active=False),), waived=("e",)))
        assert self.told(back, after) == [("node_readmitted", {"generation": 2, "node_readmitted": "d", "times": 1})]
