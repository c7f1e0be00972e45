"""SIGKILL at each step of the commit protocol on S3 servers: of one who writes, of the coordinator, of all ranks.

The killer sits between the ranks and the server, and knows a step by its request. After each death either the new
checkpoint is committed and every byte of it verifies, or the one before is restored; which of both is certain. What
was left behind is gone after `ckpt gc`.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from urllib.parse import unquote

import pytest

from elastic_moe.cli.main import main
from storage import Checkpointer, JobIdentity, inspection, open_store, register_scheme
from storage.format import layout
from storage.format.manifest import load_manifest
from storage.stores.wrapper import StoreWrapper
from tests import sample
from tests.ranks import Ranks
from tests.s3 import S3Server
from tests.storage import death_cases as cases
from tests.storage.proxy import Death, Fault, FaultProxy

WORLD_SIZE = 2
COORDINATOR, WRITER = 0, 1
GIVE_UP_S, NEVER_S = 0.3, 60.0


@dataclass(frozen=True)
class Step:
    """A kind of request that changes the store, known by its method and a pattern in its target.

    In the pattern `RANK` is the rank that sends it; without, it is the coordinator's alone. `moments`: when a death at
    it can leave the store in a state of its own; before it is after the one that went before.
    """

    name: str
    method: str
    pattern: str
    moments: tuple[str, ...] = ("middle", "after")

    @property
    def is_of_each_rank(self) -> bool:
        return "RANK" in self.pattern

    def of(self, rank: int) -> str:
        """The pattern of that rank's request."""
        return self.pattern.replace("RANK", str(rank))

    def matches(self, method: str, target: str) -> bool:
        """Whether it is that request of any rank."""
        return self.method == method and re.search(self.pattern.replace("RANK", r"\d"), unquote(target)) is not None


STEPS = (
    Step("beat", "PUT", r"/beat-[0-9a-f]+$", ("before", "after")),
    Step("claim", "PUT", r"/owner\.json$", ("middle", "after")),
    Step("removal of the last owner's beat", "DELETE", r"/beat-[0-9a-f]+$", ("after",)),
    Step("probe", "PUT", r"/\.probe-[0-9a-f]+$", ("after",)),
    Step("end of the probe", "DELETE", r"/\.probe-[0-9a-f]+$", ("after",)),
    Step("small items", "PUT", r"/__RANK_0\.distcp$"),
    Step("beginning of an upload", "POST", r"/__RANK_1\.distcp\?uploads", ("after",)),
    Step("part", "PUT", r"/__RANK_1\.distcp\?.*partNumber=\d"),
    Step("end of an upload", "POST", r"/__RANK_1\.distcp\?.*uploadId=", ("before", "after")),
    Step("receipt", "PUT", r"/receipt-00000RANK\.json$"),
    Step("attempt's manifest", "PUT", r"/attempt-[^/]+/manifest\.json$"),
    Step("manifest", "PUT", r"/step-\d+/manifest\.json$"),
    Step("commit", "PUT", r"/step-\d+/\.metadata$"),
    Step("removal of the old commit", "DELETE", r"/step-\d+/\.metadata$", ("after",)),
    Step("removal of the old manifest", "DELETE", r"/step-\d+/manifest\.json$", ("after",)),
    Step("removal of old data", "DELETE", r"/attempt-[^/]+/__\d_\d\.distcp$", ("after",)),
    Step("removal of old notes", "DELETE", r"/attempt-[^/]+/(receipt-\d+|manifest)\.json$", ("after",)),
)
"""Of a save that commits and removes the one before, in order."""
STEPS_OF_A_FAILURE = (
    Step("giving an upload up", "DELETE", r"/__RANK_1\.distcp\?.*uploadId=", ("before", "after")),
    Step("note of the failure", "PUT", r"/aborted\.json$"),
)
"""What comes besides where a part cannot be stored."""
COMMIT = [step.name for step in STEPS].index("commit")
AFTER_COMMIT = [step.name for step in STEPS[COMMIT + 1 :]]


