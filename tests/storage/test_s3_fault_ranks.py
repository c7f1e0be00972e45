"""What networks and servers do to requests, while several ranks save and restore together.

A save commits and verifies, or fails on all ranks, which say whose fault it was and train on; a restore gets every byte
right on every rank, or says no on all of them.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage import inspection, open_store
from storage.run import catalog
from storage.stores import retry_policy
from tests import sample
from tests.ranks import Ranks
from tests.s3 import S3Server
from tests.storage import fault_cases as cases
from tests.storage.death_cases import impatient_rules
from tests.storage.proxy import KINDS, Fault, FaultProxy
from tests.storage.service_cases import in_thread

WORLD_SIZE = 3
ALWAYS = 1_000_000
_steps = itertools.count(10, 10)


@pytest.fixture(scope="module")
def proxy(_juicefs: S3Server) -> Iterator[FaultProxy]:
    with FaultProxy(_juicefs) as proxy:
        yield proxy


@pytest.fixture(autouse=True)
def no_faults(proxy: FaultProxy) -> Iterator[None]:
    yield
    proxy.faults.clear()


class Run:
    """A run with one checkpoint, whose tensors are laid out over the ranks in one of the two ways."""

    def __init__(
        self, server: S3Server, proxy: FaultProxy, ranks: Ranks, layout: str, service: Path | None = None
    ) -> None:
        self._prefix = uuid.uuid4().hex
        self._environment = server.environment
        self._service = "" if service is None else str(service)
        self._proxy = proxy
        self._ranks = ranks
        self._layout = layout
        self.store = open_store(server.url(self._prefix))

    def _url(self, kind: str) -> str:
        return self._proxy.url(self._prefix, stall_timeout_s=0.5 if kind == "stall" else 30.0)

    def save(self, *faults: Fault) -> tuple[int, list[list[tuple[str, dict[str, object]]]]]:
        """Save a new step with the faults; its number and every rank's events."""
        step, kind = next(_steps), faults[0].kind if faults else ""
        self._proxy.faults[:] = faults
        args = (self._url(kind), self._environment, step, self._layout, self._service)
        events = self._ranks.run(cases.save, *args, world_size=WORLD_SIZE)
        self._proxy.faults.clear()
        return step, events

    def restore(self, *faults: Fault) -> list[tuple[int, bool, str, list[str]]]:
        """What every rank makes of the newest checkpoint with the faults."""
        self._proxy.faults[:] = faults
        args = (self._url(faults[0].kind), self._environment, self._layout)
        found = self._ranks.run(cases.restore, *args, world_size=WORLD_SIZE)
        self._proxy.faults.clear()
        return found


@pytest.fixture(scope="module")
def saved(_juicefs: S3Server, proxy: FaultProxy, ranks: Ranks) -> Iterator[dict[str, Run]]:
    """By layout, a run with a checkpoint in it."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in _juicefs.environment.items():
            patch.setenv(name, value)
        yield {layout: Run(_juicefs, proxy, ranks, layout) for layout in cases.PLACEMENTS}


@pytest.fixture(scope="module")
def served(
    _juicefs: S3Server, proxy: FaultProxy, ranks: Ranks, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Run]:
    """A run that the checkpoint service saves for all ranks."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in _juicefs.environment.items():
            patch.setenv(name, value)
        for cause, rule in impatient_rules().items():
            patch.setitem(retry_policy.RULES, cause, rule)
        with in_thread(tmp_path_factory.mktemp("service") / "node" / "service.sock") as service:
            yield Run(_juicefs, proxy, ranks, "sharded", service.path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["error", "throttle", "corrupt_put"])
def test_the_service_commits_in_spite_of_it(served: Run, kind: str) -> None:
    places = [("PUT", "__1_"), ("PUT", "__2_"), ("PUT", "receipt-000001"), ("GET", ".metadata"), ("PUT", ".metadata")]
    faults = [Fault(kind, method, contains) for method, contains in places]
    step, events = served.save(*faults)
    assert sum(fault.num_done for fault in faults) >= 2
    names = [{name for name, _ in of_rank} for of_rank in events]
    assert ["checkpoint_committed" in found for found in names] == [True, False, False], events
    assert not {"checkpoint_failed", "checkpoint_direct"} & set().union(*names)
    assert inspection.verify(served.store, f"step-{step:09d}/").problems == ()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "contains", "told"),
    [("error", "__1_0", "rank 1 failed: Transient"), ("corrupt_put", "/.metadata", "tried")],
)
def test_what_stays_fails_the_services_save_on_all_ranks(served: Run, kind: str, contains: str, told: str) -> None:
    before = catalog.committed_steps(served.store)
    step, events = served.save(Fault(kind, "PUT", contains, times=ALWAYS))
    for of_rank in events:
        (failure,) = (fields for name, fields in of_rank if name == "checkpoint_failed")
        assert failure["step"] == step
        assert told in str(failure["reason"])
        assert not {"checkpoint_committed", "checkpoint_direct"} & {name for name, _ in of_rank}
    assert catalog.committed_steps(served.store) == before


