"""Ranks of one host that tell each other a few bytes by sockets of their own, and those that cannot."""

from __future__ import annotations

import os
import signal
import socket
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from storage.ranks import group as group_module
from storage.ranks import nearby
from storage.ranks.group import SHORT_BYTES, Group
from storage.ranks.nearby import Doorway, Nearby, PeerGone
from tests.ranks import Ranks

LENGTHS = ((0, 0, 0), (5, 0, 9), (SHORT_BYTES, SHORT_BYTES, 1), (SHORT_BYTES + 1, 3, 0), (999, 1000, 5000))


def connected() -> tuple[Group, int]:
    """A group, and how many sockets this rank has for it."""
    group = Group()
    group.connect_nearby()
    found = group._nearby
    return group, 0 if found is None else len(found._peers)


def gathers() -> tuple[int, list[bool], int]:
    found, calls = [], list[int]()
    with pytest.MonkeyPatch.context() as patch:
        group, num_peers = connected()
        all_gather = dist.all_gather

        def counted(*args: Any, **options: Any) -> Any:
            calls.append(1)
            return all_gather(*args, **options)

        patch.setattr(dist, "all_gather", counted)
        for of_rank in LENGTHS:
            whole = [bytes([65 + rank]) * length for rank, length in enumerate(of_rank)]
            found.append(group.all_gather(whole[group.rank]) == whole)
    group.close()
    found.append(group.all_gather(b"x") == [b"x"] * 3)
    return num_peers, found, len(calls)


def test_what_is_gathered_arrives_whole_and_short_ones_ask_torch_for_nothing(ranks: Ranks) -> None:
    for num_peers, found, num_calls in ranks.run(gathers, world_size=3):
        assert num_peers == 2
        assert all(found)
        assert num_calls == 2, "the rest of those that are long"


def test_a_rank_that_is_killed_while_it_makes_its_sockets_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with Doorway() as first, Doorway() as second:
        addresses = [first.address, second.address]
        assert all(addresses)
        assert second.call(1, addresses)
        assert first.answer(0, 2)
        assert not os.listdir(tmp_path), "whatever is there at any moment stays after a SIGKILL"
        for door in (first, second):
            for peer in door.take().values():
                peer.close()


@pytest.mark.parametrize("listens", [False, True])
def test_another_user_who_knows_the_name_is_no_rank(monkeypatch: pytest.MonkeyPatch, listens: bool) -> None:
    of_this_user, asked = nearby._is_of_this_user, list[int]()

    def first_is_another(peer: socket.socket) -> bool:
        asked.append(1)
        return of_this_user(peer) and len(asked) > 1

    with Doorway() as first, Doorway() as second, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
        addresses = [first.address, second.address]
        if listens:
            mine = os.geteuid()
            monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
            assert not second.call(1, addresses)
            return
        stranger.connect(b"\0" + first.address.encode())
        assert second.call(1, addresses)
        monkeypatch.setattr(nearby, "_is_of_this_user", first_is_another)
        assert first.answer(0, 2), "whoever is sent away keeps no rank out"
        assert stranger.recv(1) == b""
        assert len(asked) == 2


def apart(kind: str) -> tuple[int, bool, bool]:
    """One rank is on another host, sees other files, can have no socket, or cannot tell its time-out."""
    is_odd, said = dist.get_rank() == 1, list[str]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(group_module.log, "info", said.append)
        if kind == "host" and is_odd:
            patch.setattr(group_module, "host", lambda: "another")
        if kind == "files" and is_odd:
            patch.setattr(nearby.Doorway, "call", lambda *_: False)
        if kind == "stranger" and is_odd:
            patch.setattr(nearby.Doorway, "call", lambda self, rank, addresses: nearby_call(self, 7, addresses))
        if kind == "name" and is_odd:
            patch.setattr(nearby, "_abstract", lambda name: b"/nowhere/rank")
        if kind == "backend":
            patch.setattr(group_module, "timeout_s_of", lambda *_: None)
        group, num_peers = connected()
    return num_peers, group.all_gather(b"x" * (1 + group.rank)) == [b"x", b"xx"], bool(said)


nearby_call = nearby.Doorway.call


@pytest.mark.parametrize("kind", ["host", "files", "stranger", "name", "backend"])
def test_where_one_cannot_be_reached_all_stay_with_torch(ranks: Ranks, kind: str) -> None:
    is_told = kind in ("files", "stranger", "name")  # the others are as they have to be
    assert ranks.run(apart, kind, world_size=2) == [(0, True, is_told)] * 2


def loses() -> str:
    group, _ = connected()
    if group.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        group.all_gather(b"x")
    except PeerGone as error:
        return str(error)
    return ""


def test_a_rank_that_is_killed_is_an_error_for_the_others(ranks: Ranks) -> None:
    assert ranks.run_losing([1], loses, world_size=2)[0].startswith("rank 1 ")


def interrupted() -> tuple[list[bytes], list[bytes]]:
    """One rank does not meet the other in a round that both have begun."""
    group, _ = connected()
    meet = group.begin_all_gather(b"first" + bytes([65 + group.rank]))
    first = meet() if group.rank == 0 else []
    return first, group.all_gather(b"second" + bytes([65 + group.rank]))


def test_a_round_that_was_not_ended_leaves_nothing_for_the_next(ranks: Ranks) -> None:
    (first, second), (_, other) = ranks.run(interrupted, world_size=2)
    assert first == [b"firstA", b"firstB"]
    assert second == other == [b"secondA", b"secondB"]


def test_one_that_does_not_come_is_waited_for_no_longer_than_torch_would() -> None:
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        group = Nearby(0, {1: mine}, 0.05)
        meet = group.begin(b"x")
        with pytest.raises(PeerGone, match="rank 1 does not answer"):
            meet()
    group.close()


def test_one_that_has_ended_in_order_is_an_error_too() -> None:
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    group = Nearby(0, {1: mine}, 60.0)
    meet = group.begin(b"x")
    assert theirs.recv(100).endswith(b"x")
    theirs.close()
    with pytest.raises(PeerGone, match="rank 1 has closed its connection"):
        meet()
    group.close()
