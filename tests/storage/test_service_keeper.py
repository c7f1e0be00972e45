"""What a service's keeper has of it, and what of that outlives the keeper."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.agent import AgentEnvironment
from storage.errors import Transient
from storage.run.attempt import Attempt
from storage.saving import receipts
from storage.service import address, keeper, lost
from storage.service.keeper import KeeperSafe, State
from storage.service.messages import Stage
from storage.service.notes import FormerNote, Notes
from storage.service.processes import began_at, is_alive
from storage.stores.objects import ObjectStore
from tests.storage.service_cases import events_in
from tests.storage.test_service_messages import STAGE


class Pair:
    """Both ends: what a service tells its keeper, and what that makes of it."""

    def __init__(self, folder: Path) -> None:
        self.link, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._its = its
        self.safe = KeeperSafe(its, [], patience_s=0.01)
        self.state = State(Notes(folder))

    def heed(self) -> None:
        """Take in one message."""
        packet, fds, _, _ = socket.recv_fds(self.link, keeper._PACKET_BYTES_MAX, keeper._FDS_MAX)
        self.state.heed(packet, fds)

    def close(self) -> None:
        self.link.close()
        self._its.close()
        for kept in self.state.kept.values():
            kept.close()


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    made = Pair(tmp_path / "kept")
    yield made
    made.close()


@pytest.fixture
def fd() -> Iterator[int]:
    made = os.memfd_create("a-slot")
    os.write(made, b"a slot")
    yield made
    os.close(made)


def test_a_save_is_kept_until_it_has_ended_and_its_memory_is_not_held_any_more(pair: Pair, fd: int) -> None:
    text = STAGE.model_dump_json()
    num_fds = len(os.listdir("/proc/self/fd"))
    for first, second in (("done", "released"), ("released", "done")):
        pair.safe.keep("a", text, [fd])
        pair.heed()
        (kept,) = pair.state.kept.values()
        assert (kept.stage, os.pread(kept.fds[0], 6, 0)) == (text, b"a slot")
        pair.safe.stored("a")
        getattr(pair.safe, first)("a")
        pair.heed()
        pair.heed()
        assert (kept.is_stored, kept.is_done, kept.is_released) == (True, first == "done", first == "released")
        assert list(pair.state.kept) == ["a"]
        getattr(pair.safe, second)("a")
        pair.heed()
        assert not pair.state.kept
    assert len(os.listdir("/proc/self/fd")) == num_fds


def test_a_stage_of_any_length_is_kept(pair: Pair, fd: int) -> None:
    stage = STAGE.model_copy(update={"told": {"MESH": "x" * 1_000_000}})
    pair.safe.keep("a", stage.model_dump_json(), [fd, fd])
    pair.heed()
    assert Stage.model_validate_json(pair.state.kept["a"].stage) == stage
    (note,) = Notes(pair.state.notes._folder).former()
    assert Stage.model_validate_json(note.stage) == stage


def test_what_is_remembered_is_the_last_word(pair: Pair) -> None:
    for text in ("one", "x" * 300_000):
        pair.safe.remember("who", text)
        pair.heed()
        assert pair.state.remembered == {"who": text}


def test_a_keeper_that_does_not_read_keeps_no_save_waiting_and_hears_it_later(pair: Pair, fd: int) -> None:
    pair.safe.keep("a", STAGE.model_dump_json(), [fd])
    while not pair.safe._unsaid:
        pair.safe.stored("nothing")
    for name in ("b", "c"):
        pair.safe.keep(name, STAGE.model_dump_json(), [fd])  # as safe as the service alone
    pair.safe.released("a")
    pair.safe.done("a")
    pair.link.settimeout(60)
    pair.heed()
    pair.heed()
    assert list(pair.state.kept) == ["a"]
    while pair.state.kept:
        pair.safe.stored("nothing")  # the next word brings what was not said
        pair.heed()


@pytest.mark.parametrize("packet", [b"", b"{", b"[]", b'["keep", "a"]', b'["remember", "a"]', b'["what", "a"]'])
def test_what_a_keeper_cannot_make_anything_of_leaves_nothing_open(pair: Pair, packet: bytes) -> None:
    spare = os.dup(0)
    fds = [spare] if b"keep" not in packet and b"remember" not in packet else []
    with contextlib.suppress(ValueError):
        pair.state.heed(packet, fds)
    assert not pair.state.kept
    assert fds == [] or not os.path.exists(f"/proc/self/fd/{spare}")
    if not fds:
        os.close(spare)


def test_a_note_stays_until_it_is_told_and_is_the_former_keepers_alone(tmp_path: Path) -> None:
    first = Notes(tmp_path / "kept")
    first.add("a", "one")
    assert first.former() == []
    second = Notes(tmp_path / "kept")
    (note,) = second.former()
    assert note.stage == "one"
    second.add("a", "two")  # its worker lives, and has sent it once more
    assert [found.stage for found in second.former()] == ["one"], "until somebody has told"
    note.drop()
    assert second.former() == []
    assert [found.stage for found in Notes(tmp_path / "kept").former()] == ["two"]
    second.drop("a")
    assert list((tmp_path / "kept").iterdir()) == []


def test_notes_that_are_still_to_be_told_outlive_all_other_files_of_their_service(tmp_path: Path) -> None:
    """Of one that was killed a neighbour removes the rest, maybe before anybody has told what became of its saves."""
    dead, alive = tmp_path / "node" / "dead.sock", tmp_path / "node" / "alive.sock"
    address.listen(dead).close()
    Notes(address.kept(dead)).add("a", "one")
    (address.kept(dead) / "b.tmp").touch()
    address.sweep(dead.parent, alive)
    assert [file.name for file in dead.parent.iterdir()] == [address.kept(dead).name]
    (note,) = Notes(address.kept(dead)).former()
    assert note.stage == "one"
    note.drop()
    address.remove(dead)
    assert list(dead.parent.iterdir()) == []


def test_after_a_crash_only_what_is_not_told_yet_is_told(tmp_path: Path) -> None:
    for name in ("a", "b"):
        Notes(tmp_path).add(name, name)
    state = State(Notes(tmp_path))
    state.lost = state.notes.former()
    state.lost[0].drop()
    state.crashed()
    assert len(state.lost) == 1


def lost_stage(tmp_path: Path, pid: int, began: int) -> Stage:
    told = {AgentEnvironment.variable("events"): str(tmp_path / "events.jsonl")}
    return STAGE.model_copy(update={"pid": pid, "pid_began": began, "url": str(tmp_path / "run"), "told": told})


def note_of(tmp_path: Path, stage: str) -> FormerNote:
    notes = Notes(tmp_path / "kept")
    notes.add("a", stage)
    (note,) = Notes(tmp_path / "kept").former()
    return note


def test_a_report_that_is_broken_off_is_made_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note = note_of(tmp_path, lost_stage(tmp_path, os.getpid(), 1).model_dump_json())

    def die(stage: Stage, *, is_again: bool) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(lost, "_tell_one", die)
        with pytest.raises(KeyboardInterrupt):
            lost.tell_lost([note], threading.Event())
    lost.tell_lost(Notes(tmp_path / "kept").former(), threading.Event())
    assert [event["event"] for event in events_in(tmp_path / "events.jsonl")] == ["checkpoint_failed"]
    assert Notes(tmp_path / "kept").former() == []


@pytest.mark.parametrize("text", ["", "{}", '{"session": 1', "[]"])
def test_a_note_that_says_nothing_is_dropped(text: str, tmp_path: Path) -> None:
    lost.tell_lost([note_of(tmp_path, text)], threading.Event())
    assert Notes(tmp_path / "kept").former() == []


@pytest.mark.parametrize("is_reused", [True, False])
def test_another_process_of_the_same_pid_is_not_the_worker(is_reused: bool, tmp_path: Path) -> None:
    began = began_at(os.getpid())
    assert began > 0
    stage = lost_stage(tmp_path, os.getpid(), began - 1 if is_reused else began)
    assert is_alive(os.getpid(), began)
    assert not is_alive(os.getpid(), began - 1)
    lost.tell_lost([note_of(tmp_path, stage.model_dump_json())], threading.Event())
    assert len(events_in(tmp_path / "events.jsonl")) == is_reused


@pytest.mark.parametrize("is_committed", [True, False])
def test_while_the_store_is_away_it_is_not_known_what_became_of_a_save(
    is_committed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = lost_stage(tmp_path, os.getpid(), 1)
    coordinators = stage.model_copy(update={"attempt": stage.attempt.model_copy(update={"rank": 0})})
    note = note_of(tmp_path, coordinators.model_dump_json())
    stop, tries = threading.Event(), list[int]()

    def committed_bytes(store: ObjectStore, attempt: Attempt) -> int | None:
        tries.append(attempt.step)
        if len(tries) == 1:
            stop.set()  # the service ends meanwhile, and the next one asks
        if len(tries) <= 3:
            raise Transient("nobody listens")
        return 5 if is_committed else None

    monkeypatch.setattr(receipts, "committed_bytes", committed_bytes)
    monkeypatch.setattr(lost, "_PAUSE_S_MIN", 0.001)
    lost.tell_lost([note], stop)
    assert Notes(tmp_path / "kept").former() == [note]
    lost.tell_lost([note], threading.Event())
    told = events_in(tmp_path / "events.jsonl")
    end = "checkpoint_committed" if is_committed else "checkpoint_failed"
    assert [event["event"] for event in told] == ["checkpoint_unknown", "checkpoint_unknown", end]
    assert "nobody listens" in told[0]["reason"]
    assert (len(tries), Notes(tmp_path / "kept").former()) == (4, [])


def test_of_a_store_that_can_never_be_asked_it_is_said_once(tmp_path: Path) -> None:
    stage = lost_stage(tmp_path, os.getpid(), 1).model_copy(update={"url": "nonsense://x"})
    lost.tell_lost([note_of(tmp_path, stage.model_dump_json())], threading.Event())
    assert [event["event"] for event in events_in(tmp_path / "events.jsonl")] == ["checkpoint_unknown"]
    assert Notes(tmp_path / "kept").former() == []
