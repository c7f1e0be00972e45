"""The demo itself, shortened, and what it says when a node fails for good."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from elastic_moe.cli.main import main
from elastic_moe.demo import driver
from tests.bench.demo_kills import Plan, play

NUM_KILLS = int(os.environ.get("LIVE_KILLS", "0"))
NUM_FREEZES = int(os.environ.get("LIVE_FREEZES", "0"))
"""How often the demo's job loses a node, killed or frozen, each time at another moment."""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demo(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Real processes: a node is killed and comes back; the losses are those of an unbroken run.

    It comes back at once, and so in time for fewer steps than a person would see; where it does not, the test does what
    the demo advises.
    """
    monkeypatch.setattr(driver, "STEPS_ALONE", 2)
    monkeypatch.setattr("elastic_moe.cli.demo._STEPS_LEAST", 64)
    out = tmp_path / "demo"
    for steps in (64, 240):
        code = main(["demo", "--out", str(out), "--steps", str(steps), "--seed", "1"])
        told, errors = capfd.readouterr()
        if "try more --steps" not in errors:
            break
    assert code == 0, told + errors
    summary = json.loads((out / "summary.json").read_text())
    assert summary["ok"], summary["problems"]
    assert summary["steps"] == steps
    assert summary["steps_lost_on_return"] == 0
    assert summary["loss_rel_diff_max"] == 0.0
    worlds = [generation["world_size"] for generation in summary["generations"]]
    assert worlds[0] == 4
    assert worlds[-1] == 4
    assert 2 in worlds
    for sentence in (
        "node-2 is killed whole",
        "mesh replicate 2 x shard 1 x expert 2",
        "mesh re-planned to replicate 1 x shard 1 x expert 2",
        "the workers of node-1 cannot go on: ",
        "no step lost",
        "outcome",
    ):
        assert sentence in told
    assert (out / "story.png").stat().st_size > 20_000
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    assert [event["ts"] for event in events] == sorted(event["ts"] for event in events)
    assert {"demo_node_killed", "node_lost", "round_formed", "restored", "finished"} <= {e["event"] for e in events}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("freezes", "num_kills"),
    [
        pytest.param(False, NUM_KILLS, id="killed", marks=pytest.mark.skipif(not NUM_KILLS, reason="LIVE_KILLS=20")),
        pytest.param(
            True, NUM_FREEZES, id="frozen", marks=pytest.mark.skipif(not NUM_FREEZES, reason="LIVE_FREEZES=5")
        ),
    ],
)
def test_a_node_is_lost_at_many_random_moments(tmp_path: Path, num_kills: int, freezes: bool) -> None:
    """No step is done again but by chance, and never more than one; no loss differs in any bit."""
    outcome = play(Plan(num_kills, seed=num_kills, freezes=freezes), tmp_path)
    print(outcome.told())
    redone = [loss.steps_redone for loss in outcome.losses]
    assert max(redone) <= 1
    assert redone.count(0) >= 0.9 * num_kills
    assert not outcome.missing
    assert not outcome.different


def test_a_failing_demo_shows_the_logs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(driver, "job_toml", lambda **paths: "[model]\nfaulty_key = 1\n")
    assert main(["demo", "--out", str(tmp_path)]) == 1
    captured = capfd.readouterr()
    assert "elastic-moe: error: node-1 ended with exit code 2 while waiting for node 1 to join" in captured.err
    assert "--- node-1, the end of" in captured.out
    assert "unknown key model.faulty_key" in captured.out
