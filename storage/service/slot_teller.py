"""A worker's side of `storage.service.guarded_slots`: which of its slots the service has been told of."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Sequence

from storage.service.channel import Channel, close_all
from storage.service.held_messages import GuardSlot, UnguardSlots

log = logging.getLogger(__name__)


class SlotTeller:
    """Of all arenas that share a connection, each under a name of its own. Thread-safe.

    What was told goes with the connection: by the next one all is told anew. Some thread may still come with the one
    before, or with none.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._told: weakref.WeakKeyDictionary[Channel, dict[str, set[int]]] = weakref.WeakKeyDictionary()

    def tell(self, channel: Channel | None, whose: str, descriptors: Sequence[int]) -> None:
        """See `storage.arena.arena.Guard`. Without a connection nothing is told: the kernel frees these slots then."""
        try:
            with self._lock:
                if channel is not None:
                    told = self._told.setdefault(channel, {}).setdefault(whose, set())
                    self._tell(channel, told, descriptors)
        except OSError as error:
            log.info("the service cannot be told of slots: %s", error)
        finally:
            close_all(descriptors)

    def _tell(self, channel: Channel, told: set[int], descriptors: Sequence[int]) -> None:
        now = {os.fstat(fd).st_ino: fd for fd in descriptors}
        if gone := told - set(now):
            told -= gone
            channel.send(UnguardSlots(inodes=tuple(sorted(gone))))
        for inode, fd in now.items():
            if inode not in told:
                told.add(inode)
                channel.send(GuardSlot(), [fd])
