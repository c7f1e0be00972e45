"""Ranks of one host: what one has for another, the other reads out of its memory. One copy, and no socket.

`process_vm_readv(2)` asks of a process what it takes to debug another: the same user, and no rule of the kernel
against it (a container's seccomp profile, Yama's `ptrace_scope`). So each rank tries at the start what it can read, and
all else goes through the process group. What a later read fails for is sent that way, too, and all that follows.
"""

from __future__ import annotations

import ctypes
import logging
import os
import secrets
import struct
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from storage.format.columns import Array
from storage.ranks.group import Expected, Group, Message

log = logging.getLogger(__name__)

_TOKEN_SIZE_BYTES = 16
_HEAD = struct.Struct("<qq")
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
"""The same in all containers of a host."""
_PROCESSES = Path("/proc/self/ns/pid")


class _Span(ctypes.Structure):
    """`struct iovec`."""

    _fields_ = (("address", ctypes.c_void_p), ("size_bytes", ctypes.c_size_t))


_readv = getattr(ctypes.CDLL(None, use_errno=True), "process_vm_readv", None)  # only Linux has it
if _readv is not None:
    _spans = (ctypes.POINTER(_Span), ctypes.c_ulong)
    _readv.argtypes = (ctypes.c_int, *_spans, *_spans, ctypes.c_ulong)
    _readv.restype = ctypes.c_ssize_t


def read_memory(pid: int, address: int, into: Array) -> None:
    """Fill `into` from the memory of a process, on Linux. Raises OSError."""
    assert _readv is not None
    at = 0
    while at < len(into):
        local = _Span(into.ctypes.data + at, len(into) - at)
        remote = _Span(address + at, len(into) - at)
        num_bytes = _readv(pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
        if num_bytes <= 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        at += num_bytes


class HostMemory:
    """Carries messages like `Group.swap`, those between ranks of one host by memory where the kernel lets them."""

    def __init__(self, group: Group) -> None:
        """Find out who may read whom; a collective."""
        self._group = group
        token = np.frombuffer(secrets.token_bytes(_TOKEN_SIZE_BYTES), np.uint8).copy()
        mine = _HEAD.pack(os.getpid(), token.ctypes.data) + token.tobytes() + _host().encode()
        told = group.all_gather(mine)
        host = _host().encode()
        self._pid_of: dict[int, int] = {}
        refused: dict[int, str] = {}
        for peer, data in enumerate(told):
            if peer == group.rank or not host or data[_HEAD.size + _TOKEN_SIZE_BYTES :] != host:
                continue
            pid, address = _HEAD.unpack_from(data)
            found = np.zeros(_TOKEN_SIZE_BYTES, np.uint8)
            try:
                read_memory(pid, address, found)
            except OSError as error:
                refused[peer] = str(error.strerror)
            # nobody but that rank has drawn this token
            if found.tobytes() == data[_HEAD.size : _HEAD.size + _TOKEN_SIZE_BYTES]:
                self._pid_of[peer] = pid
        if refused:
            why = ", ".join(sorted(set(refused.values())))
            log.info("the memory of ranks %s on this host cannot be read (%s); they send instead", sorted(refused), why)
        readers = group.all_gather(bytes(peer in self._pid_of for peer in range(group.world_size)))
        self._readers = {peer for peer, reads in enumerate(readers) if reads[group.rank]}

    @property
    def readable(self) -> Collection[int]:
        """The ranks whose memory this one reads."""
        return self._pid_of.keys()

    def swap(self, sends: Sequence[Message], receives: Sequence[Expected]) -> None:
        """Do what `Group.swap` does. What is sent must not change before this returns."""
        near_sends = [message for message in sends if message.peer in self._readers]
        near_receives = [entry for entry in receives if entry.peer in self._pid_of]
        addresses = _by_peer((message.peer, message.data.ctypes.data) for message in near_sends)
        counts = _by_peer((entry.peer, 0) for entry in near_receives)
        self._group.swap(
            [
                *(message for message in sends if message.peer not in self._readers),
                *(Message(peer, places.view(np.uint8)) for peer, places in addresses.items()),
            ],
            [
                *(entry for entry in receives if entry.peer not in self._pid_of),
                *(Expected(peer, places.view(np.uint8)) for peer, places in counts.items()),
            ],
        )
        # every sender waits to hear whether all was read, so that its memory stays what it is until then
        heard = {peer: np.zeros(1, np.uint8) for peer in addresses}
        is_read = {peer: self._read(peer, places, near_receives) for peer, places in counts.items()}
        self._group.swap(
            [Message(peer, np.array([done], np.uint8)) for peer, done in is_read.items()],
            [Expected(peer, answer) for peer, answer in heard.items()],
        )
        unread = {peer for peer, answer in heard.items() if not answer[0]}
        lost = {peer for peer, done in is_read.items() if not done}
        self._readers -= unread
        for peer in lost:
            del self._pid_of[peer]
        self._group.swap(
            [message for message in near_sends if message.peer in unread],
            [entry for entry in near_receives if entry.peer in lost],
        )

    def _read(self, peer: int, addresses: npt.NDArray[np.int64], receives: Sequence[Expected]) -> bool:
        wanted = (entry for entry in receives if entry.peer == peer)
        try:
            for address, entry in zip(addresses.tolist(), wanted, strict=True):
                read_memory(self._pid_of[peer], address, entry.into)
        except OSError as error:
            log.warning("the memory of rank %d cannot be read any more (%s); it sends instead", peer, error.strerror)
            return False
        return True


def _by_peer(pairs: Iterable[tuple[int, int]]) -> dict[int, npt.NDArray[np.int64]]:
    found: dict[int, list[int]] = defaultdict(list)
    for peer, number in pairs:
        found[peer].append(number)
    return {peer: np.array(numbers, np.int64) for peer, numbers in found.items()}


def _host() -> str:
    """The same for processes that know each other by the same numbers; "" where nobody can read another's memory."""
    if _readv is None:
        return ""
    try:
        return f"{BOOT_ID.read_text().strip()} {_PROCESSES.stat().st_ino}"
    except OSError:  # a sandbox that hides them
        return ""
