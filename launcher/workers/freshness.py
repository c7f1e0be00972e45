"""Tells whether the files from which this process has imported are still what they were.

A package that is installed anew, or a clone that is edited, between two starts of the workers: a fork would run what
was there before.
"""

from __future__ import annotations

import os
import sys

from launcher.workers import paths

_LARGE = ("torch", "sympy", "numpy")
"""Looked at by their version alone: a thousand files each, which only an installation changes."""


def files_of_packages() -> dict[str, str]:
    """Find the file of each top-level module that is imported and is a file; our own packages' are always there."""
    found = {name: os.path.join(paths.HOME, name, "__init__.py") for name in paths.OWN_PACKAGES}
    for name, module in list(sys.modules.items()):
        if "." not in name and name != "__main__" and (file := _file_of(module)):
            found[name] = file
    return found


class ImportedFiles:
    """The files of what is imported, those of the standard library left out."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[str, tuple[int, int] | None]] = {}

    def note(self) -> None:
        """Note the files of what has been imported since the last call."""
        for name, module in list(sys.modules.items()):
            package, _, rest = name.partition(".")
            if name in self._seen or package in sys.stdlib_module_names:
                continue
            if package in _LARGE and rest not in ("", "version"):
                continue
            if file := _file_of(module):
                self._seen[name] = (file, _stamp(file))

    def changed(self) -> str:
        """Name in words a file that is not what it was when it was noted, "" if there is none."""
        for name, (file, before) in self._seen.items():
            if _stamp(file) != before:
                return f"{name} ({file}) has changed since it was imported ahead"
        return ""


def _file_of(module: object) -> str:
    spec = getattr(module, "__spec__", None)
    origin = getattr(spec, "origin", None)
    return origin if getattr(spec, "has_location", False) and isinstance(origin, str) else ""


def _stamp(file: str) -> tuple[int, int] | None:
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size
