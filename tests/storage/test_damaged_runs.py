"""Damage in a run, by each kind of object: noticed or harmless, set aside, and the step saved anew."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from storage import Checkpointer, inspection, open_store
from storage.errors import Corrupt
from tests.storage.mixed_runs import Events, every_object, make_state, names, same


def kind(name: str) -> str:
    return name.rpartition("/")[2].split("_0.")[0].split("-0")[0]


def test_a_flipped_byte_anywhere_is_detected_or_harmless(tmp_path: Path, events: Events) -> None:
    """Every kind of object, at its first, middle and last byte and some between; `verify` and `restore` agree.

    The manifest is there twice: one copy may be damaged, here both are.
    """
    good = tmp_path / "good"
    with Checkpointer(str(good)) as ckpt:
        ckpt.save(10, make_state(10), wait=True)
        ckpt.save(20, make_state(20), wait=True)
    victims = [name for name in every_object(good / "step-000000020") if not name.endswith("/manifest.json")]
    assert {kind(name) for name in victims} == {"__0", ".metadata", "manifest.json", "receipt"}
    fell_back = set()
    for name in victims:
        size = (good / "step-000000020" / name).stat().st_size
        for position in sorted({0, 1, size // 7, size // 3, size // 2, size - 900, size - 100, size - 1}):
            run = tmp_path / "run"
            shutil.copytree(good, run)
            folder = run / "step-000000020"
            for path in folder.rglob(name) if name == "manifest.json" else [folder / name]:
                data = bytearray(path.read_bytes())
                data[position] ^= 0x10
                path.write_bytes(data)
            verdict = inspection.verify(open_store(str(run)), "step-000000020/")
            events[0].clear()
            state = make_state(0)
            with Checkpointer(str(run), on_event=events[1]) as ckpt:
                step = ckpt.restore(state)
            assert same(state, make_state(step)), (name, position)
            assert (step == 20) == (not verdict.problems), (name, position, verdict)
            if step == 10:
                fell_back.add(kind(name))
                assert names(events) == ["checkpoint_quarantined", "restored"]
                assert events[0][0][1]["reason"]
            shutil.rmtree(run)
    assert fell_back == {"__0", ".metadata", "manifest.json"}


def test_a_flipped_byte_of_the_owner_does_not_stop_the_next_job(tmp_path: Path) -> None:
    with Checkpointer(str(tmp_path)) as ckpt:
        ckpt.save(10, make_state(10), wait=True)
    path = tmp_path / "owner.json"
    path.write_bytes(path.read_bytes().replace(b"epoch", b"epocH"))
    with Checkpointer(str(tmp_path)) as ckpt:
        assert ckpt.restore(make_state(0)) == 10


@pytest.mark.parametrize("victim", ["manifest.json", "attempt-*/manifest.json"])
@pytest.mark.parametrize("how", ["flipped", "missing", "of another attempt"])
def test_one_damaged_manifest_of_two_is_told_and_harmless(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, victim: str, how: str
) -> None:
    with Checkpointer(str(tmp_path)) as ckpt:
        ckpt.save(10, make_state(10), wait=True)
        ckpt.save(20, make_state(20), wait=True)
    (path,) = (tmp_path / "step-000000020").glob(victim)
    other = tmp_path / "step-000000010/manifest.json"
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(other.read_bytes() if how != "flipped" else path.read_bytes().replace(b"step", b"steP"))
    assert not inspection.verify(open_store(str(tmp_path)), "step-000000020/").problems
    with Checkpointer(str(tmp_path)) as ckpt:
        assert ckpt.restore(make_state(0)) == 20
    assert ("checksum" in caplog.text) == (victim == "manifest.json" and how != "missing")


@pytest.mark.parametrize("name", ["manifest.json", "attempt-"])
def test_missing_objects_are_damage(tmp_path: Path, name: str) -> None:
    with Checkpointer(str(tmp_path)) as ckpt:
        ckpt.save(10, make_state(10), wait=True)
        ckpt.save(20, make_state(20), wait=True)
    victim = next((tmp_path / "step-000000020").glob(f"{name}*"))
    if victim.is_dir():
        next(victim.glob("*.distcp")).unlink()
    else:
        for path in (tmp_path / "step-000000020").rglob(name):
            path.unlink()
    assert inspection.verify(open_store(str(tmp_path)), "step-000000020/").problems
    with Checkpointer(str(tmp_path)) as ckpt:
        assert ckpt.restore(make_state(0)) == 10


def test_no_good_checkpoint_left_is_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    with Checkpointer(str(tmp_path)) as ckpt:
        ckpt.save(10, make_state(10), wait=True)
    for path in tmp_path.rglob("manifest.json"):
        path.write_bytes(b"{}")
    for says in ("no good checkpoint is left", "set aside"):  # the second time nothing is committed any more
        with Checkpointer(str(tmp_path)) as ckpt, pytest.raises(Corrupt, match=says):
            ckpt.restore(make_state(0))


@pytest.mark.parametrize("reopen", [False, True])
def test_a_quarantined_step_can_be_saved_anew(tmp_path: Path, events: Events, reopen: bool) -> None:
    def damage() -> None:
        data = next(tmp_path.glob("step-000000020/attempt-*/*.distcp"))
        data.write_bytes(data.read_bytes()[:-1])

    with Checkpointer(str(tmp_path), on_event=events[1]) as ckpt:
        ckpt.save(10, make_state(10), wait=True)
        ckpt.save(20, make_state(20), wait=True)
        if not reopen:
            damage()
            assert ckpt.restore(make_state(0)) == 10
            ckpt.save(20, make_state(21), wait=True)
    if reopen:
        damage()
    with Checkpointer(str(tmp_path), on_event=events[1]) as ckpt:
        if reopen:
            assert ckpt.restore(make_state(0)) == 10
            ckpt.save(20, make_state(21), wait=True)
        state = make_state(0)
        assert ckpt.restore(state) == 20
    assert same(state, make_state(21))
