"""Parts in memory that are in no lane, and outlive a crash of the service: copies for other nodes, and live states.

The keeper has their descriptors, and a text that says what they are.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from storage.arena.slot import Slot
from storage.errors import StorageError
from storage.held.inventory import HeldPart, Memory
from storage.held.own_memory import descriptors_of, objects_from
from storage.held.papers import PartPapers, dump_papers, load_papers
from storage.service.channel import close_all
from storage.service.keeper import PART

log = logging.getLogger(__name__)


class MemoryKeeper(Protocol):
    """Who keeps descriptors and texts, should this process die: see `storage.service.keeper.KeeperSafe`."""

    def keep(self, name: str, text: str, fds: Sequence[int]) -> None:
        """Keep copies of the descriptors."""

    def released(self, name: str) -> None:
        """They are needed no more."""

    def done(self, name: str) -> None:
        """Nothing is to be done about them."""

    def remember(self, name: str, text: str) -> None:
        """Have a process after this one know that."""


class NoKeeper:
    """Where nothing is to outlive this process."""

    def keep(self, name: str, text: str, fds: Sequence[int]) -> None:
        """See `MemoryKeeper.keep`."""

    def released(self, name: str) -> None:
        """See `MemoryKeeper.released`."""

    def done(self, name: str) -> None:
        """See `MemoryKeeper.done`."""

    def remember(self, name: str, text: str) -> None:
        """See `MemoryKeeper.remember`."""


def is_guest(name: str) -> bool:
    """Whether the keeper has a part by that name, and no save."""
    return name.startswith(PART)


def keep(keeper: MemoryKeeper, part: HeldPart) -> HeldPart:
    """The part, kept by the keeper for as long as it is held; where that cannot be, it goes with this process."""
    if isinstance(keeper, NoKeeper):
        return part
    name = PART + secrets.token_hex(8)
    try:
        fds = descriptors_of(part)
    except (OSError, ValueError) as error:
        log.warning("step %d would not outlive a crash: %s", part.label.step, error)
        return part
    try:
        keeper.keep(name, json.dumps({"of_node": part.of_node, "papers": dump_papers(part.papers).decode()}), fds)
    finally:
        close_all(fds)
    keeper.done(name)
    return _held(keeper, name, part)


def taken_up(
    keeper: MemoryKeeper, kept: Mapping[str, tuple[str, list[int]]], lost: Callable[[str], object]
) -> list[HeldPart]:
    """The parts that a process before this one held: by name, the text and the descriptors, which are theirs.

    `lost` hears of those that cannot be read.
    """
    found = []
    for name, (text, fds) in kept.items():
        keeper.done(name)  # that process may have crashed before it said so, and what is not done is kept for ever
        try:
            of_node, papers = _read(text, fds)
            objects, memories = objects_from(fds, Slot.from_fd)
        except (StorageError, ValueError, OSError) as error:
            lost(f"a part of a state that it held is lost: {error}")
            keeper.released(name)
            continue

        def release(memories: Sequence[Memory] = memories) -> None:
            for memory in memories:
                memory.close()

        found.append(_held(keeper, name, HeldPart(papers, objects, of_node, memories, release)))
    return found


def _read(text: str, fds: Sequence[int]) -> tuple[str, PartPapers]:
    """Whose a part is, and its papers. Raises Corrupt, ValueError; the descriptors are closed then."""
    try:
        told = json.loads(text)
        return str(told["of_node"]), load_papers(told["papers"].encode(), "the papers of what was held before")
    except BaseException:
        close_all(fds)
        raise


def _held(keeper: MemoryKeeper, name: str, part: HeldPart) -> HeldPart:
    def release() -> None:
        keeper.released(name)
        part.release()

    return replace(part, release=release)
