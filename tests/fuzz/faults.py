"""Damage to one object of a run, or to two, chosen by a random generator. Pure."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

Objects = Mapping[str, bytes]

_NUM_BYTES_MAX = 64
_CODES = b"\x00\x01\x7f\x80\xff.()]}[{\"'0-ejrqQhNRbsuXBC\x8a\x8b\x8c\x8d\x8e\x94\x95"
"""Bytes that mean something to a reader of pickles, JSON or lengths."""


def _flip(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def _set(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([rng.choice(_CODES)]) + data[at + 1 :]


def _range(data: bytes, rng: random.Random) -> tuple[int, int]:
    start = rng.randrange(len(data))
    longest = rng.choice([1, 8, _NUM_BYTES_MAX, len(data)])
    return start, min(start + 1 + rng.randrange(longest), len(data))


def _cut_out(data: bytes, rng: random.Random) -> bytes:
    start, stop = _range(data, rng)
    return data[:start] + data[stop:]


def _cut_off(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def _insert(data: bytes, rng: random.Random) -> bytes:
    at, size = rng.randrange(len(data) + 1), 1 + rng.randrange(_NUM_BYTES_MAX)
    new = rng.choice([rng.randbytes(size), bytes(size), bytes([rng.choice(_CODES)]) * size])
    return data[:at] + new + data[at:]


def _zero(data: bytes, rng: random.Random) -> bytes:
    start, stop = _range(data, rng)
    return data[:start] + bytes(stop - start) + data[stop:]


def _repeat(data: bytes, rng: random.Random) -> bytes:
    start, stop = _range(data, rng)
    return data[:stop] + data[start:stop] * rng.choice([1, 1, 1, 30]) + data[stop:]


def _shuffle(data: bytes, rng: random.Random) -> bytes:
    size = 1 + rng.randrange(_NUM_BYTES_MAX)
    start, other = rng.randrange(len(data)), rng.randrange(len(data))
    moved = bytearray(data)
    moved[start : start + size] = data[other : other + size]
    return bytes(moved)


_OF_BYTES: dict[str, tuple[int, Callable[[bytes, random.Random], bytes]]] = {
    "flip": (6, _flip),
    "set": (4, _set),
    "cut out": (2, _cut_out),
    "cut off": (1, _cut_off),
    "insert": (2, _insert),
    "zero": (1, _zero),
    "repeat": (1, _repeat),
    "move": (1, _shuffle),
}
_SWAP, _LOSE = "swap", "lose"


def damaged(objects: Objects, rng: random.Random) -> tuple[str, dict[str, bytes]]:
    """What was done to what, and the objects afterwards. Small objects are hit as often as large ones."""
    found = dict(objects)
    names = sorted(objects)
    weights = [*(weight for weight, _ in _OF_BYTES.values()), 1, 1]
    (kind,) = rng.choices([*_OF_BYTES, _SWAP, _LOSE], weights)
    name = rng.choice(names)
    if kind == _LOSE:
        del found[name]
    elif kind == _SWAP:
        other = rng.choice(names)
        found[name], found[other] = objects[other], objects[name]
        return f"{kind} {name} with {other}", found
    else:
        found[name] = _OF_BYTES[kind][1](objects[name], rng) if objects[name] else b"x"
    return f"{kind} {name}", found
