"""Finds where a package uses private names of torch: outside of its `torch_private.py` it should use none.

What is looked at is the source: imports, attributes of what is imported, names in strings, and the private methods and
fields of torch's classes that a class of ours has touched or replaced by deriving from them.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
_IN_STRING = re.compile(r"torch(\.\w+)*\._[a-z]\w*")


def used_in(package: str, *, but_for: tuple[str, ...] = ("torch_private.py",)) -> list[str]:
    """Every use in a package, as "file:line: name"; the files `but_for`, relative to the package, are left out."""
    folder = ROOT / package
    left_out = {folder / name for name in but_for}
    files = sorted(set(folder.rglob("*.py")) - left_out)
    return [f"{file.relative_to(ROOT)}:{line}: {name}" for file in files for line, name in uses(file.read_text())]


def uses(source: str) -> list[tuple[int, str]]:
    """The private names of torch that a module uses, by line."""
    tree = ast.parse(source)
    bound = _bound_to_torch(tree)
    docstrings = {id(node.body[0].value) for node in ast.walk(tree) if _has_docstring(node)}  # type: ignore[attr-defined]
    found = []
    for node in ast.walk(tree):
        if id(node) not in docstrings:
            found += [(node.lineno, name) for name in _names_of(node, bound)]  # type: ignore[attr-defined]
    return sorted(found)


def own_names(of: type) -> set[str]:
    """The private methods and fields that a class and those above it name in their source, dunders left out."""
    named = {name for name in dir(of) if _is_private(name)}
    for parent in of.__mro__:
        if parent.__module__.partition(".")[0] == "torch":
            with contextlib.suppress(OSError):  # torch makes some in C, such as those below autograd.Function
                named.update(re.findall(r"\bself\.(_(?!_)\w+)", inspect.getsource(parent)))
    return named


def _bound_to_torch(tree: ast.Module) -> dict[str, str]:
    """What the names that are imported from torch stand for, in full."""
    bound = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if _is_torchs(alias.name):
                    bound[alias.asname or "torch"] = alias.name if alias.asname else "torch"
        elif isinstance(node, ast.ImportFrom) and _is_torchs(node.module or "") and not node.level:
            bound.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    return bound


def _names_of(node: ast.AST, bound: dict[str, str]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (a.name for a in node.names if _is_torchs(a.name) and _has_private_part(a.name))
    elif isinstance(node, ast.ImportFrom) and _is_torchs(node.module or "") and not node.level:
        names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (name for name in names if _has_private_part(name))
    elif isinstance(node, ast.Attribute) and _is_private(node.attr):
        if (root := _root(node)) in bound:
            yield f"{bound[root]}: {node.attr}"
    elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "setattr", "hasattr"):
        first, second = (*node.args, None, None)[:2]
        name = getattr(second, "value", None)
        if isinstance(name, str) and _is_private(name) and first is not None and _root(first) in bound:
            yield f"{bound[_root(first)]}: {name}"
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield from (found[0] for found in _IN_STRING.finditer(node.value))
    elif isinstance(node, ast.ClassDef):
        yield from _inherited(node, bound)


def _inherited(node: ast.ClassDef, bound: dict[str, str]) -> Iterator[str]:
    """What a class touches or replaces of the torch classes that it derives from."""
    theirs: set[str] = set()
    for base in node.bases:
        if (root := _root(base)) in bound:
            theirs |= _private_names_of(bound[root], ast.unparse(base).partition(".")[2])
    for inner in ast.walk(node):
        if isinstance(inner, ast.FunctionDef) and inner.name in theirs:
            yield f"{node.name}: def {inner.name}"
        elif isinstance(inner, ast.Attribute) and inner.attr in theirs and _root(inner) in ("self", "super"):
            yield f"{node.name}: {inner.attr}"


@functools.cache
def _private_names_of(imported: str, attributes: str) -> set[str]:
    module, _, name = imported.rpartition(".")
    found = getattr(importlib.import_module(module), name) if module else importlib.import_module(name)
    for attribute in filter(None, attributes.split(".")):
        found = getattr(found, attribute)
    return own_names(found) if isinstance(found, type) else set()


def _root(node: ast.AST) -> str:
    while isinstance(node, ast.Attribute | ast.Call | ast.Subscript):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def _has_docstring(node: ast.AST) -> bool:
    body = getattr(node, "body", None)
    first = body[0] if isinstance(body, list) and body else None
    return isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)


def _is_torchs(module: str) -> bool:
    return module.partition(".")[0] == "torch"


def _has_private_part(name: str) -> bool:
    return any(_is_private(part) for part in name.split("."))


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")
