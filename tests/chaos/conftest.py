"""What the chaos tests share: a job on a network of its own, and the kinds of store it runs on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest

from tests import sample
from tests.chaos.job import ON_OBJECTS, STORES, Job, etcd_on
from tests.chaos.network import Loopback, network, why_no_cuts


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every test runs on a plain etcd, or on what it is marked with: `on_secure` with TLS and a user, `on_folder`
    without any server; in the whole (`tests/sample.py`) on a plain one as well.

    CHAOS_STORES names the flavours to run all on instead: `make chaos` sets it to plain,secure,beside. So does
    CHAOS_SAVES (file, service, direct) for how the job saves: in a file, where no test is marked `by_service`.
    """

    def marked(name: str) -> bool:
        return metafunc.definition.get_closest_marker(name) is not None

    if "saves" in metafunc.fixturenames:
        saves = tuple(filter(None, os.environ.get("CHAOS_SAVES", "").split(",")))
        if not saves and marked("by_service"):
            saves = ("file", "service") if sample.IS_WHOLE else ("service",)
        if saves:
            metafunc.parametrize("saves", saves, indirect=True)
    if "flavour" not in metafunc.fixturenames:
        return
    chosen = tuple(filter(None, os.environ.get("CHAOS_STORES", "").split(",")))
    known = (*STORES, *ON_OBJECTS)
    assert set(chosen) <= set(known), f"CHAOS_STORES={','.join(chosen)}: known are {', '.join(known)}"
    usual = [flavour for flavour in ("secure", "folder") if marked(f"on_{flavour}")]
    if sample.IS_WHOLE or not usual:
        usual.insert(0, "plain")
    metafunc.parametrize("flavour", chosen or usual)


class Starter(Protocol):
    """Makes a job, with an etcd of so many members; several of one test tell themselves apart by their folder."""

    def __call__(self, num_members: int = 1, folder: str = "") -> Job: ...


@pytest.fixture
def saves(request: pytest.FixtureRequest) -> str:
    """How the job saves."""
    return str(getattr(request, "param", "file"))


@pytest.fixture
def start_job(tmp_path: Path, flavour: str, saves: str, request: pytest.FixtureRequest) -> Iterator[Starter]:
    if (why := why_no_cuts()) and request.node.get_closest_marker("cuts"):
        pytest.skip(why)
    with contextlib.ExitStack() as stack:

        def start(num_members: int = 1, folder: str = "") -> Job:
            own = tmp_path / folder
            own.mkdir(exist_ok=True)
            net = Loopback() if why else stack.enter_context(network(own))
            store = stack.enter_context(etcd_on(own, net, flavour, num_members))
            made = Job(own, net, store, saves)
            stack.callback(made.end)
            return made

        yield start


@pytest.fixture
def job(start_job: Starter) -> Job:
    """A job with an etcd of one member."""
    return start_job()
