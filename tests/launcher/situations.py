"""Situations that a leader decides about: nodes, rounds and views of them, and what it makes of one."""

from __future__ import annotations

import dataclasses

from launcher.rounds.membership import Propose, Rules, View, decide
from launcher.rounds.records import (
    Breakage,
    Failure,
    Node,
    Participant,
    Round,
    Status,
)

RULES = Rules(min_nodes=2, max_nodes=3, last_call_s=2.0, join_cooldown_s=5.0, join_settle_s=0.5, max_restarts=1)
LIMITS = {"min_nodes": RULES.min_nodes, "max_nodes": RULES.max_nodes}
FAILURE = Failure(rank=1, exit_code=1, message="boom", ts=10.0)


def every_slot(slots, previous):
    return None


def node(name: str, seniority: int = 0, **fields) -> Node:
    fields = {"host": name, "address": "127.0.0.1", "port": 1, "slots": 2, **fields}
    return Node(node_id=name, seniority=seniority or ord(name[0]), **fields)


def running(*names: str, **fields) -> tuple[Node, ...]:
    return tuple(node(name, status=Status.RUNNING, generation=1, **fields) for name in names)


def round_of(*names: str, **fields) -> Round:
    participants = tuple(Participant(name, 2) for name in names)
    return Round(
        **{
            "generation": 1,
            "lineage": "L",
            "participants": participants,
            "mesh": None,
            "spares": (),
            "reason": "",
            "complete": True,
            **fields,
        }
    )


def view(nodes: tuple[Node, ...], current: Round | None = None, **fields) -> View:
    times = {"nodes_changed_s": 0.0, "formed_s": 0.0, "broken_s": 0.0}
    return View(nodes=nodes, round=current, lineage="L", **{**times, **fields})


def act(seen: View, now_s: float = 100.0, rules: Rules = RULES, planner=every_slot):
    """What is decided once all have been told that the round is broken, where it is."""
    action = decide(seen, rules, planner, now_s)
    if isinstance(action, Propose) and seen.round and action.round.broken != seen.round.broken:
        return decide(dataclasses.replace(seen, round=action.round), rules, planner, now_s)
    return action


def told(seen: View) -> Breakage | None:
    """What the leader tells of the round before anything else, if it does."""
    action = decide(seen, RULES, every_slot, 100.0)
    return action.round.broken if isinstance(action, Propose) and action.round.generation == 1 else None
