"""Keeps the launcher's own processes from importing what lies beside a user's script, or in the current folder.

`launcher` and `storage` are common names, and so is a `types.py`. What lies beside a script is for that script, once it
runs; an agent, a zygote or a command that imported it would run the user's code as its own. Imports nothing but what
every interpreter has loaded, so that it can be the first import of a process.
"""

import _warnings
import os
import sys
from _frozen_importlib import ModuleSpec
from _frozen_importlib_external import PathFinder

OWN_PACKAGES = ("elastic_moe", "launcher", "storage")
HOME = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
"""The folder of these packages: site-packages, or a clone."""

_NOWHERE = "/proc"
_script_path: list[str] | None = None
_added: list[str] = []
modules_at_start: frozenset[str] = frozenset()
"""What an interpreter of this environment imports before it runs anything, beyond the standard library."""
filters_at_start: tuple[object, ...] | None = None
"""Its warnings filters, once `keep_to_own` has looked."""


class _OwnFirst:
    """Finds our packages where this file is, whatever else has their names."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """As `importlib.abc.MetaPathFinder.find_spec`."""
        return PathFinder.find_spec(name, [HOME]) if name in OWN_PACKAGES else None


def keep_to_own() -> None:
    """Make this process one that imports the standard library, installed packages and ours, and nothing else.

    `PYTHONPATH` may be how a cluster installs packages: its folders that hold installed ones stay, behind all others.
    """
    global _script_path, modules_at_start, filters_at_start
    known = {*sys.stdlib_module_names, *OWN_PACKAGES}
    modules_at_start = frozenset(name for name in sys.modules if name.partition(".")[0] not in known)
    filters_at_start = tuple(_warnings.filters)
    _script_path = path_of_scripts()
    from_environment = {_absolute(folder) for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep)}
    roots = tuple(
        f"{prefix}{os.sep}" for prefix in (sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix)
    )
    _added[:] = [p for p in _script_path if _absolute(p) in from_environment and not p.startswith(roots)]
    sys.path[:] = [p for p in _script_path if p not in _added] + [p for p in _added if _holds_installed(p)]
    sys.meta_path.insert(0, _OwnFirst)


def path_of_scripts() -> list[str]:
    """Return what follows the script's folder in the `sys.path` of a script that is run in this environment."""
    if _script_path is not None:
        return list(_script_path)
    return sys.path[0 if sys.flags.safe_path else 1 :]


def be_a_scripts() -> None:
    """Search modules as a script does; the first entry is for its folder. Undoes `keep_to_own`."""
    sys.path[:] = [*([] if sys.flags.safe_path else [""]), *path_of_scripts()]
    if _OwnFirst in sys.meta_path:
        sys.meta_path.remove(_OwnFirst)


def hidden_by(folders: list[str], loaded: dict[str, str]) -> str:
    """Name in words a module that a script would import in place of one that is loaded; "" if there is none.

    Args:
        folders: of the script, and those of `PYTHONPATH`.
        loaded: file of each top-level module. What is built in or frozen cannot be hidden, nor `encodings`.
    """
    for folder in folders:
        try:
            entries = os.listdir(folder)
        except OSError:
            continue
        for entry in entries:
            name, dot, suffix = entry.partition(".")
            known = loaded.get(name) if name != "encodings" else None
            if known is None:
                continue
            found = os.path.join(folder, entry)
            if not dot:
                found = os.path.join(found, "__init__.py")
            elif not (suffix == "py" or suffix.endswith("so")):
                continue
            if os.path.exists(found) and os.path.realpath(found) != os.path.realpath(known):
                return f"{found} hides the module {name!r} that is imported ahead from {known}"
    return ""


def folders_before_installed() -> list[str]:
    """Return the folders of `PYTHONPATH` that come first for a script, and last or not at all for this process."""
    return [folder for folder in path_of_scripts() if folder in _added]


def leave_folder_that_is_gone() -> bool:
    """Go to another folder if the current one has been deleted; returns whether it has been.

    torch does not load without one (MKL looks for its libraries). Where this goes nobody has files, and none can be
    made: a relative path leads nowhere, as it did before.
    """
    try:
        os.getcwd()
    except FileNotFoundError:
        os.chdir(_NOWHERE)
        return True
    return False


def _absolute(folder: str) -> str:
    try:
        return os.path.abspath(folder)
    except OSError:  # a relative one, where the current folder has been deleted
        return folder


def _holds_installed(folder: str) -> bool:
    try:
        return any(name.endswith(".dist-info") for name in os.listdir(folder))
    except OSError:
        return False
