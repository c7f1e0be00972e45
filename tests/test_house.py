"""The rules of the house: how long files and functions may be, what a function asks for, one name for each thing."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from tests import order

ROOT = Path(__file__).parent.parent
PACKAGES = ("elastic_moe", "launcher", "storage")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 70
MAX_PARAMETERS = 7

# What breaks a rule for a reason that stays. The lists may only shrink: what is mended is taken off, nothing is added.
LONG_FILES: set[str] = set()
LONG_FUNCTIONS: set[str] = set()
MANY_PARAMETERS: set[str] = set()
POSITIONAL_BOOLEANS = {
    "storage/format/safe_arrays.py: new_dtype",  # called as pickles call numpy's
    "storage/loading/loadplan.py: set_up_planner",  # as DCP calls its planners
    "storage/parallel.py: shutdown",  # as concurrent.futures' is called
}
SHARED_CLASS_NAMES: set[str] = set()

Function = ast.FunctionDef | ast.AsyncFunctionDef


def files(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted((ROOT / folder).rglob("*.py"))


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def functions(*folders: str) -> list[tuple[str, Function]]:
    """Every function, by its file and name."""
    return [
        (f"{path.relative_to(ROOT)}: {node.name}", node)
        for path in files(*folders)
        for node in ast.walk(parsed(path))
        if isinstance(node, Function)
    ]


def positional(function: Function) -> list[ast.arg]:
    """The parameters that may be given by place, without the object itself."""
    arguments = [*function.args.posonlyargs, *function.args.args]
    return [argument for argument in arguments if argument.arg not in ("self", "cls")]


def long_files() -> set[str]:
    """Files of more than `MAX_FILE_LINES` lines."""
    found = files(*PACKAGES, "tests")
    return {str(path.relative_to(ROOT)) for path in found if path.read_text().count("\n") > MAX_FILE_LINES}


def long_functions() -> set[str]:
    """Functions of more than `MAX_FUNCTION_LINES` lines, decorators not counted."""
    return {
        name
        for name, function in functions(*PACKAGES, "tests")
        if (function.end_lineno or 0) - function.lineno >= MAX_FUNCTION_LINES
    }


def many_parameters() -> set[str]:
    """Functions of more than `MAX_PARAMETERS` parameters: what belongs together makes a dataclass."""
    return {
        name
        for name, function in functions(*PACKAGES)
        if len(positional(function)) + len(function.args.kwonlyargs) > MAX_PARAMETERS
    }


def positional_booleans() -> set[str]:
    """Functions that take a boolean by place, where the caller's `True` says nothing; an only parameter says enough."""
    return {
        name
        for name, function in functions(*PACKAGES)
        if len(positional(function)) + len(function.args.kwonlyargs) > 1
        and any(
            isinstance(given.annotation, ast.Name) and given.annotation.id == "bool" for given in positional(function)
        )
    }


def shared_class_names() -> set[str]:
    """Names that two classes of one package have."""
    found: set[str] = set()
    for package in PACKAGES:
        names = Counter(
            node.name for path in files(package) for node in parsed(path).body if isinstance(node, ast.ClassDef)
        )
        found |= {f"{package}: {name}" for name, count in names.items() if count > 1}
    return found


@pytest.mark.parametrize(
    ("rule", "listed"),
    [
        (long_files, LONG_FILES),
        (long_functions, LONG_FUNCTIONS),
        (many_parameters, MANY_PARAMETERS),
        (positional_booleans, POSITIONAL_BOOLEANS),
        (shared_class_names, SHARED_CLASS_NAMES),
    ],
)
def test_the_house_is_kept(rule: Callable[[], set[str]], listed: set[str]) -> None:
    found = rule()
    assert sorted(found - listed) == [], rule.__doc__
    assert sorted(listed - found) == [], "these are mended: take them off the list"


def test_the_files_that_are_begun_first_are_there() -> None:
    assert [path for path in order.FIRST if not (ROOT / "tests" / path).is_file()] == []


def test_docs_name_tests_that_are_there() -> None:
    tests: dict[str, set[str]] = {}
    for path in files("tests"):
        found = {node.name for node in ast.walk(parsed(path)) if isinstance(node, (Function, ast.ClassDef))}
        tests.setdefault(path.name, set()).update(found)
    pages = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md"]
    missing = [
        f"{page.relative_to(ROOT)}: {file}::{name}"
        for page in pages
        for file, name in re.findall(r"([\w/]+\.py)::(\w+)", page.read_text())
        if name not in tests.get(Path(file).name, set())
    ]
    assert missing == []
