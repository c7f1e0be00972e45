"""What `report` says of real jobs, against what their scripts wrote down themselves."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from elastic_moe.cli import main as cli
from launcher.reports.goodput import Cause, account
from tests import sample
from tests.cluster import cluster, read_lines, until

SCRIPTS = Path(__file__).parent / "scripts"
BUSY_S = 1.5  # what busy cores take to wake a process, which tells that much later what has happened

pytestmark = pytest.mark.slow


def steps(folder: Path, generation: int) -> list[dict[str, float]]:
    return [line for line in read_lines(folder / "steps.jsonl") if line["generation"] == str(generation)]


@pytest.mark.parametrize("mode", ["checkpointer", sample.rest("own")])
def test_a_script_as_readme_shows_it(mode: str, tmp_path: Path) -> None:
    """18 of its 60 steps are done again. Neither its Checkpointer nor its heartbeats are wired to anything by hand."""
    with cluster(tmp_path) as job:
        node = job.start("a", str(SCRIPTS / "like_readme.py"), str(tmp_path), mode, nnodes="1:1", nproc=2)
        assert node.wait() == 0, node.output
        events = job.events()
    told = account(events)
    first, second = steps(tmp_path, 1), steps(tmp_path, 2)
    assert ([s["step"] for s in first], [s["step"] for s in second]) == ([*range(1, 31)], [*range(13, 61)])

    (stop,) = told.interruptions
    assert (stop.cause, stop.steps_redone, told.steps_redone, told.last_step) == (Cause.FAILURE, 18, 18, 60)
    assert stop.seconds == pytest.approx(second[0]["b"] - first[-1]["e"], rel=0.1, abs=BUSY_S)
    assert told.seconds[Cause.LOST_WORK] == pytest.approx(first[-1]["e"] - first[12]["b"], rel=0.1, abs=BUSY_S)
    assert told.seconds[Cause.LOST_WORK] > 0
    kept_s = sum(s["e"] - s["b"] for s in [*first[:12], *second])
    assert told.seconds[Cause.TRAINING] >= 0.9 * kept_s
    # From its last step to the job's last event processes end, which is no training's time, and theirs to take.
    whole_s = first[11]["e"] - first[0]["b"] + told.ended_ts - second[0]["b"]
    assert told.seconds[Cause.TRAINING] + told.seconds[Cause.CHECKPOINT] <= 1.1 * whole_s + BUSY_S
    if mode != "own":
        names = [e["event"] for e in events]
        assert [(e["generation"], e["step"]) for e in events if e["event"] == "restored"] == [(2, 12)] * 2
        assert names.count("checkpoint_committed") == 2, "nothing twice"
        assert names.count("checkpoint_staged") == 2 * 2


@pytest.mark.parametrize("comes_back", [True, False])
def test_the_store_went_with_its_host(tmp_path: Path, capsys: pytest.CaptureFixture[str], comes_back: bool) -> None:
    """Its own node is the root cause, not the survivor whose workers fail next. Started again as it was, the job goes
    on by itself; else the survivor waits as long as it was told to, and its last words say what to do.
    """
    with cluster(tmp_path) as job:
        script = (str(SCRIPTS / "cooperative.py"), str(tmp_path))
        host = job.start("host", *script, nnodes="2:2")
        until("the host", lambda: "waiting: 1 of at least 2" in host.output)
        conf = "lease_ttl=4,timeout=600" if comes_back else "lease_ttl=4,timeout=6"
        survivor = job.start("survivor", *script, nnodes="2:2", conf=conf)
        until("steps", lambda: read_lines(tmp_path / "steps.jsonl")[5:])
        host.kill()
        lost = job.wait_event("store_host_lost")
        assert (lost["node"][:8], lost["node_lost"][:4], lost["refused"]) == ("survivor", "host", True)
        if comes_back:
            host = job.start("host", *script, nnodes="2:2")
            done = len(read_lines(tmp_path / "steps.jsonl"))
            until("steps", lambda: read_lines(tmp_path / "steps.jsonl")[done + 5 :])
            (tmp_path / "finish").touch()
            assert (survivor.wait(), host.wait()) == (0, 0), survivor.output
        else:
            assert survivor.wait() == 75, survivor.output
            (last,) = [
                line for line in survivor.output.splitlines() if "no round within 6 s" in line and "error" in line
            ]
            assert f"node {lost['node_lost']}, which hosted the store, is gone" in last
            assert "--rdzv-endpoint /shared/meet" in last
        told = account(job.events())
    stop = told.interruptions[0]
    assert (stop.cause, stop.nodes) == (Cause.NODE_LOSS, (lost["node_lost"],))
    assert stop.root.startswith(f"the store went with node {lost['node_lost']}, which hosted it: the store at 127.")
    assert (stop.resumed_ts is not None, told.outcome) == ((True, "succeeded") if comes_back else (False, ""))
    assert comes_back or re.match(r"survivor-\w{8}: no round within 6 s \(node host-", told.end)
    assert cli.main(["report", str(tmp_path), "--json"]) == 0
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    assert run["outages"][0]["store"] == "job store"
