"""Decides who is left out of a round where nodes reach the store and not one another; and who watches whom. Pure.

Leases tell nothing of such a cut, and a collective across it stands still. Each node reports whom it cannot reach; one
cut is reported from both ends, or from one. Reports come within seconds of one another, so the leader listens until
there was quiet before it decides: after the first report alone it could not tell which end is to blame.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from launcher.rounds.records import Participant, Round

LISTEN_S = 3.0
"""Quiet after the last report before something follows from them. PeerWatch find a cut within two seconds of one
another (`peers`: where in their keepalive period it hits them)."""


def left_out(order: Sequence[str], unreachable: Mapping[str, Collection[str]]) -> tuple[str, ...]:
    """Name the nodes to leave out so that no reported cut lies between two that stay, in rank order.

    The node with the most cuts goes first; of equals, the one of the highest rank, since the others' workers meet at
    the lowest.

    Args:
        order: the participants in rank order.
        unreachable: node -> those it cannot reach.
    """
    place = {node_id: i for i, node_id in enumerate(order)}
    cuts = {
        frozenset((node_id, other))
        for node_id, others in unreachable.items()
        for other in others
        if node_id != other and node_id in place and other in place
    }
    out: set[str] = set()
    while cuts:
        num_cuts = Counter(node_id for cut in cuts for node_id in cut)
        worst = max(num_cuts, key=lambda n: (num_cuts[n], place[n]))
        out.add(worst)
        cuts = {cut for cut in cuts if worst not in cut}
    return tuple(sorted(out, key=place.__getitem__))


_NUM_WATCHED = 2


def watched_by(current: Round, node_id: str) -> tuple[Participant, ...]:
    """Return the participants that `node_id` watches: the next ones in rank order, around the end."""
    order = current.participants
    own = current.place_of(node_id)
    if own is None:
        return ()
    return tuple(order[(own + i) % len(order)] for i in range(1, min(_NUM_WATCHED, len(order) - 1) + 1))
