"""Closes what a script has left open when its interpreter ends."""

from __future__ import annotations

import logging
import os
import sys
import weakref
from collections.abc import Callable
from typing import Any

from storage.errors import UsageError
from storage.parallel import before_pools_close

log = logging.getLogger(__name__)

_open: weakref.WeakKeyDictionary[Any, tuple[int, Callable[..., object]]] = weakref.WeakKeyDictionary()


def register(opened: object, close: Callable[..., object]) -> None:
    """Have `close(opened, abandon=...)` called at this process's end, if somebody still has it then."""
    _open[opened] = os.getpid(), close


def is_own(opened: object) -> bool:
    """Whether this process has registered it, and not the one that it was forked from."""
    return _open[opened][0] == os.getpid()


def check_own(opened: object, name: str) -> None:
    """Raise UsageError in a fork of the process that has registered it."""
    if not is_own(opened):
        raise UsageError(
            f"{name} was opened by process {_open[opened][0]}, and process {os.getpid()} is a fork of it; use it there,"
            " or open another one here"
        )


def _close_all() -> None:
    """Close what a script has left open. One that an exception has ended waits for no other rank.

    Forks that `multiprocessing` makes, such as the workers of a data loader, come here as well when they end.
    """
    for opened, (_, close) in list(_open.items()):
        if not is_own(opened):
            continue
        try:
            close(opened, abandon=getattr(sys, "last_value", None) is not None)
        except Exception:
            log.exception("a %s that was left open cannot be closed", type(opened).__name__)


before_pools_close(_close_all)
