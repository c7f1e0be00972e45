"""Byte buffers laid end to end, as what is put and what is read comes in several. Pure, and no byte is copied."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

Buffer = bytes | bytearray | memoryview


def views_of(buffers: Sequence[Buffer]) -> list[memoryview]:
    """The buffers as bytes, without the empty ones. Raises TypeError for one that is not contiguous."""
    views = [memoryview(buffer).cast("B") for buffer in buffers]
    return [view for view in views if view.nbytes]


def address_of(view: memoryview) -> int:
    """Where its bytes lie in this process; 0 if it has none."""
    return int(np.frombuffer(view, np.uint8).ctypes.data) if view.nbytes else 0


def size_of(views: Sequence[memoryview]) -> int:
    """How many bytes the views have together."""
    return sum(view.nbytes for view in views)


def skip(views: Sequence[memoryview], num_bytes: int) -> list[memoryview]:
    """What is left of `views` after that many bytes."""
    index = 0
    while index < len(views) and num_bytes >= views[index].nbytes:
        num_bytes -= views[index].nbytes
        index += 1
    if num_bytes and index < len(views):
        return [views[index][num_bytes:], *views[index + 1 :]]
    return list(views[index:])


def split(views: Sequence[memoryview], num_bytes: int) -> tuple[list[memoryview], list[memoryview]]:
    """The first bytes of the views, and the rest of them."""
    head, left = [], num_bytes
    for view in views:
        if not left:
            break
        head.append(view[:left])
        left -= head[-1].nbytes
    return head, skip(views, num_bytes)


def cut(views: Sequence[memoryview], part_bytes: int) -> Iterator[list[memoryview]]:
    """The views, cut into parts of `part_bytes`; the last may be smaller."""
    rest = list(views)
    while rest:
        part: list[memoryview] = []
        left = part_bytes
        for view in rest:
            part.append(view[:left])
            left -= part[-1].nbytes
            if not left:
                break
        yield part
        rest = skip(rest, part_bytes - left)


def fill(buffers: Sequence[memoryview], data: memoryview) -> None:
    """Copy `data` into the buffers, one after the other; it is as long as all of them."""
    at = 0
    for buffer in buffers:
        buffer[:] = data[at : at + buffer.nbytes]
        at += buffer.nbytes
