"""Closes what a script has left open when its interpreter ends."""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Callable
from typing import Any

from storage.parallel import before_pools_close

log = logging.getLogger(__name__)

_open: weakref.WeakKeyDictionary[Any, Callable[..., object]] = weakref.WeakKeyDictionary()


def register(opened: object, close: Callable[..., object]) -> None:
    """Have `close(opened, abandon=...)` called at the interpreter's end, if somebody still has it then."""
    _open[opened] = close


def _close_all() -> None:
    """Close what a script has left open. One that an exception has ended waits for no other rank."""
    for opened, close in list(_open.items()):
        try:
            close(opened, abandon=getattr(sys, "last_value", None) is not None)
        except Exception:
            log.exception("a %s that was left open cannot be closed", type(opened).__name__)


before_pools_close(_close_all)
