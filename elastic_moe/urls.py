"""Types for configurations that programs make: a path or URL, or a path alone, as text or any path object."""

from __future__ import annotations

import os
import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Strict

# Of "file:" the short form is one: RFC 8089.
_ONE_SLASH = re.compile(r"(?!file:)([a-z][a-z0-9+.-]+):/(?!/)")


def _text(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _possible(text: str) -> str:
    if not text:
        raise ValueError("it is empty: leave it out, or give a path or URL")
    if "\0" in text:
        raise ValueError(f"{text!r} has a zero byte, which no path or URL has")
    if found := _ONE_SLASH.match(text):  # which would be a folder here, and nobody would miss what was meant
        raise ValueError(f"{text!r} has one slash: write {found[1]}:// for a URL, or ./{found[1]}:/ for a folder")
    return os.path.expanduser(text)  # no shell has seen it


def local_path(text: str) -> str:
    """`text`, if it is no URL, which the system would take for a folder of that name.

    Raises:
        ValueError: it is one.
    """
    if "://" in text:
        raise ValueError(f"{text!r} is a URL, and must be a path on this machine")
    return text


PathOrUrl = Annotated[str, BeforeValidator(_text), Strict(), AfterValidator(_possible)]
"""A field of this type is a str that may be one, and takes a `Path` too; `~` is the user's home."""
LocalPath = Annotated[PathOrUrl, AfterValidator(local_path)]
"""The same, but for URLs."""
