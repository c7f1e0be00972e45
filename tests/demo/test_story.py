"""The story, word for word."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from elastic_moe.demo.story import Story

TOLD = """\
   0.0 s  node-1 is started
   1.0 s  node-1 joins with 2 slots
   1.1 s  node-2 is started
   3.0 s  node-2 joins with 2 slots
   3.1 s  generation 1 (first round): 4 ranks on node-1, node-2; mesh replicate 1 x shard 2 x expert 2, 1 round of 4 samples a rank
  10.5 s  training: step 1, loss 5.329
  20.7 s  node-2 is killed whole (SIGKILL: its agent and 2 workers) while step 22 runs
  21.0 s  rank 1 on node-1 failed with exit code 1
  21.1 s  node-2 lost: its agent at 127.0.0.1:5 is gone (connection refused), 0.4 s after it was killed
  21.2 s  generation 2 (node-2 lost): 2 ranks on node-1; mesh re-planned to replicate 1 x shard 1 x expert 2, 1 round of 8 samples a rank
  22.9 s  rank 0 on node-1 has the state after step 20
  23.5 s  training goes on: step 21, loss 3.225, 2.8 s after node-2 was killed, 1 step done again
  25.0 s  node-2 is started again
  28.0 s  node-2 joins with 2 slots
  32.6 s  workers are asked to stop at a step boundary: join: node-2
  33.1 s  generation 3 (join: node-2): 4 ranks on node-1, node-2; mesh re-planned to replicate 1 x shard 2 x expert 2, 1 round of 4 samples a rank
  34.5 s  training goes on: step 41, loss 2.451, 1.5 s after step 40, no step lost
  44.5 s  the job is over: succeeded
"""  # noqa: E501 - sentences as they are printed


def test_the_whole_story(play: Any, in_order: Callable[[Any], list[dict[str, Any]]]) -> None:
    story = Story(start_ts=1000.0)
    told = []
    for record in in_order(play):
        told += story.hear(record) if "event" in record else story.hear_metrics(record)
    assert "\n".join(told) + "\n" == TOLD


def test_a_failed_checkpoint_is_told() -> None:
    event = {"ts": 5.0, "node": "node-1-aaaaaaaa", "event": "checkpoint_failed", "step": 10, "reason": "no space left"}
    assert list(Story(0.0).hear(event)) == ["   5.0 s  the checkpoint of step 10 failed: no space left"]


def test_unknown_events_add_nothing() -> None:
    assert list(Story(0.0).hear({"ts": 5.0, "node": "node-1", "event": "checkpoint_staged"})) == []
