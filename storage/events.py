"""What a Checkpointer tells about itself: an event to its listener and a line to the log."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

from storage.stores.objects import ObjectStore

log = logging.getLogger(__name__)

Listener = Callable[[str, dict[str, Any]], None]

_WARN = {
    "checkpoint_failed",
    "checkpoint_quarantined",
    "checkpoint_damaged",
    "checkpoint_cleanup_failed",
    "checkpoint_not_newest",
    "checkpoint_passed_over",
    "checkpoint_retried",
    "checkpoint_unconditional",
    "checkpoint_taken_over",
    "checkpoint_fenced",
    "checkpoint_cast",
}


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

    @contextlib.contextmanager
    def retries(self, store: ObjectStore, during: str, **fields: Any) -> Iterator[None]:
        """Report `checkpoint_retried` afterwards, if the store needed further tries meanwhile."""
        before = store.retries.snapshot()
        try:
            yield
        finally:
            new = store.retries.snapshot().since(before)
            if new.num_by_cause:
                waited_s = round(new.waited_s, 3)
                self("checkpoint_retried", during=during, retries=dict(new.num_by_cause), waited_s=waited_s, **fields)
