"""When a save returns. No torch."""

from __future__ import annotations

import enum


class Staging(enum.StrEnum):
    """When `save` returns."""

    SYNC = "sync"
    """Once the state is copied: all of it may change then."""
    OVERLAPPED = "overlapped"
    """Once all is copied but what optimizers own that have stepped: parameters, and the optimizers' state. These are
    copied beside the forward and backward passes that follow, and must not change before the next step of an optimizer,
    which waits for the copy by itself. A change before that fails the save, and the next ones are SYNC.
    """
