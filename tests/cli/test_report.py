"""`elastic-moe report`: from event files to what a person reads."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from elastic_moe.cli import main as cli
from elastic_moe.cli.timeline import timeline

RECORDED = Path(__file__).parent / "report"
"""Events of a real job: two nodes, one killed and taken in again; most checkpoints left out."""


@pytest.fixture(autouse=True)
def time_zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Of whoever reads: an hour east of Greenwich, by no name that a machine might not know."""
    monkeypatch.setenv("TZ", "XYZ-1")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def report(*argv: str) -> int:
    return cli.main(["report", *argv])


def test_the_report_of_a_recorded_job(capsys: pytest.CaptureFixture[str]) -> None:
    """Changed on purpose? `ELASTIC_MOE_UPDATE_GOLDEN=1 pytest tests/cli/test_report.py` writes the file anew."""
    assert report(str(RECORDED)) == 0
    text = capsys.readouterr().out
    golden = RECORDED / "report.txt"
    if "ELASTIC_MOE_UPDATE_GOLDEN" in os.environ:
        golden.write_text(text)
    assert text == golden.read_text()


def test_json_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert report(str(RECORDED), "--json") == 0
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    assert sum(run["seconds"].values()) == pytest.approx(run["wall_s"])
    assert run["goodput"] == pytest.approx(run["seconds"]["training"] / run["wall_s"])
    assert [(one["cause"], one["generation"]) for one in run["interruptions"]] == [("node loss", 1), ("join", 2)]
    assert run["events"]["round_formed"] == 3


def test_files_of_all_nodes_make_one_story_and_none_counts_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (RECORDED / "events.jsonl").read_text().splitlines(keepends=True)
    for node in ("node-1", "node-2"):
        (tmp_path / node).mkdir()
        mine = [line for line in lines if f'"node":"{node}' in line]
        (tmp_path / node / "events.jsonl").write_text("".join(mine))
    assert report(str(RECORDED), "--json") == 0
    whole = json.loads(capsys.readouterr().out)
    assert report(str(tmp_path), str(tmp_path / "node-1" / "events.jsonl"), "--json") == 0
    assert json.loads(capsys.readouterr().out) == whole


def test_runs_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (RECORDED / "events.jsonl").read_text()
    (tmp_path / "events.jsonl").write_text(text + text.replace('"run_id":"demo"', '"run_id":"other"'))
    assert report(str(tmp_path), "--json") == 0
    assert [run["run_id"] for run in json.loads(capsys.readouterr().out)["runs"]] == ["demo", "other"]


def test_lines_that_are_no_events_are_counted_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(RECORDED / "events.jsonl", tmp_path)
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"ts": "soon", "event": "x"}\n[1]\n{"ts": 1790000000, "event": 3}\n{"ts": 17900')
    assert report(str(tmp_path)) == 0
    assert capsys.readouterr().err == "4 lines are no events and were left out\n"


@pytest.mark.parametrize("path", ["none", "."])
def test_without_events_there_is_no_report(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert report(path) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_events_of_another_form_are_told_in_one_line(
    options: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "events.jsonl").write_text('{"ts": 1, "event": "round_formed"}\n')
    assert report(str(tmp_path), *options) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "not as this version of elastic-moe writes them (KeyError: 'generation')" in told


def test_a_job_of_another_version_costs_no_other_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "events.jsonl").write_text(
        (RECORDED / "events.jsonl").read_text()
        + '{"ts": 1, "event": "round_formed", "run_id": "old", "participants": [3], "spares": 5}\n'
    )
    assert report(str(tmp_path), "--json") == 0
    out, err = capsys.readouterr()
    assert [run["run_id"] for run in json.loads(out)["runs"]] == ["demo"]
    assert err.startswith("left out: job 'old': its events are not as this version of elastic-moe writes them (")
    assert err.count("\n") == 1


def test_a_pipe_is_not_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "events.jsonl")
    assert report(str(tmp_path / "events.jsonl")) == 2
    assert "a pipe or a device, and no file of events" in capsys.readouterr().err
    assert report(str(tmp_path)) == 2  # a folder's is passed over
    assert "no events in" in capsys.readouterr().err


