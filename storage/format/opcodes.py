"""A pickle from a stranger, made harmless before C's unpickler sees it: every step of it costs what its bytes cost.

A pickle of 300 bytes can take a second with each ten bytes more, or gigabytes: tuples of tuples that are hashed as the
key of a dict, a place in the memo that is made room for, a dict that is copied into an object again and again. So its
opcodes are found and counted first, of a million entries in tenths of a second; what no metadata has is refused, and
what remains is written anew without dicts and without `__setstate__`: a dict becomes the list of its keys and values,
and the state of an object is appended to it. Nothing is hashed, compared, copied or called by name any more.

Opcodes are as long as their first bytes say, so where one begins is known from the one before only. To find them fast
the bytes are walked in many lanes at once, each from a place that may be none; lanes soon fall into step with the
truth, and what they walked before that is thrown away.
"""

from __future__ import annotations

import bisect
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from storage.errors import Corrupt, Denied

NUM_BYTES_PER_CONTAINER = 6
"""An object, list or tuple takes 60 bytes and more of memory; of a pickle's bytes at most every sixth may make one."""
NUM_CONTAINERS_MIN = 4096
_NUM_BYTES_PER_PLACE = 2  # of the memo: a put, and what it puts
_LANE_BYTES_MIN, _LANE_BYTES_MAX = 64, 512
_NUM_LANES = 8192
_LENGTH_MAX = 512  # of an opcode that a lane believes
_PADDING = bytes(16)

# Lib/pickletools.py
_FIXED = {
    **dict.fromkeys(b"()]}.NRabesut\x81\x85\x86\x87\x88\x89\x93\x94", 1),
    **dict.fromkeys(b"Khq\x80", 2),
    **dict.fromkeys(b"M", 3),
    **dict.fromkeys(b"Jjr", 5),
    **dict.fromkeys(b"G\x95", 9),
}
_COUNTED = dict.fromkeys(b"\x8c\x8aC", 1) | dict.fromkeys(b"XB", 4)  # how many bytes say how many follow
_GLOBAL = ord("c")  # two lines
_PERSISTENT = b"PQ"
_FRAME, _PUT, _SETITEM, _STOP, _BAD = 0x95, ord("r"), ord("s"), ord("."), 0xFE
_RENAMED = {ord("}"): ord("]"), ord("u"): ord("e"), ord("b"): ord("a")}  # dict to list, set to append, build to append
_APPEND_PAIR = b"\x86a"
_CONTAINERS = b"]}\x81\x85\x86\x87t"

_BY_COUNT, _BY_LINES, _UNKNOWN = -1, -5, -9
_LENGTHS = np.full(256, _UNKNOWN, np.int64)
for _known in (_FIXED, {opcode: -width for opcode, width in _COUNTED.items()}, {_GLOBAL: _BY_LINES}):
    for _opcode, _size in _known.items():
        _LENGTHS[_opcode] = _size


class Record(list[Any]):
    """What an object becomes: a list of the one state that was given to it."""

    __slots__ = ()

    def __init__(self) -> None:
        # by REDUCE, of a list: that would be copied
        super().__init__()


def harmless(data: bytes) -> bytes:
    """The pickle with its dicts as lists of keys and values in turn, or of pairs, and its objects' states appended.

    Raises:
        Corrupt: no pickle, or one that no writer of metadata makes.
        Denied: it refers to objects outside of the file.
    """
    marks = _marks(data)
    stop = marks.find(_STOP)
    bad = marks.find(_BAD, 0, stop) if stop >= 0 else marks.find(_BAD)
    if bad >= 0:
        if data[bad] in _PERSISTENT:
            raise Denied("refused: it refers to objects outside of the file")
        raise Corrupt(f"opcode {data[bad]:#04x} at byte {bad} is none that metadata needs")
    if stop < 0:
        raise Corrupt("it ends before its end")
    size_bytes = stop + 1
    tokens = np.frombuffer(marks, np.uint8, size_bytes)
    _check_budget(data, tokens)
    cuts = np.flatnonzero((tokens == _FRAME) | (tokens == _SETITEM)).tolist()
    body = np.frombuffer(data, np.uint8, size_bytes).copy()
    for opcode, other in _RENAMED.items():
        body += (tokens == opcode).view(np.uint8) * np.uint8((other - opcode) % 256)  # a mask takes ten times as long
    joined = b"".join(_pieces(body.data, cuts))
    return b"".join((b"\x80\x04\x95", struct.pack("<Q", len(joined)), joined))


def _check_budget(data: bytes, tokens: npt.NDArray[np.uint8]) -> None:
    """Raises Corrupt."""
    num_containers = sum(int(np.count_nonzero(tokens == opcode)) for opcode in _CONTAINERS)
    if num_containers > len(tokens) // NUM_BYTES_PER_CONTAINER + NUM_CONTAINERS_MIN:
        raise Corrupt(f"{num_containers} objects in {len(tokens)} bytes")
    puts = np.flatnonzero(tokens == _PUT)
    if len(puts):
        all_bytes = np.frombuffer(data + _PADDING, np.uint8)
        place = int(_numbers(all_bytes, puts, 4).max())
        if place > len(tokens) // _NUM_BYTES_PER_PLACE:
            raise Corrupt(f"place {place} of the memo in {len(tokens)} bytes")


