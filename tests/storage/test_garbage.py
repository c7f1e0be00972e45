"""`ckpt gc`: what dead jobs left behind goes, and nothing else."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from elastic_moe.cli.main import main
from storage import Checkpointer, inspection, open_store
from storage.errors import Transient
from storage.format.layout import is_heartbeat_name
from storage.run import garbage
from storage.run.garbage import GarbageKind, of_names, of_step, of_uploads
from storage.run.retention import StepState
from storage.saving import commit
from storage.stores.keys import is_probe_name
from storage.stores.objects import ObjectInfo, Upload

OLD, NEW, BEFORE = 100.0, 300.0, 200.0
PREFIX = "step-000000007/attempt-"


def info(name: str, when: float | None) -> ObjectInfo:
    return ObjectInfo(PREFIX + name, 10, "etag", when)


def state(committed: bool = False, attempt: str | None = None, quarantined: bool = False) -> StepState:
    return StepState(7, committed, quarantined, attempt, frozenset({"aaaaaaaa", "bbbbbbbb"}))


LISTED = [info("aaaaaaaa/__0_0.distcp", OLD), info("aaaaaaaa/receipt", OLD), info("bbbbbbbb/__0_0.distcp", OLD)]


def names(found: list[garbage.Garbage]) -> list[str]:
    return [row.name.removeprefix(PREFIX) for row in found]


def test_what_goes_of_a_step() -> None:
    assert names(of_step(state(), LISTED, BEFORE)) == ["aaaaaaaa", "bbbbbbbb"]
    assert names(of_step(state(committed=True, attempt="aaaaaaaa"), LISTED, BEFORE)) == ["bbbbbbbb"]
    assert of_step(state(committed=True), LISTED, BEFORE) == []  # by stock DCP, or its manifest is damaged
    assert of_step(state(quarantined=True), LISTED, BEFORE) == []


def test_a_manifest_without_a_commit_goes() -> None:
    manifest = ObjectInfo("step-000000007/manifest.json", 10, "etag", OLD)
    (row,) = of_step(StepState(7, False, False, None, frozenset()), [manifest], BEFORE)
    assert (row.kind, row.name, row.keys) == ("manifest", manifest.key, (manifest.key,))
    young = ObjectInfo(manifest.key, 10, "etag", NEW)
    assert of_step(StepState(7, False, False, None, frozenset()), [young], BEFORE) == []
    assert of_step(StepState(7, True, False, "aaaaaaaa", frozenset({"aaaaaaaa"})), [manifest], BEFORE) == []
    assert of_step(StepState(7, False, True, None, frozenset()), [manifest], BEFORE) == []


@pytest.mark.parametrize("when", [NEW, None])
def test_one_young_object_or_one_of_unknown_age_keeps_an_attempt(when: float | None) -> None:
    listed = [*LISTED, info("aaaaaaaa/__1_0.distcp", when)]
    assert names(of_step(state(), listed, BEFORE)) == ["bbbbbbbb"]


def test_probes_and_uploads() -> None:
    probe = ".probe-" + "a" * 32
    listed = [ObjectInfo(probe, 5, "e", OLD), ObjectInfo(".probe-mine", 5, "e", OLD)]
    assert [row.name for row in of_names(listed, GarbageKind.PROBE, is_probe_name, BEFORE)] == [probe]
    assert of_names([ObjectInfo(probe, 5, "e", NEW)], GarbageKind.PROBE, is_probe_name, BEFORE) == []
    beats = [ObjectInfo("beat-" + "b" * 32, 2, "e", OLD), ObjectInfo("beat-" + "c" * 32, 2, "e", NEW)]
    assert [row.name for row in of_names(beats, GarbageKind.HEARTBEAT, is_heartbeat_name, BEFORE)] == [beats[0].key]
    uploads = [Upload("x", "1", OLD), Upload("y", "2", NEW)]
    assert [row.name for row in of_uploads(uploads, BEFORE)] == ["x"]


def make_state() -> dict[str, Any]:
    return {"w": torch.randn(300, 70), "n": 1}


@pytest.mark.parametrize("kind", ["local", "juicefs", "fsspec-s3"])
def test_orphans_go_and_checkpoints_stay(
    kind: str,
    make_url: Callable[[str], str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = make_url(kind)

    def broken(*args: Any) -> None:
        raise Transient("killed here")

    with Checkpointer(url) as ckpt:
        ckpt.save(10, make_state(), wait=True)
        with monkeypatch.context() as patch:
            patch.setattr(commit, "publish", broken)
            ckpt.save(20, make_state(), wait=True)
            assert not ckpt.wait()
    store = open_store(url)
    before = {row.key for row in store.list("")}
    orphans = {key for key in before if key.startswith("step-000000020/")}
    assert orphans
    assert main(["ckpt", "gc", url]) == 0
    assert capsys.readouterr().out == "nothing to remove\n"  # all of it is young
    now_s = time.time()
    monkeypatch.setattr(time, "time", lambda: now_s + 30 * 3600)
    assert main(["ckpt", "gc", url, "--dry-run"]) == 0
    assert "would remove attempt step-000000020/attempt-" in capsys.readouterr().out
    assert {row.key for row in store.list("")} == before
    assert main(["ckpt", "gc", url, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["kind"], row["removed"], row["num_objects"]) == ("attempt", True, len(orphans))
    assert {row.key for row in store.list("")} == before - orphans
    assert not inspection.verify(store, "step-000000010/").problems


def test_unfinished_uploads_go(make_url: Callable[[str], str], capsys: pytest.CaptureFixture[str]) -> None:
    url = make_url("juicefs")
    with Checkpointer(url) as ckpt:
        ckpt.save(10, make_state(), wait=True)
    store: Any = open_store(url)
    bucket = store._bucket
    upload = bucket.create_upload("step-000000020/attempt-aaaaaaaa/__0_0.distcp")
    bucket.put_part("step-000000020/attempt-aaaaaaaa/__0_0.distcp", upload, 1, [memoryview(b"x" * 100)])
    (row,) = garbage.find(store, time.time() + 3600, 1800)
    assert (row.kind, row.name) == ("upload", "step-000000020/attempt-aaaaaaaa/__0_0.distcp")
    garbage.remove(store, row)
    garbage.remove(store, row)
    assert garbage.find(store, time.time() + 3600, 1800) == []


@pytest.mark.parametrize("hours", ["0.5", "-1", "nan", "soon"])
def test_ages_that_could_hit_a_living_job_are_refused(hours: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["ckpt", "gc", "run", "--older-than", hours])
    assert caught.value.code == 2
    assert "is not a number of hours >= 1" in capsys.readouterr().err


def test_gc_of_one_checkpoint_is_refused(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with Checkpointer(str(tmp_path)) as ckpt:
        ckpt.save(10, make_state(), wait=True)
    assert main(["ckpt", "gc", f"{tmp_path}/step-000000010"]) == 2
    assert "whole run" in capsys.readouterr().err
