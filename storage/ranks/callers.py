"""Who has called: the ranks of the `dcp.load` under way, which DCP does not tell its readers, or a process of DCP."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import FrameType

import torch.distributed as dist

from storage.torch_private import ASYNC_SAVE_PROCESS, ranks_of_dcp


@dataclass(frozen=True)
class Caller:
    """The ranks of a `dcp.load`; `group` is None for the default group. `alone`: it was called with `no_dist`."""

    alone: bool
    group: dist.ProcessGroup | None


def find_caller() -> Caller | None:
    """Look on the stack for DCP's own object for its collectives; None where DCP has not called.

    What DCP hands to a reader looks alike for rank 0 of a group and for a process that loads by itself, and it comes
    after the metadata was read. A reader that takes the wrong ranks for the right ones waits for some that never come.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        for value in frame.f_locals.values():
            if (found := ranks_of_dcp(value)) is not None:
                makes_collectives, group = found
                return Caller(not makes_collectives, group)
        frame = frame.f_back
    return None


def is_in_process_of_dcp() -> bool:
    """Whether this is the process in which `dcp.async_save` saves with `AsyncCheckpointerType.PROCESS`."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == ASYNC_SAVE_PROCESS:
            return True
        frame = frame.f_back
    return False
