"""Checkpoints: bytes with names, committed whole or not at all.

For training    Checkpointer saves and restores a state, for a job (JobIdentity), as owner or as reader of a run
                (Access), as its SavingOptions say: how often (Every, which parse_every reads), what to do about a
                Backlog, and when a save returns (Staging); PerRank marks what each rank has of its own; CheckpointEvent
                names what a Listener hears; ShardReader and ShardWriter are the same format and checks under
                `dcp.load` and `dcp.save`; an AgreeingGroup is ranks that succeed or fail together; a
                CheckpointService is what an agent has for them.
Stores          open_store opens the ObjectStore behind a URL, with_options puts options into one, is_of_this_process
                tells whether what is put there goes with it; register_scheme adds stores of your own, and a
                StoreWrapper is one around another.
Looking         without torch: locate opens a run; summaries, details and verify look at its checkpoints; find_garbage
                finds what dead jobs have left, and remove_garbage removes it.
Memory          HugePages are asked for where they cost no more than small ones.

Names are imported when they are first used, and torch only by those that need it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from storage import errors
from storage.errors import *  # noqa: F403 - the tree, by its own __all__

if TYPE_CHECKING:
    from storage.arena.mapping import HugePages
    from storage.arena.staging import Staging
    from storage.checkpointer import Checkpointer
    from storage.dcp import ShardReader, ShardWriter
    from storage.events import CheckpointEvent, Listener
    from storage.inspection import (
        CheckpointState,
        Details,
        Location,
        Summary,
        Verification,
        checkpoints,
        details,
        locate,
        summaries,
        verify,
    )
    from storage.options import Access
    from storage.pace.rules import Backlog, Every, parse_every
    from storage.ranks.agreement import AgreeingGroup
    from storage.run.garbage import AGE_S_MIN as GARBAGE_AGE_S_MIN
    from storage.run.garbage import Garbage
    from storage.run.garbage import find as find_garbage
    from storage.run.garbage import remove as remove_garbage
    from storage.run.job import JobIdentity
    from storage.saving.options import SavingOptions
    from storage.service.sidecar import CheckpointService
    from storage.state.per_rank import PerRank
    from storage.stores.buffers import Buffer
    from storage.stores.objects import Capability, Fetch, ObjectInfo, ObjectStore, Upload
    from storage.stores.registry import Opener, is_of_this_process, open_store, register_scheme, with_options
    from storage.stores.retry_policy import RetryCounts, RetryLog
    from storage.stores.wrapper import StoreWrapper

__all__ = ["Access", "AgreeingGroup", "Checkpointer", "JobIdentity", "PerRank", "ShardReader", "ShardWriter"]
__all__ += [
    "Backlog",
    "CheckpointEvent",
    "CheckpointService",
    "Every",
    "Listener",
    "SavingOptions",
    "Staging",
    "parse_every",
]
__all__ += ["Buffer", "Capability", "Fetch", "ObjectInfo", "ObjectStore", "RetryCounts", "RetryLog", "StoreWrapper"]
__all__ += ["Opener", "Upload", "is_of_this_process", "open_store", "register_scheme", "with_options"]
__all__ += [
    "CheckpointState",
    "Details",
    "Location",
    "Summary",
    "Verification",
    "checkpoints",
    "details",
    "locate",
    "summaries",
    "verify",
]
__all__ += ["GARBAGE_AGE_S_MIN", "Garbage", "HugePages", "find_garbage", "remove_garbage"]
__all__ += errors.__all__

_ROOMS = {
    "storage.arena.mapping": "HugePages",
    "storage.arena.staging": "Staging",
    "storage.checkpointer": "Checkpointer",
    "storage.dcp": "ShardReader ShardWriter",
    "storage.events": "CheckpointEvent Listener",
    "storage.inspection": "CheckpointState Details Location Summary Verification checkpoints details locate summaries"
    " verify",
    "storage.options": "Access",
    "storage.pace.rules": "Backlog Every parse_every",
    "storage.ranks.agreement": "AgreeingGroup",
    "storage.run.job": "JobIdentity",
    "storage.saving.options": "SavingOptions",
    "storage.run.garbage": "GARBAGE_AGE_S_MIN=AGE_S_MIN Garbage find_garbage=find remove_garbage=remove",
    "storage.service.sidecar": "CheckpointService",
    "storage.state.per_rank": "PerRank",
    "storage.stores.buffers": "Buffer",
    "storage.stores.objects": "Capability Fetch ObjectInfo ObjectStore Upload",
    "storage.stores.registry": "Opener is_of_this_process open_store register_scheme with_options",
    "storage.stores.retry_policy": "RetryCounts RetryLog",
    "storage.stores.wrapper": "StoreWrapper",
}
_PLACES = {
    name: (room, original or name)
    for room, names in _ROOMS.items()
    for name, _, original in (text.partition("=") for text in names.split())
}
"""By public name: the room that has it, and what it is called there."""

__doc__ = f"{__doc__}\n{errors.__doc__}"


if not TYPE_CHECKING:  # a type checker would believe in any name

    def __getattr__(name: str) -> Any:
        if name not in _PLACES:
            raise AttributeError(f"module 'storage' has no attribute {name!r}")
        room, original = _PLACES[name]
        value = globals()[name] = getattr(importlib.import_module(room), original)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
