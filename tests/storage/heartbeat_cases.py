"""Owners of a run, for the tests of what tells that they live."""

from __future__ import annotations

from storage.events import Reporter
from storage.run.owner import Owner

QUIET = Reporter(None)


def owner_of(lineage: str, token: str, generation: int = 0, run_id: str = "", rendezvous: str = "") -> Owner:
    """Who wants to claim; the token is that letter, 32 times."""
    return Owner(
        lineage=lineage,
        generation=generation,
        epoch=0,
        token=token * 32,
        run_id=run_id,
        host="node-1",
        rendezvous=rendezvous,
    )
