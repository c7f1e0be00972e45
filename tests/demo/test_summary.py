"""The demo's judgement: every number by hand, and every way in which it may not be ok."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from elastic_moe.demo.plot import draw
from elastic_moe.demo.records import Tail, last_by_step
from elastic_moe.demo.summary import Summary, summarize

STEPS = 60


def judge(play: Any, steps: int = STEPS) -> Summary:
    return summarize(events=play.events, metrics=play.metrics, unbroken=play.unbroken, steps=steps, seed=7)


def test_a_good_demo(play: Any) -> None:
    summary = judge(play)
    assert summary.problems == ()
    assert summary.ok
    assert (summary.steps, summary.seed) == (STEPS, 7)
    assert summary.recovered_s == pytest.approx(23.5 - 20.7)
    told = {"noticed": 0.4, "round formed": 0.1, "state restored": 1.7, "first step": 0.6}
    assert summary.phases_s == pytest.approx(told), "workers that nobody has told of started within the next phase"
    assert sum(summary.phases_s.values()) == pytest.approx(summary.recovered_s)
    assert summary.paused_s == pytest.approx(34.5 - 33.0)
    assert (summary.steps_replayed, summary.steps_lost_on_return) == (1, 0)
    assert summary.loss_rel_diff_max == pytest.approx(1e-7, rel=1e-4)
    assert summary.loss_first == play.metrics[0]["loss"]
    assert summary.loss_last == play.metrics[-1]["loss"]
    assert [(g.generation, g.world_size, g.steps) for g in summary.generations] == [
        (1, 4, (1, 21)),
        (2, 2, (21, 40)),
        (3, 4, (41, 60)),
    ]
    lost = "node node-2-bbbbbbbb lost: its agent at 127.0.0.1:5 is gone (connection refused)"
    assert summary.generations[1].reason == lost


def spoil_loss(play: Any) -> None:
    play.metrics[30]["loss"] *= 1 + 1e-4


def spoil_replayed_loss(play: Any) -> None:
    """Only the last record of a step counts, and this is it."""
    next(r for r in reversed(play.metrics) if r["step"] == 21)["loss"] *= 1.01


def lose_a_step_on_return(play: Any) -> None:
    again = next(r for r in play.metrics if r["step"] == 40)
    play.metrics.insert(-20, {**again, "generation": 3})


def never_return(play: Any) -> None:
    for record in play.metrics:
        record["generation"] = min(record["generation"], 2)
    play.events = [event for event in play.events if event["generation"] < 3]


def never_kill(play: Any) -> None:
    play.events = [event for event in play.events if event["event"] != "demo_node_killed"]


def never_recover(play: Any) -> None:
    play.metrics = [record for record in play.metrics if record["generation"] == 1]


def drop_unbroken(play: Any) -> None:
    play.unbroken.pop()


def no_number(play: Any) -> None:
    play.metrics[-1]["loss"] = float("nan")


def learn_nothing(play: Any) -> None:
    for record in (*play.metrics, *play.unbroken):
        record["loss"] = 5.5


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (spoil_loss, "the losses differ from the unbroken run's by 1.0e-04, more than 1e-05"),
        (spoil_replayed_loss, "the losses differ from the unbroken run's by 1.0e-02, more than 1e-05"),
        (lose_a_step_on_return, "1 steps were lost when the node returned"),
        (never_return, "the killed node was not taken in again"),
        (never_kill, "no node was killed"),
        (never_recover, "no round trained on after the kill"),
        (drop_unbroken, "the unbroken run has 59 steps with a loss, not 60"),
        (no_number, "the interrupted run has 60 steps with a loss, not 60"),
        (learn_nothing, "the loss fell from 5.500 to 5.500 only"),
    ],
)
def test_what_is_not_ok(play: Any, spoil: Callable[[Any], None], problem: str) -> None:
    spoil(play)
    summary = judge(play)
    assert not summary.ok
    assert problem in summary.problems
    assert json.loads(summary.to_json())["ok"] is False


def test_nothing_was_recorded() -> None:
    summary = summarize(events=[], metrics=[], unbroken=[], steps=STEPS, seed=0)
    assert not summary.ok
    fields = json.loads(summary.to_json())
    assert fields["loss_first"] is None, "JSON has no NaN"
    assert fields["recovered_s"] is None


def test_a_tail_reads_complete_lines_once(tmp_path: Path) -> None:
    tail = Tail(tmp_path / "records.jsonl")
    assert tail.read() == []
    with tail.path.open("a") as file:
        file.write('{"step": 1}\n{"mesh": {"shard": 1}, "st')
        file.flush()
        assert tail.read() == [{"step": 1}]
        assert tail.read() == []
        file.write('ep": 2}\n')
        file.flush()
        assert tail.read() == [{"mesh": {"shard": 1}, "step": 2}]


def test_the_last_record_of_a_step_counts() -> None:
    records = [{"step": 2, "loss": 1.0}, {"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}]
    assert last_by_step(records) == {1: records[1], 2: records[2]}
    assert list(last_by_step(records)) == [1, 2]


@pytest.mark.parametrize("spoil", [None, never_kill, never_recover, never_return])
def test_the_picture_is_drawn_whatever_happened(play: Any, spoil: Callable[[Any], None] | None, tmp_path: Path) -> None:
    if spoil:
        spoil(play)
    path = tmp_path / "story.png"
    draw(path, summary=judge(play), metrics=play.metrics, unbroken=play.unbroken, events=play.events)
    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    assert (int.from_bytes(header[16:20]), int.from_bytes(header[20:24])) == (1600, 900)
