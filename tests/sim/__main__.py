"""`python -m tests.sim SEED` replays one life with its log; `python -m tests.sim FIRST COUNT` runs many."""

from __future__ import annotations

import logging
import sys
import time

from tests.sim.simulation import simulate
from tests.sim.world import Violation, World


def main(argv: list[str]) -> int:
    """0 if every seed holds, 1 if one does not."""
    logging.disable(logging.CRITICAL)  # the world has a log of its own
    first, count = int(argv[1]), int(argv[2]) if len(argv) > 2 else 1
    began_s = time.monotonic()
    made: list[World] = []
    original = World.__post_init__

    def keep(world: World) -> None:
        original(world)
        made[:] = [world]

    World.__post_init__ = keep  # type: ignore[method-assign]
    failed = 0
    for seed in range(first, first + count):
        try:
            simulate(seed)
        except Violation as violation:
            failed += 1
            print(f"seed {seed}: {violation}; replay with: python -m tests.sim {seed}")
        if count == 1:
            print("\n".join(made[0].log))
    print(f"{count - failed} of {count} seeds hold, {time.monotonic() - began_s:.1f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
