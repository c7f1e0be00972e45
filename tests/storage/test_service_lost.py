"""Notes of what was staged, which outlive all processes, and what is told of saves that nobody has any more."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest

from launcher.workers.channel import started_ticks
from storage.agent import AgentEnvironment
from storage.errors import Transient
from storage.pace.rules import Tier
from storage.run.attempt import Attempt
from storage.saving import receipts
from storage.service import address, lost
from storage.service.lost import LostSaves
from storage.service.messages import Stage
from storage.service.notes import NoteOfSave, Notes
from storage.service.processes import began_at, is_alive
from storage.stores.objects import ObjectStore
from tests.cluster import until
from tests.storage.service_cases import events_in
from tests.storage.test_service_messages import STAGE

GONE = 1  # began_at: this process did not begin then


def stage_of(tmp_path: Path, pid: int = 0, began: int = GONE) -> Stage:
    told = {AgentEnvironment.variable("events"): str(tmp_path / "events.jsonl")}
    found = {"pid": pid or os.getpid(), "pid_began": began, "url": str(tmp_path / "run"), "told": told}
    return STAGE.model_copy(update=found)


def noted(tmp_path: Path, stage: Stage) -> Notes:
    notes = Notes(tmp_path / "kept")
    notes.add(stage.name, stage.model_dump_json())
    return notes


def told(tmp_path: Path) -> list[str]:
    return [event["event"] for event in events_in(tmp_path / "events.jsonl")]


def tell_once(notes: Notes) -> None:
    """As a service does that starts, and ends at once."""
    LostSaves(notes, lambda stage: False).start().close()


def test_a_note_is_there_until_its_save_has_ended(tmp_path: Path) -> None:
    notes = Notes(tmp_path / "kept")
    assert notes.all() == []
    notes.add("a", "one")
    notes.add("b", "two")
    notes.add("a", "three")  # its worker hands it over once more
    assert sorted(note.stage for note in Notes(tmp_path / "kept").all()) == ["three", "two"]
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "kept").iterdir()} == {0o600}
    notes.drop("a")
    notes.drop("a")
    (note,) = notes.all()
    note.drop()
    assert list((tmp_path / "kept").iterdir()) == []


def test_a_folder_that_is_removed_meanwhile_costs_no_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a service that ends, and finds it empty."""
    notes, make, made = Notes(tmp_path / "kept"), Notes._make, list[int]()

    def make_and_lose(self: Notes) -> None:
        make(self)
        made.append(1)
        if len(made) == 1:
            (tmp_path / "kept").rmdir()

    monkeypatch.setattr(Notes, "_make", make_and_lose)
    notes.add("a", "one")
    assert [note.stage for note in notes.all()] == ["one"]


def test_nothing_is_noted_where_others_could_read_it(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o755)
    Notes(tmp_path / "open" / "kept").add("a", "one")
    assert list((tmp_path / "open").iterdir()) == []


@pytest.mark.parametrize("has_socket", [True, False])
def test_what_a_service_has_left_that_was_killed_is_told_by_its_neighbour(has_socket: bool, tmp_path: Path) -> None:
    """Notes of a worker that lives are left to it: it drops them by itself."""
    dead, alive = tmp_path / "node" / "dead.sock", tmp_path / "node" / "alive.sock"
    if has_socket:
        address.listen(dead).close()
    theirs, ours = Notes(address.kept(dead)), Notes(address.kept(alive))
    theirs.add("a", stage_of(tmp_path).model_dump_json())
    theirs.add("b", stage_of(tmp_path, os.getpid(), began_at(os.getpid())).model_dump_json())
    (address.kept(dead) / "c.tmp").touch()
    address.sweep(dead.parent, alive, ours.take_over)
    assert [len(notes.all()) for notes in (theirs, ours)] == [1, 1]
    assert sorted(file.name for file in dead.parent.iterdir()) == ["alive.kept", "dead.kept"]
    theirs.drop("b")
    address.sweep(dead.parent, alive, ours.take_over)
    assert [file.name for file in dead.parent.iterdir()] == ["alive.kept"]
    tell_once(ours)
    assert told(tmp_path) == ["checkpoint_failed"]


def test_a_service_that_lives_is_not_swept(tmp_path: Path) -> None:
    busy, alive = tmp_path / "node" / "busy.sock", tmp_path / "node" / "alive.sock"
    fd = address.lock(busy)
    assert fd is not None
    Notes(address.kept(busy)).add("a", stage_of(tmp_path).model_dump_json())
    address.sweep(busy.parent, alive, Notes(address.kept(alive)).take_over)
    assert len(Notes(address.kept(busy)).all()) == 1
    os.close(fd)


def test_what_a_connected_worker_has_noted_is_not_lost_nor_what_was_seen_once(tmp_path: Path) -> None:
    """Whoever is being connected is not known yet."""
    notes, connected = noted(tmp_path, stage_of(tmp_path)), [True]
    watch = LostSaves(notes, lambda stage: connected[0])
    assert watch.find(surely=True) == []
    connected[0] = False
    assert watch.find(surely=False) == []
    connected[0] = True
    assert watch.find(surely=False) == []
    connected[0] = False
    assert watch.find(surely=False) == []
    ((note, stage),) = watch.find(surely=False)
    assert (note, stage) == (notes.all()[0], stage_of(tmp_path))


