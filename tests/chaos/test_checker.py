"""The checker itself: it passes what is allowed and finds each thing that must never be."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

from tests.chaos.history import History, Life, Step, violations


def history(steps_of_2: range = range(4, 6), steps_of_3: range = range(6, 8)) -> History:
    """Three generations: of nodes a and b, of a alone, of both again. Steps take 0.1 s."""
    steps, lives = [], []
    rounds = ((1, "ab", 0.0, range(1, 4)), (2, "a", 10.0, steps_of_2), (3, "ab", 20.0, steps_of_3))
    for generation, nodes, began_s, done in rounds:
        for rank, node in enumerate(nodes):
            pid = 100 * generation + rank
            for i, step in enumerate(done):
                begin_s = began_s + 0.1 * i
                steps.append(Step(step, generation, rank, len(nodes), f"{node}-12ab", pid, begin_s, begin_s + 0.1))
            lives.append(Life(generation, rank, f"{node}-12ab", began_s + 1.0))
    return History(tuple(steps), tuple(lives))


def changed(generation: int, step: int, /, **fields: Any) -> History:
    """With other fields for rank 0's part in a step."""
    before = history()
    steps = [
        dataclasses.replace(s, **fields) if (s.generation, s.step, s.rank) == (generation, step, 0) else s
        for s in before.steps
    ]
    return History(tuple(steps), before.lives)


def test_what_is_allowed() -> None:
    assert violations(history()) == []
    assert violations(history(range(3, 6), range(5, 8))) == [], "a step that was not yet saved is done again"


def test_a_thawed_node_may_end_its_step_late_and_begin_none() -> None:
    late = changed(1, 3, end_s=10.05)
    assert violations(late)
    assert violations(late, thawed=["a"]) == []
    (found,) = violations(changed(1, 3, begin_s=10.05, end_s=10.2), thawed=["a"])
    assert found == "thawed a-12ab began step 3 of generation 1 after a later one"


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (history(range(5, 6)), r"steps skipped: \[4\]"),
        (history(range(2, 6)), "generation 2 did 2 steps of generation 1 again"),
        (changed(2, 5, step=6), r"worker 200 of generation 2 did steps \[4, 6\]"),
        (changed(1, 3, end_s=10.05), "generation 1 ends a step 0.050 s after 2 began one"),
        (changed(1, 2, world_size=3), r"generation 1: world sizes \{2, 3\}"),
        (changed(1, 2, pid=7), r"generation 1: world sizes \{2\}, workers \[\(0, 7\), \(0, 100\)"),
        (History(history().steps, (Life(1, 0, "a-12ab", 10.2),)), "of generation 1 on a-12ab lives 0.200 s after"),
    ],
)
def test_what_must_not_be(wrong: History, told: str) -> None:
    found = violations(wrong)
    assert any(re.search(told, line) for line in found), found
