"""A type for configurations that programs make: a path or URL as text, or any path object."""

from __future__ import annotations

import os
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Strict


def _text(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _possible(text: str) -> str:
    if not text:
        raise ValueError("it is empty: leave it out, or give a path or URL")
    if "\0" in text:
        raise ValueError(f"{text!r} has a zero byte, which no path or URL has")
    return os.path.expanduser(text)  # no shell has seen it


PathOrUrl = Annotated[str, BeforeValidator(_text), Strict(), AfterValidator(_possible)]
"""A field of this type is a str that may be one, and takes a `Path` too; `~` is the user's home."""