@pytest.fixture
def run(request: pytest.FixtureRequest, saved: dict[str, Run], saved_by: str) -> Run:
    """The run of the layout that is asked for, or the one that the service saves."""
    found: Run = request.getfixturevalue("served") if saved_by == "service" else saved[request.param]
    if not catalog.committed_steps(found.store):
        found.save()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("run", ["sharded"], indirect=True)
@pytest.mark.parametrize("kind", KINDS)
def test_a_save_of_several_ranks_commits_in_spite_of_it(run: Run, kind: str) -> None:
    places = [
        ("PUT", "__1_"),
        ("PUT", "__2_"),
        ("PUT", "receipt-000001"),
        ("GET", "receipt-000002"),
        ("GET", ".metadata"),
    ]
    faults = [Fault(kind, method, contains) for method, contains in (*places, ("PUT", ".metadata"))]
    step, events = run.save(*faults)
    assert sum(fault.num_done for fault in faults) >= 2
    committed = ["checkpoint_committed" in {name for name, _ in of_rank} for of_rank in events]
    assert committed == [True, False, False], events
    assert not [fields for of_rank in events for name, fields in of_rank if name == "checkpoint_failed"]
    assert inspection.verify(run.store, f"step-{step:09d}/").problems == ()


@pytest.mark.slow
@pytest.mark.parametrize("run", ["sharded"], indirect=True)
@pytest.mark.parametrize(
    ("kind", "method", "contains", "told"),
    [
        ("throttle", "PUT", "__1_0", "rank 1 failed: Transient"),
        ("refuse", "PUT", "__2_1", "rank 2 failed: Transient"),
        *((kind, "PUT", "/.metadata", "tried") for kind in ("error", "corrupt_put")),
        *(sample.rest(kind, "PUT", "__1_0", "rank 1 failed: Transient") for kind in ("error", "refuse")),
        sample.rest("corrupt_put", "PUT", "__2_1", "rank 2 failed: Transient"),
        sample.rest("throttle", "PUT", "/.metadata", "tried"),
    ],
)
def test_one_that_stays_fails_the_save_on_all_ranks_and_publishes_nothing(
    run: Run, kind: str, method: str, contains: str, told: str
) -> None:
    before = catalog.committed_steps(run.store)
    step, events = run.save(Fault(kind, method, contains, times=ALWAYS))
    for of_rank in events:
        (failure,) = (fields for name, fields in of_rank if name == "checkpoint_failed")
        assert failure["step"] == step
        assert told in str(failure["reason"])
        assert "checkpoint_committed" not in {name for name, _ in of_rank}
    assert catalog.committed_steps(run.store) == before
    assert {found[:3] for found in run.restore(Fault("none", times=0))} == {(before[0], True, "")}


def each_in_a_layout(*kinds: str) -> list[object]:
    """Each fault with each layout; in the suite with one of them, the next with the other."""
    layouts = list(cases.PLACEMENTS)
    return [
        (pytest.param if (number + place) % len(layouts) == 0 else sample.rest)(layout, kind, id=f"{kind}-{layout}")
        for number, kind in enumerate(kinds)
        for place, layout in enumerate(layouts)
    ]


READ_FAULTS = [kind for kind in KINDS if kind not in ("corrupt_put", "repeat")]


@pytest.mark.slow
@pytest.mark.parametrize(("run", "kind"), each_in_a_layout(*READ_FAULTS), indirect=["run"])
def test_a_restore_of_several_ranks_gets_every_byte_right_in_spite_of_it(run: Run, kind: str) -> None:
    (newest, *_) = catalog.committed_steps(run.store)
    faults = [Fault(kind, "GET", contains) for contains in ("__0_", "__1_", "__2_", ".metadata", "manifest", "owner")]
    found = run.restore(*faults)
    assert sum(fault.num_done for fault in faults) >= 3
    assert {row[:3] for row in found} == {(newest, True, "")}
    if kind == "corrupt":
        assert "damaged" in {cause for row in found for cause in row[3]}  # told, though it did no harm


@pytest.mark.slow
@pytest.mark.parametrize(("run", "kind"), each_in_a_layout("error", "truncate", "lose"), indirect=["run"])
def test_an_outage_is_raised_by_all_ranks_and_harms_no_checkpoint(run: Run, kind: str) -> None:
    before = catalog.committed_steps(run.store)
    found = run.restore(Fault(kind, "GET", ".distcp", times=ALWAYS))
    for _, _, raised, _ in found:
        assert raised.startswith(("Transient: ", "Interrupted: ")) and "tried" in raised
    assert catalog.committed_steps(run.store) == before


@pytest.mark.slow
@pytest.mark.parametrize("run", ["sharded", sample.rest("replicated")], indirect=True)
def test_of_a_checkpoint_that_always_reads_as_damaged_nothing_arrives(run: Run) -> None:
    before, _ = run.save()
    step, _ = run.save()
    found = run.restore(Fault("corrupt", "GET", f"step-{step:09d}/attempt", times=ALWAYS))
    assert {row[:3] for row in found} == {(before, True, "")}
    assert step not in catalog.committed_steps(run.store)