@dataclass(frozen=True)
class Case:
    """Rank `sender` is at `step`; the `victims` die."""

    step: Step
    moment: str
    sender: int
    victims: tuple[int, ...]

    def __str__(self) -> str:
        who = (
            "all"
            if len(self.victims) == WORLD_SIZE
            else {COORDINATOR: "coordinator", WRITER: "writer"}[self.victims[0]]
        )
        return f"{who}-{self.moment}-{self.step.name}".replace(" ", "-")

    @property
    def commits(self) -> bool:
        """Whether the checkpoint that was being saved is there in the end."""
        if self.step in STEPS_OF_A_FAILURE:
            return False
        if self.victims == (WRITER,):
            return (self.step.name, self.moment) == ("receipt", "after")  # the coordinator goes on
        return (STEPS.index(self.step), self.moment) >= (COMMIT, "after") and self.moment != "middle"


def cases_of(steps: Sequence[Step]) -> list[Case]:
    """At each step the one who is at it dies, at every moment; and after it the others of whom that means something."""
    everybody = tuple(range(WORLD_SIZE))
    found = []
    for step in steps:
        sender = WRITER if step.is_of_each_rank else COORDINATOR
        found += [Case(step, moment, sender, (sender,)) for moment in step.moments]
        if step.is_of_each_rank:
            found.append(Case(step, "after", COORDINATOR, (COORDINATOR,)))
        if step.name not in AFTER_COMMIT:  # there the others have nothing to do any more
            found.append(Case(step, "after", sender, everybody))
    return found


CONDITIONAL = ("claim", "end of an upload", "receipt", "attempt's manifest", "manifest", "commit")
"""Steps in which a server that honours conditions could answer otherwise than one that ignores them."""


def on_servers(steps: Sequence[Step]) -> list[object]:
    """All cases on a real gateway; those that leave most behind on a server that honours conditions, too, or in the
    suite instead.
    """
    rows = [("juicefs", case) for case in cases_of(steps)]
    conditional = [step for step in steps if step.name in CONDITIONAL or step in STEPS_OF_A_FAILURE]
    of_all = [case for case in cases_of(conditional) if len(case.victims) == WORLD_SIZE]
    rows += [("moto", case) for case in of_all]
    return [
        (sample.rest if server == "juicefs" and case in of_all else pytest.param)(server, case, id=f"{server}-{case}")
        for server, case in rows
    ]


class Kept(StoreWrapper):
    """A store that stays open when it is closed."""

    def close(self) -> None:
        pass


