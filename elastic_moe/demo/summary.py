"""What the demo proved, as numbers. Pure: events and metrics in, `Summary` out."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

from elastic_moe.demo.phases import phases
from elastic_moe.demo.records import Record, by_generation, last_by_step
from launcher import EventName

# fp32 sums in another order: the project's bar for "the same loss".
LOSS_REL_DIFF_LIMIT = 1e-5
# Of the first loss; text read as bytes starts at ln(256) and falls below half of it within a hundred steps.
LOSS_FALL_LIMIT = 0.75


@dataclasses.dataclass(frozen=True)
class Generation:
    """One round of the job."""

    generation: int
    world_size: int
    mesh: dict[str, int] | None
    reason: str
    steps: tuple[int, int] | None
    """First and last step that it completed."""


@dataclasses.dataclass(frozen=True)
class Summary:
    """The demo's outcome. Losses are nats per token, times seconds of the nodes' one wall clock."""

    steps: int
    seed: int
    loss_first: float
    loss_last: float
    recovered_s: float | None
    """From the kill to the survivors' first completed step."""
    phases_s: dict[str, float]
    """What that time went to, see `phases`."""
    paused_s: float | None
    """From the last step without the returned node to the first with it."""
    steps_replayed: int
    """Steps done again after the kill."""
    steps_lost_on_return: int
    """Steps done again after the node was taken in."""
    loss_rel_diff_max: float
    """Against the unbroken run, over all steps."""
    generations: tuple[Generation, ...]
    ok: bool
    problems: tuple[str, ...]
    """Why `ok` is false. The machine's speed is no part of it."""

    def to_json(self) -> str:
        """Indented JSON of every field; a number that does not exist is null."""
        return json.dumps(_finite(dataclasses.asdict(self)), indent=2) + "\n"


def summarize(
    *, events: Sequence[Record], metrics: Sequence[Record], unbroken: Sequence[Record], steps: int, seed: int
) -> Summary:
    """Compute what a demo has proved from its events and metrics.

    Args:
        events: Both nodes' events and the driver's, in the order of time.
        metrics: Rank 0's metrics, replayed steps included.
        unbroken: Metrics of the run that nothing happened to.
        steps: Steps that the job was to train.
        seed: Its seed.
    """
    final, expected = last_by_step(metrics), last_by_step(unbroken)
    killed = next((event for event in events if event["event"] == "demo_node_killed"), None)
    rounds = _rounds(events, metrics)
    lost, returned = _turns(rounds, killed)
    done = dict(by_generation(metrics))
    losses = [record["loss"] for record in final.values()]
    rel_diff = max(
        (
            abs(final[step]["loss"] - expected[step]["loss"]) / abs(expected[step]["loss"])
            for step in final.keys() & expected
        ),
        default=math.nan,
    )
    recovered_s, phases_s = None, {}
    if killed and lost and (after := done.get(lost.generation)):
        recovered_s = round(after[0]["ts"] - killed["ts"], 3)
        phases_s = phases(events, killed["ts"], after[0]["ts"])
    paused_s = None
    if lost and returned and (before := done.get(lost.generation)) and (after := done.get(returned.generation)):
        paused_s = round(after[0]["ts"] - before[-1]["ts"], 3)
    summary = Summary(
        steps=len(final),
        seed=seed,
        loss_first=losses[0] if losses else math.nan,
        loss_last=losses[-1] if losses else math.nan,
        recovered_s=recovered_s,
        phases_s=phases_s,
        paused_s=paused_s,
        steps_replayed=_done_again(done, lost),
        steps_lost_on_return=_done_again(done, returned),
        loss_rel_diff_max=rel_diff,
        generations=tuple(rounds),
        ok=False,
        problems=(),
    )
    problems = [
        *_incomplete("the interrupted run", final, steps),
        *_incomplete("the unbroken run", expected, steps),
        *_problems(summary, killed, lost, returned),
    ]
    return dataclasses.replace(summary, ok=not problems, problems=tuple(problems))


def _rounds(events: Sequence[Record], metrics: Sequence[Record]) -> list[Generation]:
    done = dict(by_generation(metrics))
    rounds: dict[int, Generation] = {}
    for event in events:
        if event["event"] == EventName.ROUND_FORMED:
            generation = event["generation"]
            trained = [record["step"] for record in done.get(generation, [])]
            rounds[generation] = Generation(
                generation=generation,
                world_size=event["world_size"],
                mesh=event["mesh"],
                reason=event["reason"],
                steps=(min(trained), max(trained)) if trained else None,
            )
    return [rounds[generation] for generation in sorted(rounds)]


def _turns(rounds: Sequence[Generation], killed: Record | None) -> tuple[Generation | None, Generation | None]:
    """The round that went on without the killed node, and the one that took it back."""
    if killed is None:
        return None, None
    later = [each for each in rounds if each.generation > killed["generation"] and each.steps]
    lost = next(iter(later), None)
    returned = next((each for each in later if lost and each.world_size > lost.world_size), None)
    return lost, returned


def _done_again(done: dict[int, list[Record]], since: Generation | None) -> int:
    """Steps of earlier generations that `since` completed once more."""
    if since is None:
        return 0
    earlier = {record["step"] for number, records in done.items() if number < since.generation for record in records}
    return len(earlier & {record["step"] for record in done.get(since.generation, [])})


def _incomplete(name: str, records: dict[int, Record], steps: int) -> list[str]:
    if len(records) == steps and not any(not math.isfinite(record["loss"]) for record in records.values()):
        return []
    return [f"{name} has {len(records)} steps with a loss, not {steps}"]


def _problems(
    summary: Summary, killed: Record | None, lost: Generation | None, returned: Generation | None
) -> list[str]:
    checks = {
        "no node was killed": killed is not None,
        "no round trained on after the kill": lost is not None and summary.recovered_s is not None,
        "the killed node was not taken in again": returned is not None,
        f"{summary.steps_lost_on_return} steps were lost when the node returned": summary.steps_lost_on_return == 0,
        f"the losses differ from the unbroken run's by {summary.loss_rel_diff_max:.1e}, more than "
        f"{LOSS_REL_DIFF_LIMIT:.0e}": summary.loss_rel_diff_max <= LOSS_REL_DIFF_LIMIT,
        f"the loss fell from {summary.loss_first:.3f} to {summary.loss_last:.3f} only": summary.loss_last
        <= LOSS_FALL_LIMIT * summary.loss_first,
    }
    return [problem for problem, fine in checks.items() if not fine]


def _finite(value: Any) -> Any:
    """Return the number, or None where it is not finite: JSON knows no NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value