def _pieces(body: memoryview, cuts: list[int]) -> Iterator[bytes | memoryview]:
    """The body without its frames, whose lengths are others now, and with a pair appended where one item was set."""
    at = 0
    for cut in cuts:
        yield body[at:cut]
        if body[cut] == _FRAME:
            at = cut + 9
        else:
            yield _APPEND_PAIR
            at = cut + 1
    yield body[at:]


def _marks(data: bytes) -> bytearray:
    """For each byte 0, or the opcode that begins there; _BAD for one that is not known.

    What is behind the first STOP, or behind an unknown opcode, may be anything.
    """
    size_bytes = len(data)
    lane_bytes = min(max(int(size_bytes**0.5), _LANE_BYTES_MIN), _LANE_BYTES_MAX)
    marks = bytearray(size_bytes)
    ends_of_lanes, doubts = _walk_lanes(data, marks, lane_bytes)
    lines = _Lines(data)
    at = 0
    for lane, end_of_lane in enumerate(ends_of_lanes):
        right, stop = lane * lane_bytes, min((lane + 1) * lane_bytes, size_bytes)  # as far as all marks are right
        while at < stop:
            if marks[at]:  # from here on the lane was on the right way, until it was in doubt
                marks[right:at] = bytes(at - right)
                right = min(doubts[bisect.bisect_left(doubts, at)], stop)
                at = right if right < stop else end_of_lane
                continue
            found = []
            while at < stop and not marks[at]:
                found.append(at)
                at += _length(data, at, lines)
            marks[right : min(at, stop)] = bytes(min(at, stop) - right)
            for place in found:
                opcode = data[place]
                marks[place] = opcode if _LENGTHS[opcode] != _UNKNOWN else _BAD
            right = min(at, stop)
        marks[right:stop] = bytes(stop - right)
    return marks


def _walk_lanes(data: bytes, marks: bytearray, lane_bytes: int) -> tuple[list[int], list[int]]:
    """Mark what is met from the first byte of each lane on, to its end; where each lane's walk then stands, and all
    places where one went on although it met no likely opcode.
    """
    doubts = [np.array([len(data)])]
    found = np.frombuffer(marks, np.uint8)
    padded = np.frombuffer(data + _PADDING, np.uint8)
    lines = _Lines(data)
    starts = np.arange(0, len(data), lane_bytes)
    reached = np.minimum(starts + lane_bytes, len(data))
    for first in range(0, len(starts), _NUM_LANES):  # as many as fit into a core's cache
        group = slice(first, first + _NUM_LANES)
        at, ends, lanes = starts[group], reached[group].copy(), np.arange(first, first + len(starts[group]))
        while len(at):
            opcodes = padded.take(at)
            found[at] = opcodes
            lengths = _LENGTHS.take(opcodes)
            if lengths.min() < 0:
                _measure(padded, at, lengths, lines)
                # most likely no opcode at all: not to be believed, nor a reason to leave the lane
                doubtful = np.flatnonzero(lengths > _LENGTH_MAX)
                doubts.append(at[doubtful])
                found[at[doubtful]], lengths[doubtful] = 0, 1
            at = at + lengths
            is_over = at >= ends
            if is_over.any():
                reached[lanes[is_over]] = at[is_over]
                goes_on = ~is_over
                at, ends, lanes = at[goes_on], ends[goes_on], lanes[goes_on]
    return reached.tolist(), np.sort(np.concatenate(doubts)).tolist()


def _measure(
    padded: npt.NDArray[np.uint8], at: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], lines: _Lines
) -> None:
    """Put the lengths of opcodes that say them themselves in the place of the negative ones."""
    for width in (1, 4):
        rows = np.flatnonzero(lengths == -width)
        if len(rows):
            lengths[rows] = 1 + width + _numbers(padded, at[rows], width)
    rows = np.flatnonzero(lengths == _BY_LINES)
    if len(rows):
        lengths[rows] = lines.ends(at[rows]) - at[rows]
    lengths[lengths < 0] = _LENGTH_MAX + 1


def _numbers(padded: npt.NDArray[np.uint8], at: npt.NDArray[np.int64], width: int) -> npt.NDArray[np.int64]:
    """The numbers of `width` bytes behind the opcodes at those places."""
    numbers = np.zeros(len(at), np.int64)
    for byte in range(width):
        numbers += padded[at + (1 + byte)].astype(np.int64) << (8 * byte)
    return numbers


def _length(data: bytes, at: int, lines: _Lines) -> int:
    """Of the opcode there."""
    opcode = data[at]
    if (length := _FIXED.get(opcode)) is not None:
        return length
    if (width := _COUNTED.get(opcode)) is not None:
        return 1 + width + int.from_bytes(data[at + 1 : at + 1 + width], "little")
    return lines.end(at) - at if opcode == _GLOBAL else 1


class _Lines:
    """Where the second line ends that begins behind a place; looked for once it is asked."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._breaks: npt.NDArray[np.int64] | None = None

    def ends(self, at: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        if self._breaks is None:
            breaks = np.flatnonzero(np.frombuffer(self._data, np.uint8) == ord("\n")) + 1
            size_bytes = len(self._data)
            self._breaks = np.concatenate((breaks, (size_bytes + 1, size_bytes + 1)))
        return self._breaks[np.searchsorted(self._breaks, at, side="right") + 1]

    def end(self, at: int) -> int:
        return int(self.ends(np.array([at]))[0])
