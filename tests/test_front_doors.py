"""The packages' front doors: what a user needs is there, told by `help`, and costs little to import."""

from __future__ import annotations

import importlib
import inspect
import pydoc
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGES = ("launcher", "storage", "elastic_moe")
USERS = {
    "launcher": "Watcher Check launch_agent MeshPlan worker WorkerContext EventName Environment open_job UsageError",
    "storage": "Checkpointer PerRank ShardReader ShardWriter ObjectStore open_store CheckpointEvent Corrupt",
    "elastic_moe": "worker load_job JobConfig train UserError",
}


def test_they_are_imported_without_torch() -> None:
    heavy = ("torch", "pydantic", "numpy", "boto3", "etcd3", "grpc")
    script = f"import sys, {', '.join(PACKAGES)}\nprint(*({{*sys.modules}} & {{*{heavy!r}}}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_there(package: str) -> None:
    door = importlib.import_module(package)
    assert len(set(door.__all__)) == len(door.__all__)
    assert set(door.__all__) <= set(dir(door))
    assert set(door._PLACES) <= set(door.__all__), "what is found is told"
    for name in door.__all__:
        assert getattr(door, name) is not None
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing_of_that_name'"):
        door.nothing_of_that_name  # noqa: B018
    with pytest.raises(ImportError):
        exec(f"from {package} import nothing_of_that_name")


@pytest.mark.parametrize("package", PACKAGES)
def test_type_checkers_are_told_of_the_same_names(package: str) -> None:
    door = importlib.import_module(package)
    source = Path(door.__file__ or "").read_text()
    block = source.partition("if TYPE_CHECKING:\n")[2].partition("\n\n__all__")[0].replace(",", " ").split()
    assert [name for name in door.__all__ if name not in block] == door.errors.__all__


@pytest.mark.parametrize("package", PACKAGES)
def test_help_shows_what_a_user_needs(package: str) -> None:
    door = importlib.import_module(package)
    told = pydoc.plain(pydoc.render_doc(door)).partition("PACKAGE CONTENTS")[0]
    wanted = USERS[package].split()
    assert set(wanted) <= set(door.__all__)
    assert not [name for name in wanted if name not in told]
    assert (inspect.getdoc(door.errors) or "?") in (inspect.getdoc(door) or ""), "the errors are drawn"
