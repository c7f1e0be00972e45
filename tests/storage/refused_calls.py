"""System calls that a file system does not have."""

from __future__ import annotations

import os
from collections.abc import Callable


def refuse(number: int) -> Callable[..., None]:
    """A system call that the file system does not have."""

    def call(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number))

    return call
