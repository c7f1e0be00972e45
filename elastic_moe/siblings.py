"""The packages `launcher` and `storage` have common names: which of them a process finds."""

from __future__ import annotations

import importlib.util
import os
import sys

_SIBLINGS = ("launcher", "storage")
_HOME = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def _is_command() -> bool:
    """Whether this process is the command `elastic-moe`, by that name or by `python -m`, and no script of a user's."""
    if os.path.basename(sys.argv[0]) == "elastic-moe":
        return True
    # While `python -m` looks for what it is to run, argv[0] says no more than that.
    told = " ".join(sys.orig_argv[1:])
    return sys.argv[0] == "-m" and ("-melastic_moe" in told or "-m elastic_moe" in told)


def _keep_to_own() -> None:
    """Have `launcher` do it, which has to be found first."""
    found, sys.path[:] = sys.path[:], [_HOME]
    try:
        from launcher import keep_to_own
    finally:
        sys.path[:] = found
    keep_to_own()


def _shadowed(sibling: str) -> str:
    """Why a script that has a `sibling` of its own cannot use ours as well; "" if it has none."""
    own = os.path.join(_HOME, sibling)
    loaded = sys.modules.get(sibling)
    spec = importlib.util.find_spec(sibling) if loaded is None else loaded.__spec__
    origin = spec.origin if spec is not None else None
    if origin is None:
        return f"elastic_moe needs its package {sibling!r}, and {own} is not found: install elastic-moe again"
    if os.path.realpath(origin) == os.path.realpath(os.path.join(own, "__init__.py")):
        return ""
    theirs = os.path.dirname(origin) if os.path.basename(origin) == "__init__.py" else origin
    folder = os.path.dirname(theirs)
    how = "PYTHONPATH" if folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) else "sys.path"
    return (
        f"elastic_moe needs its own package {sibling!r} ({own}), but {theirs} hides it here: {folder} comes first in "
        f"{how}. A process can hold one {sibling!r} only: rename {theirs}, or move it into a package of your own "
        f"(`from yourpackage import {sibling}`)"
    )


def find() -> None:
    """Make sure that `launcher` and `storage` are our own, here and from now on.

    Our own commands never look beside a script. A script's modules are its own; where it wants both, the first import
    of elastic_moe says so: it would fail much later, far from the cause.

    Raises:
        ImportError: this process has, or would find, another package of that name.
    """
    if _is_command():
        _keep_to_own()
        return
    for sibling in _SIBLINGS:
        if why := _shadowed(sibling):
            raise ImportError(why)
