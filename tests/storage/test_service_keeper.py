"""What a service's keeper has of it."""

from __future__ import annotations

import contextlib
import os
import select
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.service import keeper
from storage.service.keeper import KeeperSafe, State
from storage.service.messages import Stage
from storage.service.notes import Notes
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

    def heed_all(self) -> None:
        """Take in all that was said."""
        while select.select([self.link], [], [], 0)[0]:
            self.heed()

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
