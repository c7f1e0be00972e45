"""What `join_pause` makes of the events of a join."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import psutil
import pytest

from tests.bench import backed
from tests.bench.join_pause import FIRST_STEP, is_a_step_of_two, parts_of

MIB = 1024 * 1024


def test_each_part_of_a_pause_ends_where_the_last_node_has_come_to_its_end() -> None:
    events = [
        {"event": "workers_yielded", "ts": 10.5},
        {"event": "round_formed", "ts": 11.0},
        {"event": "round_formed", "ts": 11.25},
        {"event": "restored", "ts": 11.75, "phases": {"read": 0.25, "ask": 0.125}},
        {"event": "restored", "ts": 12.0, "phases": {"read": 0.5}},
        {"event": "round_formed", "ts": 5.0},
        {"event": "run_claimed", "ts": 99.0},
    ]
    found = parts_of(events, 10.0, 12.25)
    assert found == {
        "in the service's hands": 0.5,
        "round": 0.75,
        "restore": 0.75,
        "of it read": 0.5,
        "of it ask": 0.125,
        FIRST_STEP: 0.25,
    }
    assert sum(seconds for part, seconds in found.items() if not part.startswith("of it")) == pytest.approx(2.25)


def test_the_last_line_alone_says_whether_two_have_made_a_step(tmp_path: Path) -> None:
    steps, line = tmp_path / "steps.jsonl", {"step": 1, "ts": 1.0, "pid": 1 << 22, "world_size": 1}
    for text, is_one in (("", False), (json.dumps(line), False), ("\n".join([json.dumps(line)] * 9), False)):
        steps.write_text(text)
        assert is_a_step_of_two(tmp_path) is is_one
    steps.write_text("".join(json.dumps(line | {"world_size": size}) + "\n" for size in (1, 1, 1, 2)))
    assert is_a_step_of_two(tmp_path)


def test_memory_is_held_while_the_block_lasts_and_free_right_after_it() -> None:
    def holders() -> list[psutil.Process]:
        found = []
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error):  # of another test, which has ended
                found += [child] if backed.__name__ in child.cmdline() else []
        return found

    with backed.at_hand(32 * MIB):
        (holder,) = holders()
        assert holder.memory_info().rss > 32 * MIB
    assert holders() == []
    with backed.at_hand(0):
        assert holders() == []
