"""Which ranks take part in the `dcp.load` that is under way: DCP knows, and does not tell its readers."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import FrameType

import torch.distributed as dist

from storage.torch_private import ranks_of_dcp


@dataclass(frozen=True)
class Caller:
    """The ranks of a `dcp.load`; `group` is None for the default group. `alone`: it was called with `no_dist`."""

    alone: bool
    group: dist.ProcessGroup | None


def find_caller() -> Caller | None:
    """Who has called, by DCP's own object for its collectives on the stack; None where DCP has not called.

    What it hands to a reader, rank 0 of a group and a process that loads by itself, looks alike, and it comes after
    the metadata was read. A reader that takes the wrong ranks for the right ones waits for those that never come.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        for value in frame.f_locals.values():
            if (found := ranks_of_dcp(value)) is not None:
                makes_collectives, group = found
                return Caller(not makes_collectives, group)
        frame = frame.f_back
    return None
