"""How a service's process is started. Imports nothing but Python's own, for an agent that may never need the rest."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path


def command_line(path: Path) -> list[str]:
    """The program of a service that listens at `path`."""
    return [sys.executable, "-m", "storage.service", "--socket", str(path)]


def environment(env: Mapping[str, str]) -> dict[str, str]:
    """The environment of a service: this process's, in which this very package is found."""
    home = str(Path(__file__).parents[2])
    return {**env, "PYTHONPATH": os.pathsep.join(filter(None, (home, env.get("PYTHONPATH"))))}


def log_of(path: Path) -> Path:
    """Where the service at `path` writes what it has to say."""
    return path.with_suffix(".log")
