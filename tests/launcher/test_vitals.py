"""How a node's workers are gets to whoever asks the store, at a bounded rate; logs and lines say where and when."""

from __future__ import annotations

import datetime
import logging
import os
import re
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std

from elastic_moe.cli.console import ZonedFormatter
from launcher.coordination import vitals_publisher as publishing
from launcher.coordination.vitals_publisher import VitalsPublisher, vitals_prefix
from launcher.elastic.logs import name_node
from launcher.elastic.vitals_collector import VitalsCollector
from launcher.errors import KVUnavailable
from launcher.kv import Entry, Lease
from launcher.kv.memory import MemoryKV
from launcher.rounds.records import FailedWorker, Failure, Participant, Round, describe
from launcher.rounds.vitals import Vitals
from launcher.workers.channel import Channel
from launcher.workers.local_workers import LocalWorkers
from storage import Checkpointer
from tests.cluster import until
from tests.storage.small_runs import state

KEY = f"{vitals_prefix('job')}a-1"
ROUND = Round(2, "x", (Participant("a-1", 2), Participant("b-2", 2)), None, (), "first round")


class Counting(MemoryKV):
    """Counts puts; may be away."""

    def __init__(self) -> None:
        super().__init__()
        self.num_puts = 0
        self.is_away = False

    def put(
        self, key: str, value: bytes, *, if_revision: int | None = None, lease: Lease | None = None
    ) -> Entry | None:
        self.num_puts += 1
        if self.is_away:
            raise KVUnavailable("away")
        return super().put(key, value, if_revision=if_revision, lease=lease)


@pytest.fixture
def kv() -> Iterator[Counting]:
    store = Counting()
    yield store
    store.close()


@pytest.fixture
def publisher(kv: Counting, monkeypatch: pytest.MonkeyPatch) -> Iterator[VitalsPublisher]:
    monkeypatch.setattr(publishing, "INTERVAL_S_MIN", 0.05)
    monkeypatch.setattr(publishing, "_TICK_S", 0.0)
    lease = kv.lease(60.0)
    with VitalsPublisher(kv, "job", "a-1", lambda: lease) as found:
        yield found
    lease.revoke()


def read(kv: MemoryKV) -> Vitals:
    entry = kv.get(KEY)
    return Vitals() if entry is None else Vitals.from_json(entry.value)


def beat(channels: LocalWorkers, local_rank: int, step: int, ago_s: float = 0.0) -> None:
    """A heartbeat of some time ago."""
    worker = Channel.attach(channels.path(local_rank))
    now_ns = time.monotonic_ns
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "monotonic_ns", lambda: now_ns() - int(ago_s * 1e9))
        worker.beat(step)
    worker.close()


def test_what_workers_and_checkpointers_say_is_told(
    kv: Counting, publisher: VitalsPublisher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vitals, channels = VitalsCollector(publisher, tmp_path), LocalWorkers(tmp_path, 2, (0, 1))
    failure = Failure(3, -9, "boom", ts=1_000.0)
    vitals.begin(Round(**{**vars(ROUND), "causes": (FailedWorker("b-2", "host-b", failure),)}))
    vitals.look(channels)
    told = until("nothing is told of workers that say nothing", lambda: kv.get(KEY) and read(kv))
    assert told == Vitals(2, failure_ts=1_000.0, failure="worker of rank 3 was killed by SIGKILL: boom (on b-2)")
    beat(channels, 0, step=6, ago_s=1000.0)
    beat(channels, 1, step=7)
    monkeypatch.setenv("ELASTIC_MOE_CHECKPOINT", str(vitals.checkpoint_path))
    with Checkpointer(str(tmp_path / "run")) as ckpt:
        for step in (5, 6):
            ckpt.save(step, state(step), wait=True)

    def newest() -> Vitals | None:
        vitals.look(channels)
        return read(kv) if read(kv).checkpoint_step == 6 else None

    told = until("the checkpoint is told", newest)
    assert (told.step, told.checkpoint_step) == (7, 6)
    assert told.beat_ts == pytest.approx(time.time() - 1000.0, abs=100.0)  # of the one that has been silent for longer
    assert told.checkpoint_ts == pytest.approx(time.time(), abs=100.0)
    assert stat.S_IMODE(vitals.checkpoint_path.stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.glob("checkpoint*")] == ["checkpoint"]
    channels.close()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"step": null, "ts": 1}', b'{"ts": 1}', b"\xff"])
def test_a_word_of_no_checkpoint_is_none(
    content: bytes, kv: Counting, publisher: VitalsPublisher, tmp_path: Path
) -> None:
    vitals, channels = VitalsCollector(publisher, tmp_path), LocalWorkers(tmp_path, 2, (0,))
    vitals.begin(ROUND)
    vitals.checkpoint_path.write_bytes(content)
    vitals.look(channels)
    assert until("it is told", lambda: kv.get(KEY) and read(kv)) == Vitals(2)
    channels.close()


