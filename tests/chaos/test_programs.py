"""Programs that are themselves the fault."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.reports.goodput import Cause
from tests.chaos.job import Job

pytestmark = pytest.mark.slow

ALL = "last_call=60,join_cooldown=1"
BROKEN_IMPORT = str(Path(__file__).parent / "scripts" / "broken_import.py")


@pytest.mark.whole  # on one node: tests/launcher/test_failing_jobs.py
def test_a_script_with_an_error_at_import(job: Job) -> None:
    """The job fails on all nodes, and says why; no step was done."""
    options = ("--max-restarts", "1", BROKEN_IMPORT)
    nodes = [job.node(name, nnodes="2:2", conf=ALL, options=options) for name in ("a", "b")]
    assert [node.wait() for node in nodes] == [70, 70], job.told()
    assert all("there_is_no_such_package" in node.output for node in nodes), job.told()
    assert len(job.events("round_formed")) == 1, "not tried again"
    (finished,) = job.events("finished")
    assert finished["outcome"].startswith("failed: worker of rank")
    told = job.account()
    assert [(i.cause, i.resumed_ts) for i in told.interruptions] == [(Cause.FAILURE, None)]
    assert "there_is_no_such_package" in told.interruptions[0].root
    assert (told.seconds[Cause.TRAINING], told.outcome, told.last_step) == (0.0, finished["outcome"], None)


@pytest.mark.whole  # on two nodes without a history of steps: tests/launcher/test_failing_jobs.py
def test_a_script_that_fails_at_the_same_step_always(job: Job) -> None:
    """It is not run for ever: the job ends on all nodes, with the error that was the cause."""
    script = ("--fail", "7")
    nodes = job.nodes("a", "b", nnodes="2:2", conf=ALL, script=script)
    assert [node.wait() for node in nodes] == [70, 70], job.told()
    assert all("ArithmeticError: step 7 cannot be computed" in node.output for node in nodes), job.told()
    job.check()
    assert job.history().done() == [1, 2, 3, 4, 5, 6]
    assert len(job.events("round_formed")) == 2, "once more, in case it passes"
    told = job.account()
    assert [i.cause for i in told.interruptions] == [Cause.FAILURE, Cause.FAILURE]
    assert all("step 7 cannot be computed" in i.root and i.nodes[0][0] == "b" for i in told.interruptions), told
    assert [i.resumed_ts for i in told.interruptions] == [None, None], "no step was done again or anew"


def test_a_worker_that_hangs_in_a_collective(job: Job) -> None:
    """It is found by its missing heartbeats, its stack is written down, and all go on from the step before."""
    options = ("--hang-timeout", "3", "--max-restarts", "1")
    nodes = job.nodes("a", "b", "c", nnodes="3:3", conf=ALL, script=("--hang", "30"), options=options)
    job.steps(3, after=1)
    job.finish(*nodes)
    (cause,) = job.events("root_cause")
    assert (cause["rank"], cause["failure_class"]) == (2, "hang"), job.told()
    stacks = (job.folder / "stacks" / "generation-1" / "rank-2.txt").read_text()
    assert "job.py" in stacks, "where it hangs"
    assert job.history().done(1)[-1] == 29
    job.told_as(Cause.HANG, "c")