def test_it_goes_on_looking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lost, "_LOOK_S", 0.01)
    notes = Notes(tmp_path / "kept")
    watch = LostSaves(notes, lambda stage: False).start()
    try:
        notes.add("a", stage_of(tmp_path).model_dump_json())
        until("it to be told", lambda: told(tmp_path))
        until("its note to be gone", lambda: not notes.all())
    finally:
        watch.close()
    assert told(tmp_path) == ["checkpoint_failed"]


def test_a_report_that_is_broken_off_is_made_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes = noted(tmp_path, stage_of(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(lost, "_tell_one", lambda stage, is_again: False)
        tell_once(notes)
        assert len(notes.all()) == 1
    tell_once(notes)
    assert told(tmp_path) == ["checkpoint_failed"]
    assert notes.all() == []


@pytest.mark.parametrize("tier", list(Tier))
def test_other_ranks_hear_of_it_by_the_store_unless_it_was_for_memory_alone(tier: Tier, tmp_path: Path) -> None:
    tell_once(noted(tmp_path, stage_of(tmp_path).model_copy(update={"tier": tier})))
    (failed,) = events_in(tmp_path / "events.jsonl")
    assert (failed["event"], failed["step"]) == ("checkpoint_failed", 10)
    assert [file.name for file in tmp_path.rglob("receipt-*")] == (
        ["receipt-000001.json"] if tier is Tier.STORE else []
    )


@pytest.mark.parametrize("is_committed", [True, False])
def test_while_the_store_is_away_it_is_not_known_what_became_of_a_save(
    is_committed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = stage_of(tmp_path)
    notes = noted(
        tmp_path, stage.model_copy(update={"attempt": stage.attempt.model_copy(update={"rank": 0})})
    )  # the coordinator's
    tries: list[int] = []

    def committed_bytes(store: ObjectStore, attempt: Attempt) -> int | None:
        tries.append(attempt.step)
        if len(tries) <= 3:
            raise Transient("nobody listens")
        return 5 if is_committed else None

    monkeypatch.setattr(receipts, "committed_bytes", committed_bytes)
    monkeypatch.setattr(lost, "_PAUSE_S_MIN", 60.0)  # not a third time, however late it is told to end
    tell_once(notes)  # the service ends meanwhile, and the next one asks
    num_before = len(tries)
    assert len(notes.all()) == 1 and 0 < num_before < 3
    monkeypatch.setattr(lost, "_PAUSE_S_MIN", 0.001)
    with contextlib.closing(LostSaves(notes, lambda stage: False).start()):
        until("it to be told", lambda: not notes.all())
    found = events_in(tmp_path / "events.jsonl")
    end = "checkpoint_committed" if is_committed else "checkpoint_failed"
    assert [event["event"] for event in found] == ["checkpoint_unknown", "checkpoint_unknown", end]
    assert "nobody listens" in found[0]["reason"]
    assert len(tries) == 4


def test_of_a_store_that_can_never_be_asked_it_is_said_once(tmp_path: Path) -> None:
    notes = noted(tmp_path, stage_of(tmp_path).model_copy(update={"url": "nonsense://x"}))
    tell_once(notes)
    assert told(tmp_path) == ["checkpoint_unknown"]
    assert notes.all() == []


@pytest.mark.parametrize("text", ["", "{}", '{"session": 1', "[]"])
def test_a_note_that_says_nothing_is_dropped(text: str, tmp_path: Path) -> None:
    notes = Notes(tmp_path / "kept")
    notes.add("a", text)
    assert not NoteOfSave(tmp_path, text).is_of_living
    tell_once(notes)
    assert notes.all() == []


def test_a_process_may_have_any_name() -> None:
    """The kernel keeps fifteen bytes of one, and cuts within a letter."""
    name = Path("/proc/self/comm")
    before, began = name.read_bytes().rstrip(b"\n"), began_at(os.getpid())
    name.write_bytes("训练 (一) 七个字".encode())
    try:
        with pytest.raises(UnicodeDecodeError):
            name.read_text("utf-8")
        assert began_at(os.getpid()) == started_ticks(os.getpid()) == began > 0
        assert is_alive(os.getpid(), began)
    finally:
        name.write_bytes(before)


@pytest.mark.parametrize("is_reused", [True, False])
def test_another_process_of_the_same_pid_is_not_the_worker(is_reused: bool, tmp_path: Path) -> None:
    began = began_at(os.getpid())
    assert began > 0
    assert is_alive(os.getpid(), began)
    assert not is_alive(os.getpid(), began - 1)
    notes = noted(tmp_path, stage_of(tmp_path, os.getpid(), began - 1 if is_reused else began))
    tell_once(notes)
    assert len(told(tmp_path)) == is_reused
    assert len(notes.all()) == (not is_reused)