def test_whatever_events_hold_there_is_a_report_or_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """EVENT_SEEDS=1000 for more of them."""
    events = [json.loads(line) for line in (RECORDED / "events.jsonl").read_text().splitlines()]
    odd = (None, -1, 1 << 70, 1e300, 1e16, "", "a\nb", "\x1b[2J", [], {}, [[]], [None], True)
    for seed in range(int(os.environ.get("EVENT_SEEDS", "30"))):
        rng = random.Random(seed)
        changed = [dict(event) for event in events]
        for event in rng.sample(changed, rng.choice((1, 3, len(changed)))):
            event[rng.choice(list(event))] = rng.choice(odd)
        (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in changed))
        for options in ((), ("--json",)):
            code = report(str(tmp_path), *options)
            out, err = capsys.readouterr()
            assert code in (0, 2), seed
            assert all(
                each.startswith(("elastic-moe: error: ", "left out: ")) or "left out" in each
                for each in err.splitlines()
            )
            assert "\x1b" not in out, seed


def test_a_clock_that_was_set_is_told_and_changes_no_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events = [json.loads(line) for line in (RECORDED / "events.jsonl").read_text().splitlines()]
    whole = [{**event, "boot_s": event["ts"] - 1_000_000_000} for event in events]
    node = next(event["node"] for event in events if event["event"] == "round_formed")
    own = [event for event in whole if event["node"] == node]
    since_ts = own[len(own) * 2 // 3]["ts"]
    told = []
    for back_s in (0.0, 3600.0):
        set_back = [{**e, "ts": e["ts"] - back_s * (e["node"] == node and e["ts"] >= since_ts)} for e in whole]
        (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in set_back))
        assert report(str(tmp_path), "--json") == 0
        told.append(json.loads(capsys.readouterr().out)["runs"][0])
    (jump,) = told[1].pop("clock_jumps")
    assert (told[0].pop("clock_jumps"), jump["node"], jump["seconds"]) == ([], node, pytest.approx(-3600))
    assert told[1]["goodput"] == pytest.approx(told[0]["goodput"])
    assert told[1]["seconds"] == pytest.approx(told[0]["seconds"], abs=0.01)
    assert report(str(tmp_path)) == 0
    assert f"the clock of {node} was set back by 3600.0 s at " in capsys.readouterr().out


def test_a_number_that_json_lacks_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "events.jsonl").write_text(
        (RECORDED / "events.jsonl").read_text()
        + '{"ts": 1, "event": "mine", "run_id": "other", "loss": NaN}\n'
        + '{"ts": 2, "event": "restored", "run_id": "odd", "seconds": NaN}\n'
    )
    assert report(str(tmp_path), "--json") == 0
    out, err = capsys.readouterr()
    runs = json.loads(out, parse_constant=pytest.fail)["runs"]
    assert {run["run_id"] for run in runs} == {"demo", "other"}
    assert err.startswith("left out: job 'odd'")


def test_unknown_events_are_shown_and_repeats_counted() -> None:
    slow = {"node": "a-1", "generation": 2, "event": "slow_disk", "rank": 3, "factor": 1.5, "window": [1, 2]}
    lost = {"generation": 2, "event": "node_lost", "node_lost": "b-2", "reason": "lost: its lease ended"}
    events = [{"ts": 10 + i, **slow} for i in range(3)] + [{"ts": 13, "node": n, **lost} for n in ("a-1", "c-3")]
    assert timeline(events, 10) == [
        "1970-01-01T01:00:10+01:00       0.0 s  a-1: slow_disk rank=3 factor=1.5 (x3)",
        "1970-01-01T01:00:13+01:00       3.0 s  node b-2 lost: its lease ended",
    ]
