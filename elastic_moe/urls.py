"""Types for configurations that programs make: a path or URL, or a path alone, as text or any path object."""

from __future__ import annotations

import os
import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Strict

from launcher import hide_secrets

# Of "file:" the short form is one: RFC 8089.
_ONE_SLASH = re.compile(r"(?!file:)([a-z][a-z0-9+.-]+):/(?!/)")
_FILE = re.compile(r"file://([^/]*)")
_WITH_PASSWORD = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://[^/\s:@\[]*:(?:[^/\s]+|(?!:|\d+/)[^\s]+)@")


def _text(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _possible(text: str) -> str:
    if not text:
        raise ValueError("it is empty: leave it out, or give a path or URL")
    if "\0" in text:
        raise ValueError(f"{text!r} has a zero byte, which no path or URL has")
    if found := _ONE_SLASH.match(text):  # which would be a folder here, and nobody would miss what was meant
        raise ValueError(f"{text!r} has one slash: write {found[1]}:// for a URL, or ./{found[1]}:/ for a folder")
    if found := _WITH_PASSWORD.search(text):
        raise ValueError(
            f"{hide_secrets(text)!r} has a password, which would be read in logs and by whoever sees the job: take it "
            f"out, and give it by {_variable(found[1])} in the environment"
        )
    if found := _FILE.match(text):  # of which fsspec would make a path that begins here
        if found[1] not in ("", "localhost"):
            raise ValueError(f"{text!r} must be file:///absolute/path")
        return f"file://{text[found.end(1) :]}"
    return os.path.expanduser(text)  # no shell has seen it


def _variable(scheme: str) -> str:
    """By which a store's library takes a password; of the web, a header that holds one."""
    protocol = scheme.lower().rpartition("+")[2]
    if protocol in ("s3", "s3a"):
        return "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    return f"FSSPEC_{protocol.upper()}" + ("" if protocol in ("http", "https") else "_PASSWORD")


def local_path(text: str) -> str:
    """`text`, if it is no URL, which the system would take for a folder of that name.

    Raises:
        ValueError: it is one.
    """
    if "://" in text:
        raise ValueError(f"{hide_secrets(text)!r} is a URL, and must be a path on this machine")
    return text


PathOrUrl = Annotated[str, BeforeValidator(_text), Strict(), AfterValidator(_possible)]
"""A field of this type is a str that may be one, and takes a `Path` too; `~` is the user's home."""
LocalPath = Annotated[PathOrUrl, AfterValidator(local_path)]
"""The same, but for URLs."""
