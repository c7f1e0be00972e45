"""Tells which environment variables torch and its like read on import, and whether a script sets them before that.

In a worker that is forked from a process that has imported torch, a script that sets one of them comes too late. What
Python code reads is seen (`Recorder`); what C and C++ libraries read when they are loaded is known by its prefixes.
"""

from __future__ import annotations

import ast
import ctypes
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_PREFIXES = (
    # OpenMP's and BLAS's
    *("OMP_", "GOMP_", "KMP_", "LIBOMP_", "MKL_", "OPENBLAS_", "GOTO_", "BLIS_", "NUMEXPR_", "VECLIB_", "NVPL_"),
    # torch's, and those of what it is made of
    *("TORCH", "PYTORCH", "ATEN_", "C10_", "C10D_", "CAFFE2_", "AOT", "PT2_", "KINETO_", "DNNL_", "ONEDNN_"),
    *("GLOO_", "GLOG_", "CUTLASS_", "INDUCTOR_", "XNNPACK_", "TRITON_", "NPY_", "NUMPY_", "FBGEMM_"),
)
# Read when a process group is made, by other programs, or by torch's agent.
_LATER = ("TORCH_NCCL_", "TORCH_FR_", "TORCH_GLOO_", "TORCHELASTIC_", "TORCH_HOME", "TORCH_EXTENSIONS_DIR")
_FILES_MAX, _FILE_MAX_BYTES = 64, 1 << 20


def current() -> dict[str, str]:
    """Read the environment as C sees it: `os.putenv` does not show in `os.environ`."""
    environ: Any = ctypes.POINTER(ctypes.c_char_p).in_dll(ctypes.CDLL(None), "environ")
    found: dict[str, str] = {}
    for entry in environ or ():
        if entry is None:
            break
        name, _, value = os.fsdecode(entry).partition("=")
        found.setdefault(name, value)
    return found


class Recorder:
    """Notes which variables Python code reads, one by one, while it is entered: those that a module asks for."""

    def __init__(self) -> None:
        self.read: set[str] = set()

    def __enter__(self) -> Recorder:
        self._getitem = getitem = os._Environ.__getitem__

        def noted(environ: Any, name: Any) -> Any:
            if sys._getframe(1).f_code.co_name != "__iter__":  # who goes through all of them asks for none
                self.read.add(name)
            return getitem(environ, name)

        os._Environ.__getitem__ = noted  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        os._Environ.__getitem__ = self._getitem  # type: ignore[method-assign]


def is_read_early(name: str, recorded: set[str] | frozenset[str]) -> bool:
    """Whether a variable counts when torch is imported, and no more afterwards."""
    return name in recorded or (name.startswith(_PREFIXES) and not name.startswith(_LATER))


def changed_early(now: Mapping[str, str], before: Mapping[str, str], recorded: set[str] | frozenset[str]) -> list[str]:
    """Name the variables that differ, of those that are read early."""
    names = sorted(name for name in now.keys() | before.keys() if now.get(name) != before.get(name))
    return [name for name in names if is_read_early(name, recorded)]


def set_in_source(script: Path, environment: Mapping[str, str], recorded: set[str] | frozenset[str]) -> list[str]:
    """Name the variables that are read early and that a script's text sets before it imports torch.

    Modules beside the script are read as well. What is not seen (names that are computed, `load_dotenv`) is found when
    it has happened. Never raises.
    """
    found: list[str] = []
    _read(script, script.parent, environment, found, set())
    return sorted({name for name in found if is_read_early(name, recorded)})


def _read(path: Path, home: Path, environment: Mapping[str, str], found: list[str], seen: set[Path]) -> bool:
    """Add what the file at `path` sets to `found`; True once torch has been imported."""
    if path in seen or len(seen) >= _FILES_MAX:
        return False
    seen.add(path)
    try:
        if path.stat().st_size > _FILE_MAX_BYTES:
            return False
        tree = ast.parse(path.read_bytes())
    except (OSError, ValueError, SyntaxError, RecursionError, MemoryError):
        return False
    for statement in tree.body:
        for name in _imported(statement):
            if name.partition(".")[0] == "torch":
                return True
            parts = name.split(".")
            for depth in range(1, len(parts) + 1):
                beside = home.joinpath(*parts[:depth])
                for file in (beside.with_suffix(".py"), beside / "__init__.py"):
                    if file.is_file() and _read(file, home, environment, found, seen):
                        return True
        found += _set_by(statement, environment)
    return False


def _imported(statement: ast.stmt) -> Iterator[str]:
    if isinstance(statement, ast.Import):
        yield from (alias.name for alias in statement.names)
    elif isinstance(statement, ast.ImportFrom) and statement.module and not statement.level:
        yield statement.module
        yield from (f"{statement.module}.{alias.name}" for alias in statement.names if statement.module != "torch")
    elif isinstance(statement, ast.Try | ast.If | ast.With):
        for inner in statement.body:
            yield from _imported(inner)


def _set_by(statement: ast.stmt, environment: Mapping[str, str]) -> Iterator[str]:
    for node in ast.walk(statement):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                yield from _differs(_key(target), node.value, environment)
        elif isinstance(node, ast.Delete):
            yield from (name for target in node.targets if (name := _key(target)) in environment)
        elif isinstance(node, ast.AugAssign) and _is_environ(node.target):
            yield from _of_dict(node.value, environment)
        elif isinstance(node, ast.Call):
            yield from _set_by_call(node, environment)


def _set_by_call(call: ast.Call, environment: Mapping[str, str]) -> Iterator[str]:
    function = call.func
    called = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    first, second = (*call.args, None, None)[:2]
    if called == "putenv":
        yield from _differs(_text(first), second, environment)
    elif called == "unsetenv":
        yield from (name for name in (_text(first),) if name in environment)
    elif isinstance(function, ast.Attribute) and _is_environ(function.value):
        if (called == "setdefault" and _text(first) not in environment) or (
            called == "pop" and _text(first) in environment
        ):
            yield _text(first)
        elif called == "update":
            yield from _of_dict(first, environment)
            for keyword in call.keywords:
                yield from _differs(keyword.arg or "", keyword.value, environment)


def _of_dict(node: ast.AST | None, environment: Mapping[str, str]) -> Iterator[str]:
    if isinstance(node, ast.Dict):
        for key, value in zip(node.keys, node.values, strict=True):
            yield from _differs(_text(key), value, environment)


def _differs(name: str, value: ast.AST | None, environment: Mapping[str, str]) -> Iterator[str]:
    if name and (not isinstance(value, ast.Constant) or environment.get(name) != value.value):
        yield name


def _key(target: ast.AST) -> str:
    """The NAME of `os.environ[NAME]`, "" of anything else."""
    return _text(target.slice) if isinstance(target, ast.Subscript) and _is_environ(target.value) else ""


def _text(node: ast.AST | None) -> str:
    value = node.value if isinstance(node, ast.Constant) else ""
    return os.fsdecode(value) if isinstance(value, str | bytes) else ""


def _is_environ(node: ast.AST) -> bool:
    name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
    return name in ("environ", "environb")
