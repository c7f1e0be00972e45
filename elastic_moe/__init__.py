"""Train Mixture-of-Experts models on machines that come and go."""

from __future__ import annotations

import importlib.util
from pathlib import Path

_SIBLINGS = ("launcher", "storage")


def _shadowed(sibling: str, home: Path) -> Path | None:
    """Where `sibling` would be imported from, unless that is beside this package in `home`."""
    spec = importlib.util.find_spec(sibling)
    if spec is None or spec.origin is None:
        return Path(sibling)
    found = Path(spec.origin).resolve().parent
    return None if found == home / sibling else found


# `launcher` and `storage` are common names: with a folder so called in the working directory, `python -m` would
# import that one and fail much later, far from the cause.
for _sibling in _SIBLINGS:
    if _found := _shadowed(_sibling, Path(__file__).resolve().parent.parent):
        raise ImportError(
            f"elastic_moe needs its own package {_sibling!r}, but Python finds {_found}: "
            "start from another directory, or rename that folder"
        )
