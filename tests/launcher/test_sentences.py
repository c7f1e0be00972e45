"""Events in words: each has a sentence, of fields that are documented."""

from __future__ import annotations

import re
import string
from pathlib import Path

import pytest

from launcher.events import EventName
from launcher.reports import sentences
from launcher.reports.sentences import sentence
from launcher.rounds.failures import FailureClass
from launcher.rounds.mesh import describe_mesh
from launcher.rounds.records import Verdict

PAGE = (Path(__file__).parents[2] / "docs" / "launcher.md").read_text()
COMMON = {"node", "generation", "rank"}


@pytest.mark.parametrize("name", EventName)
def test_every_event_has_a_sentence_of_its_documented_fields(name: EventName) -> None:
    said = sentences._SENTENCES[name]
    assert sentence({"event": str(name), "node": "a-1"}), "whatever else is missing"
    if isinstance(said, str):
        short = str(name).removeprefix("checkpoint")
        (row,) = [r for r in PAGE.splitlines() if r.startswith("|") and re.match(rf"\|[^|]*`({name}|{short})`", r)]
        used = {field for _, field, _, _ in string.Formatter().parse(said) if field}
        assert used <= {*re.findall(r"`(\w+)`", row), *COMMON}


def test_what_a_line_lacks_is_left_open() -> None:
    assert sentence({"event": "node_joined", "node": "a-1", "slots": 2}) == "a-1 joins with 2 slots"
    assert sentence({"event": "node_joined", "node": "a-1"}) == "a-1 joins with ? slots"


def test_a_scripts_own_event_is_told_with_its_fields() -> None:
    event = {"ts": 1.0, "run_id": "r", "node": "a-1", "generation": 2, "event": "mine", "rank": 3, "long": [1, 2]}
    assert sentence(event) == "a-1: mine rank=3"
    assert sentence({"event": "mine", "node": "a-1"}) == "a-1: mine"


@pytest.mark.parametrize(
    ("exit_code", "told"), [(None, "node a-1 ended: done"), (70, "node a-1 ended: done (exit code 70)")]
)
def test_a_nodes_end_has_its_exit_code_if_it_is_known(exit_code: int | None, told: str) -> None:
    assert sentence({"event": "node_ended", "node": "a-1", "reason": "done", "exit_code": exit_code}) == told


@pytest.mark.parametrize(
    ("mesh", "words"),
    [
        ({"replicate": 2, "shard": 3, "expert": 4, "idle": 0}, "replicate 2 x shard 3 x expert 4"),
        ({"replicate": 1, "shard": 1, "expert": 2, "idle": 1}, "replicate 1 x shard 1 x expert 2, 1 idle"),
    ],
)
def test_meshes_in_words(mesh: dict[str, int], words: str) -> None:
    assert describe_mesh(mesh) == words


def test_every_failure_and_every_end_has_words() -> None:
    assert set(sentences._HOW_IT_FAILED) == set(FailureClass)
    assert set(sentences._ADVICE) <= set(Verdict)
