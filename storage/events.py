"""What a Checkpointer tells about itself: an event to its listener and a line to the log."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)

Listener = Callable[[str, dict[str, Any]], None]

_WARN = {"checkpoint_failed", "checkpoint_quarantined", "checkpoint_cleanup_failed", "checkpoint_not_newest"}


class Reporter:
    """Passes events on. A listener that fails is logged: telling about a checkpoint must not harm it."""

    def __init__(self, listener: Listener | None) -> None:
        self._listener = listener

    def __call__(self, event: str, **fields: Any) -> None:
        """Report one event; may be called from any thread."""
        text = ", ".join(f"{name} {value}" for name, value in fields.items())
        log.log(logging.WARNING if event in _WARN else logging.INFO, "%s: %s", event, text)
        if self._listener is None:
            return
        try:
            self._listener(event, fields)
        except Exception:
            log.exception("the listener of checkpoint events failed on %s", event)
