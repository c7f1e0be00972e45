"""The front door of `storage`: every public name, imported when it is used, and the errors as they are drawn."""

import ast
import inspect
import pydoc
import subprocess
import sys
from pathlib import Path

import pytest

import storage
from storage import errors
from storage.events import CheckpointEvent

PAGE = (Path(__file__).parents[2] / "docs" / "launcher.md").read_text()


def names_for_type_checkers() -> dict[str, str]:
    """By public name, the place that mypy is told of."""
    source = ast.parse(inspect.getsource(storage))
    block = next(node for node in source.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.asname or alias.name: f"{node.module}.{alias.name}" for node in imports for alias in node.names}


def test_types_names_and_places_are_the_same_list() -> None:
    places = {name: ".".join(place) for name, place in storage._PLACES.items()}
    assert places == names_for_type_checkers()
    assert sorted(storage.__all__) == sorted([*places, *errors.__all__])


def test_every_public_name_is_there() -> None:
    assert all(getattr(storage, name) is not None for name in storage.__all__)
    assert set(storage.__all__) <= set(dir(storage))


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"^module 'storage' has no attribute 'Chekpointer'$"):
        storage.Chekpointer  # type: ignore[attr-defined]  # noqa: B018


def test_only_what_needs_torch_imports_it() -> None:
    script = (
        "import sys, storage\n"
        "rooms = [name for name in sys.modules if name.startswith('storage.')]\n"
        "assert sorted(rooms) == ['storage.errors', 'storage.text'], rooms\n"
        "storage.open_store('memory://x')\n"
        "storage.verify, storage.find_garbage, storage.ObjectStore, storage.CheckpointEvent\n"
        "assert 'torch' not in sys.modules\n"
        "storage.Checkpointer\n"
        "assert 'torch' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_help_shows_the_classes_and_the_tree_of_errors() -> None:
    text = pydoc.render_doc(storage, renderer=pydoc.plaintext)  # type: ignore[attr-defined]
    assert "StorageError\n    ├── NotFound" in text
    for name in ("class Checkpointer(", "class ObjectStore(", "class WrongModel(", "open_store("):
        assert name in text


def test_the_tree_of_errors_is_drawn_as_it_is() -> None:
    drawn: dict[str, str] = {}
    above: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        bare = line.lstrip(" │├└─")
        depth = (len(line) - len(bare)) // 4
        if bare.startswith("StorageError") or depth:
            name = bare.split()[0]
            drawn[name] = above[depth - 1] if depth else "Exception"
            above[depth:] = [name]
    found = {
        name: kind.__bases__[0].__name__
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, Exception)
    }
    assert drawn == found
    assert sorted(errors.__all__) == sorted([*found, "Cause"])


def test_the_page_of_events_has_every_name() -> None:
    assert not [event for event in CheckpointEvent if f"`{event}`" not in PAGE]
