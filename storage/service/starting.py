"""How a service's process is started. Imports nothing but Python's own, for an agent that may never need the rest."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

_PROGRAM = """
import sys
sys.path += filter(None, sys.argv.pop(1).split(":"))
from storage.service.__main__ import main
sys.exit(main())
"""


def command_line(path: Path) -> list[str]:
    """The program of a service that listens at `path`.

    It imports nothing of the current folder, nor what lies beside a script that has said so by PYTHONPATH: only of
    folders there that hold installed packages, and behind all others.
    """
    folders = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    installed = ":".join(filter(_holds_installed, folders))
    return [sys.executable, "-P", "-c", _PROGRAM, installed, "--socket", str(path)]


def environment(env: Mapping[str, str]) -> dict[str, str]:
    """The environment of a service: this process's, in which this very package is found."""
    return {**env, "PYTHONPATH": str(Path(__file__).parents[2])}


def _holds_installed(folder: str) -> bool:
    try:
        return bool(folder) and any(name.endswith(".dist-info") for name in os.listdir(folder))
    except OSError:
        return False


def log_of(path: Path) -> Path:
    """Where the service at `path` writes what it has to say."""
    return path.with_suffix(".log")
