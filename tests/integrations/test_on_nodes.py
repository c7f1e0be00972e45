"""Scripts of the frameworks on two nodes, of which one is killed: they go on from the last checkpoint, and end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from storage import inspection
from tests import sample
from tests.cluster import Cluster, cluster, read_lines, until

SCRIPTS = Path(__file__).parent / "scripts"
STEPS = 60
DEADLINE_S = 120.0
"""Two nodes import a framework at once, on a machine that may be busy."""

pytestmark = pytest.mark.slow


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Cluster]:
    with cluster(tmp_path / "nodes") as made:
        yield made


@pytest.mark.parametrize(
    ("framework", "start"),
    [
        pytest.param("transformers", (), id="transformers"),
        pytest.param("lightning", ("--cold-workers",), id="lightning"),
        sample.rest("accelerate", ("--cold-workers",), id="accelerate"),  # which is what transformers trains with
    ],
)
def test_a_killed_node(nodes: Cluster, tmp_path: Path, framework: str, start: tuple[str, ...]) -> None:
    """With one of them nodes learn what its workers import, which is to import it twice more on each of them."""
    pytest.importorskip(framework)

    def reached(step: int, world_size: int) -> bool:
        told = read_lines(tmp_path / "steps.jsonl")
        return any(line["step"] >= step and line["world_size"] == world_size for line in told)

    nodes.environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    work = (*start, str(SCRIPTS / f"with_{framework}.py"), str(tmp_path), str(STEPS))
    first = nodes.start("first", *work, conf="last_call=60")
    nodes.wait_event("node_joined")
    second = nodes.start("second", *work, conf="last_call=60")
    until("both saved", lambda: any(e["step"] >= 10 for e in nodes.events("checkpoint_committed")), DEADLINE_S)
    second.kill()
    until("the survivor goes on", lambda: reached(1, 1), DEADLINE_S)
    (tmp_path / "hurry").touch()
    assert first.wait() == 0, first.output
    assert read_lines(tmp_path / "done.jsonl") == [{"rank": 0, "world_size": 1, "step": STEPS, "updates": STEPS}]
    restored = nodes.events("restored", generation=2)[-1]
    assert restored["step"] >= 10
    told = [line["step"] for line in read_lines(tmp_path / "steps.jsonl") if line["world_size"] == 1]
    assert told == list(range(restored["step"] + 1, STEPS + 1)), "no step twice, none left out"
    (newest, *_) = inspection.summaries(inspection.locate(str(tmp_path / "checkpoints")))
    assert (newest.step, newest.state) == (STEPS, "committed")
