"""Where the time of a restore goes."""

from __future__ import annotations

import itertools

from storage.loading.phases import Phases
from tests.storage.held_cases import Seen, Staged, Told, add, nodes, of, restore, store_with


def test_each_phase_is_what_has_passed_since_the_one_before() -> None:
    clock = itertools.accumulate([100.0, 0.5, 0.25, 2.0, 0.5, 0.0])
    phases = Phases(lambda: next(clock))
    for name in ("ask", "choose", "read", "choose"):
        phases.ended(name)
    assert phases.told() == {"seconds": 3.25, "phases": {"ask": 0.5, "choose": 0.75, "read": 2.0}}


def test_a_restore_says_how_long_each_has_taken() -> None:
    told: Told = []
    with nodes(["a"]) as (a,):
        add(a, Staged(20), 0, 1)
        restore(store_with(), Seen([a]), told)
    (fields,) = of(told, "restored")
    assert list(fields["phases"]) == ["ask", "choose", "fit", "read", "load"]
    assert abs(sum(fields["phases"].values()) - fields["seconds"]) < 0.01