def test_what_is_told_often_is_put_seldom_and_the_last_of_it(kv: Counting, publisher: VitalsPublisher) -> None:
    began_s = time.monotonic()
    step = 0
    while kv.num_puts < 4:  # as fast as it goes
        step += 1
        publisher.publish(Vitals(step=step), num_nodes=2)
        assert time.monotonic() < began_s + 60, "it is put now and then"
    until("the last is there", lambda: read(kv).step == step)
    assert step > 100
    assert kv.num_puts <= 2 + (time.monotonic() - began_s) / 0.05
    puts = kv.num_puts
    for same in (step, step, step, step + 1):
        publisher.publish(Vitals(step=same), num_nodes=2)
        time.sleep(0.06)
    until("news is put", lambda: read(kv).step == step + 1)
    assert kv.num_puts == puts + 1


def test_a_store_that_is_away_is_told_of_once_and_holds_nobody_up(
    kv: Counting, publisher: VitalsPublisher, caplog: pytest.LogCaptureFixture
) -> None:
    kv.is_away = True
    with caplog.at_level(logging.INFO, "launcher"):
        for step in range(3):
            before = kv.num_puts
            publisher.publish(Vitals(step=step), num_nodes=1)
            until("it is tried", lambda before=before: kv.num_puts > before)  # type: ignore[misc]
        kv.is_away = False
        publisher.publish(Vitals(step=9), num_nodes=1)
        until("it is back", lambda: read(kv).step == 9)
    assert len([record for record in caplog.records if "cannot be told" in record.getMessage()]) == 1


def test_it_goes_with_the_node(kv: Counting) -> None:
    lease = kv.lease(60.0)
    with VitalsPublisher(kv, "job", "a-1", lambda: lease) as publisher:
        publisher.publish(Vitals(step=1), num_nodes=1)
        until("it is there", lambda: kv.get(KEY))
    lease.revoke()
    assert kv.get(KEY) is None


@pytest.mark.parametrize(
    ("exit_code", "how"),
    [
        (1, "failed with exit code 1"),
        (137, "failed with exit code 137"),
        (-9, "was killed by SIGKILL"),
        (-11, "was killed by SIGSEGV"),
        (-40, "was killed by signal 40"),
    ],
)
def test_a_failure_says_how_in_plain_words(exit_code: int, how: str) -> None:
    assert describe(Failure(1, exit_code, "boom", 0.0)) == f"worker of rank 1 {how}: boom"


def test_log_folders_name_their_node(tmp_path: Path) -> None:
    specs = name_node(DefaultLogsSpecs(str(tmp_path), redirects=Std.ALL), "node 1/a-0123abcd")
    for attempt in range(2):
        envs = {
            rank: {"TORCHELASTIC_RUN_ID": "job", "TORCHELASTIC_RESTART_COUNT": str(attempt), "RANK": str(4 + rank)}
            for rank in range(2)
        }
        found = specs.reify(envs)
        folder = Path(found.stdouts[1]).parent
        assert re.fullmatch(rf"job_node-1-a-0123abcd_\w+/attempt_{attempt}/1", str(folder.relative_to(tmp_path)))
        assert envs[1]["TORCHELASTIC_ERROR_FILE"] == str(folder / "error.json") == found.error_files[1]
        assert (envs[1]["TORCHELASTIC_RUN_ID"], envs[1]["RANK"]) == ("job", "5")
    assert len(list(tmp_path.iterdir())) == 1
    assert specs.root_log_dir == str(tmp_path)


def test_without_a_folder_there_is_none(tmp_path: Path) -> None:
    specs = name_node(DefaultLogsSpecs(os.devnull), "a-1")
    envs = {0: {"TORCHELASTIC_RUN_ID": "job"}}
    assert specs.reify(envs).error_files == {0: os.devnull}
    assert envs[0]["TORCHELASTIC_ERROR_FILE"] == ""


def test_lines_of_the_log_have_a_date_and_a_zone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Kolkata")
    time.tzset()
    try:
        record = logging.LogRecord("launcher", logging.INFO, "", 0, "told", (), None)
        line = ZonedFormatter("%(asctime)s %(name)s %(levelname)s %(message)s").format(record)
    finally:
        monkeypatch.undo()
        time.tzset()
    when, rest = line[:29], line[29:]
    assert rest == " launcher INFO told"
    assert when.endswith("+05:30")
    assert datetime.datetime.fromisoformat(when).timestamp() == pytest.approx(record.created, abs=0.001)


def test_a_note_that_cannot_be_written_harms_no_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELASTIC_MOE_CHECKPOINT", str(tmp_path / "gone" / "checkpoint"))
    with Checkpointer(str(tmp_path / "run")) as ckpt:
        ckpt.save(1, state(1), wait=True)
        assert ckpt.wait()