class Run:
    """One run, whose newest good checkpoint is of `step`; every case goes on where the one before has ended."""

    def __init__(self, server: S3Server, proxy: FaultProxy, ranks: Ranks) -> None:
        prefix = uuid.uuid4().hex
        self.proxy = proxy
        self.store = open_store(server.url(prefix))
        # one client for all cases: to make one takes longer than most of what is done with it
        self.url = f"deaths-{server.kind}://"
        register_scheme(f"deaths-{server.kind}", lambda rest: Kept(self.store))
        self._through = proxy.url(prefix)
        self._environment = server.environment
        self._ranks = ranks
        self._steps = itertools.count(10, 10)
        self.step = 0

    def save(self, case: Case | None = None) -> int:
        """Save a new step, with that death; its number."""
        step, patience_s = next(self._steps), [NEVER_S] * WORLD_SIZE
        if case is None:
            self._ranks.run(cases.save, self._through, self._environment, step, patience_s, world_size=WORLD_SIZE)
            return step
        pids = self._ranks.pids(WORLD_SIZE)
        death = Death(case.moment, case.step.method, case.step.of(case.sender), pids=[pids[r] for r in case.victims])
        self.proxy.faults.insert(0, death)
        if not case.commits:
            patience_s = [NEVER_S if rank in case.victims else GIVE_UP_S for rank in range(WORLD_SIZE)]
        survivors = self._ranks.run_losing(
            case.victims, cases.save, self._through, self._environment, step, patience_s, world_size=WORLD_SIZE
        )
        assert death.num_done == 1
        # of a coordinator that dies in the opening its peer learns from the process group
        assert set(survivors.values()) <= {case.commits, None}
        return step

    def check(self, expected: int) -> None:
        """`restore` finds `expected` and sets nothing aside; after `ckpt gc` that verifies, and no orphan is left."""
        events: list[str] = []
        state = cases.whole(0)
        with Checkpointer(
            self.url, job=JobIdentity(lineage=cases.LINEAGE), on_event=lambda name, _: events.append(name)
        ) as ckpt:
            assert ckpt.restore(state) == expected
        assert cases.is_whole(state, expected)
        assert [name for name in events if name != "checkpoint_unconditional"] == ["restored"]
        with pytest.MonkeyPatch.context() as patch:
            later_s = time.time() + 30 * 3600
            patch.setattr(time, "time", lambda: later_s)
            assert main(["ckpt", "gc", self.url]) == 0
        store = self.store
        prefixes = inspection.checkpoints(inspection.locate(self.url))
        assert layout.step_folder(expected) + "/" == prefixes[0]
        wanted = {layout.OWNER}
        for prefix in prefixes:
            assert inspection.verify(store, prefix).problems == ()
            wanted |= {prefix + layout.METADATA, prefix + layout.MANIFEST}
            attempt = load_manifest(store.read(prefix + layout.MANIFEST), prefix).attempt
            wanted |= {info.key for info in store.list(prefix + layout.attempt_folder(attempt) + "/")}
        assert {info.key for info in store.list("")} == wanted
        assert store.uploads() == []
        self.step = expected


@pytest.fixture(scope="module")
def runs(ranks: Ranks) -> Iterator[Callable[[S3Server], Run]]:
    """The run on a server: one for all cases, whichever of them are asked for."""
    found: dict[str, Run] = {}
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())

        def run_on(server: S3Server) -> Run:
            for name, value in server.environment.items():
                patch.setenv(name, value)
            if server.kind not in found:
                run = found[server.kind] = Run(server, stack.enter_context(FaultProxy(server)), ranks)
                run.step = run.save()
            return found[server.kind]

        yield run_on


@pytest.fixture
def run(request: pytest.FixtureRequest, runs: Callable[[S3Server], Run]) -> Iterator[Run]:
    """That on the server of the case; its next save meets no fault of the last."""
    run = runs(request.getfixturevalue(f"_{request.param}"))
    yield run
    run.proxy.faults.clear()


def changes(run: Run) -> list[tuple[str, str]]:
    return [(method, target) for method, target in run.proxy.requests if method not in ("GET", "HEAD")]


@pytest.mark.parametrize("run", ["juicefs", "moto"], indirect=True)
def test_every_change_of_a_save_is_a_step(run: Run) -> None:
    """A new kind of request in the protocol is a new row of STEPS, and so a new case below."""
    run.proxy.requests.clear()
    run.check(run.save())
    steps = [[step.name for step in STEPS if step.matches(*change)] for change in changes(run)]
    assert all(len(names) == 1 for names in steps), [c for c, n in zip(changes(run), steps, strict=True) if len(n) != 1]
    assert {names[0] for names in steps} == {step.name for step in STEPS}


@pytest.mark.slow
@pytest.mark.parametrize(("run", "case"), on_servers(STEPS), indirect=["run"])
def test_a_death_leaves_the_old_or_the_new_checkpoint(run: Run, case: Case) -> None:
    before, step = run.step, run.save(case)
    run.check(step if case.commits else before)


@pytest.mark.slow
@pytest.mark.parametrize(("run", "case"), on_servers(STEPS_OF_A_FAILURE), indirect=["run"])
def test_a_death_while_a_save_fails(run: Run, case: Case) -> None:
    sender = case.sender if case.step.is_of_each_rank else WRITER
    run.proxy.faults.append(Fault("error", "PUT", f"__{sender}_1.distcp?partNumber=2", times=1_000_000))
    before = run.step
    run.save(case)
    run.check(before)
