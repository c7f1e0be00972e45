"""Ranks of one host that tell each other a few bytes without torch: by a socket for each pair, that they made together.

A collective of gloo goes through two threads of its own on each side, and each of them waits for a processor that the
training has. What is sent here lies ready for the other rank, and wakes it alone.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import struct
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

NUM_RANKS_MAX = 8
"""More are told by torch: each has a socket for each other one."""
_ANSWER_S = 30.0
_NUMBER = struct.Struct("<Q")  # of the round, or of the rank that connects
_CREDENTIALS = struct.Struct("3i")  # of a process, as the kernel tells them: its id, its user's and its group's
_SIZE_BYTES_MAX = 4096


class PeerGone(RuntimeError):
    """A rank has ended, or does not answer: as a collective of torch's raises a RuntimeError."""


class Nearby:
    """Sockets to the other ranks of a group. For one thread.

    Args:
        rank: this process's.
        peers: the sockets, by rank.
        timeout_s: for so long a rank is waited for that does not come.
    """

    def __init__(self, rank: int, peers: dict[int, socket.socket], timeout_s: float) -> None:
        self._rank = rank
        self._peers = peers
        self._num_rounds = 0
        for peer in peers.values():
            peer.settimeout(timeout_s)

    def begin(self, data: bytes) -> Callable[[], list[bytes]]:
        """Send `data`, of a few hundred bytes, to all; what is returned waits for theirs: every rank's, by rank.

        Raises PeerGone, and so does what is returned.
        """
        self._num_rounds += 1
        number = self._num_rounds
        for rank, peer in self._peers.items():
            try:
                peer.send(_NUMBER.pack(number) + data)
            except OSError as error:
                raise PeerGone(f"rank {rank} cannot be told: {error}") from error

        def meet() -> list[bytes]:
            told = {rank: self._receive(rank, peer, number) for rank, peer in self._peers.items()}
            told[self._rank] = data
            return [told[rank] for rank in sorted(told)]

        return meet

    def close(self) -> None:
        """Let go of all sockets; closing twice is harmless."""
        for peer in self._peers.values():
            peer.close()

    def _receive(self, rank: int, peer: socket.socket, number: int) -> bytes:
        while True:
            try:
                received = peer.recv(_SIZE_BYTES_MAX)
            except OSError as error:  # a timeout is one
                raise PeerGone(f"rank {rank} does not answer: {error}") from error
            if not received:
                raise PeerGone(f"rank {rank} has closed its connection")
            (found,) = _NUMBER.unpack_from(received)
            if found == number:
                return received[_NUMBER.size :]
            if found > number:
                raise PeerGone(f"rank {rank} is at its message {found}, and this one at {number}")
            # of a round that this rank began, and whose end an exception has kept it from


class Doorway:
    """A rank's own listening socket, which goes with the block, and with the process however that ends.

    It has a name and no file (unix(7): an abstract address), so any process of this network may call: whoever is not of
    this user is sent away. `address` is what the other ranks have to know: "" where there can be none. First all
    `call`, then all `answer`.
    """

    def __init__(self) -> None:
        self.address = ""
        self._listener: socket.socket | None = None
        self._peers: dict[int, socket.socket] = {}

    def __enter__(self) -> Self:
        name = f"elastic-moe-{secrets.token_hex(16)}"
        with contextlib.suppress(OSError), contextlib.ExitStack() as on_failure:
            listener = on_failure.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            listener.bind(_abstract(name))
            listener.listen(NUM_RANKS_MAX)
            on_failure.pop_all()
            self._listener, self.address = listener, name
        return self

    def __exit__(self, *exc: object) -> None:
        if self._listener is not None:
            self._listener.close()
        for peer in self._peers.values():
            peer.close()

    def call(self, rank: int, addresses: Sequence[str]) -> bool:
        """Connect to the ranks before this one, which need not answer yet; whether all could be reached from here."""
        with contextlib.suppress(OSError):
            for other, address in enumerate(addresses[:rank]):
                peer = self._peers[other] = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                peer.settimeout(_ANSWER_S)
                peer.connect(_abstract(address))
                if not _is_of_this_user(peer):
                    return False
                peer.send(_NUMBER.pack(rank))
            return True
        return False

    def answer(self, rank: int, num_ranks: int) -> bool:
        """Let the ranks behind this one in, which have all called; whether it is they."""
        ends_s = time.monotonic() + _ANSWER_S
        with contextlib.suppress(OSError, struct.error):
            while self._listener is not None and len(self._peers) < num_ranks - 1:
                self._listener.settimeout(max(ends_s - time.monotonic(), 0.001))
                peer, _ = self._listener.accept()
                if not _is_of_this_user(peer):
                    peer.close()
                    continue
                peer.settimeout(_ANSWER_S)
                (other,) = _NUMBER.unpack(peer.recv(_NUMBER.size))
                if not rank < other < num_ranks or other in self._peers:
                    peer.close()
                    return False
                self._peers[other] = peer
            return self._listener is not None
        return False

    def take(self) -> dict[int, socket.socket]:
        """The sockets to all other ranks, which are the caller's from here on."""
        peers, self._peers = self._peers, {}
        return peers


def _abstract(name: str) -> bytes:
    return b"\0" + name.encode()


def _is_of_this_user(peer: socket.socket) -> bool:
    """Whether a process of this user has called, or has listened for the call."""
    _, user, _ = _CREDENTIALS.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return bool(user == os.geteuid())


def host() -> str:
    """What ranks of one host have alike, and those of others do not."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return os.uname().nodename
