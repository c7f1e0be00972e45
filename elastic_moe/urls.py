"""A type for configurations that programs make: a path or URL as text, or any path object."""

from __future__ import annotations

import os
from typing import Annotated, Any

from pydantic import BeforeValidator, Strict


def _text(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


PathOrUrl = Annotated[str, BeforeValidator(_text), Strict()]
"""A field of this type is a str, and takes a `Path` too."""
