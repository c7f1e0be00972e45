"""Who is a member of an etcd cluster that runs beside the nodes of a job, and what a machine does to be one. Pure.

A cluster has some seats (three, say), and may have more machines than seats: those beyond stand by. A machine asks the
others, and takes one step after another (`next_step`) until it starts its etcd, or stands by. A member whose machine is
gone for good makes room for one that stands by, or for a machine that was set up in its place: it is removed first, as
etcd takes no further member while one is away that a majority might need.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from launcher.errors import UsageError
from launcher.kv.endpoint import parse_endpoint, spelled
from launcher.kv.etcd.config import DEFAULT_PORT

MAX_SEATS = 7
"""More members make etcd slower and hardly safer (etcd's own advice)."""
REPLACED_S = 5.0
"""A member in whose place another machine was set up is lost after so long without an answer."""


@dataclass(frozen=True)
class Seat:
    """A machine's place: etcd serves clients at `port`, and other members at the next one."""

    host: str
    port: int = DEFAULT_PORT

    @property
    def name(self) -> str:
        """What etcd calls the member."""
        plain = self.host.replace(":", ".")
        return plain if self.port == DEFAULT_PORT else f"{plain}-{self.port}"

    @property
    def endpoint(self) -> str:
        """As `--rdzv-endpoint` names it."""
        return spelled(self.host, self.port)

    def peer_url(self, scheme: str) -> str:
        """Where the other members reach it."""
        return f"{scheme}://{spelled(self.host, self.port + 1)}"

    def is_at(self, peer_urls: Iterable[str]) -> bool:
        """Whether one of these is its own, with TLS or without."""
        return spelled(self.host, self.port + 1) in {urlsplit(url).netloc for url in peer_urls}


def parse_members(text: str) -> tuple[Seat, ...]:
    """Read `--members HOST[:PORT],...`.

    Raises:
        UsageError: the text is no such list, or names a machine twice.
    """
    try:
        seats = [Seat(*parse_endpoint(part, DEFAULT_PORT)) for part in text.split(",")]
    except UsageError as error:
        raise UsageError(str(error).replace("--rdzv-endpoint", "--members", 1)) from error
    ports: set[tuple[str, int]] = set()
    for seat in seats:
        taken = {(seat.host, seat.port), (seat.host, seat.port + 1)}
        if taken & ports:
            raise UsageError(
                f"--members {seat.endpoint}: twice, or next to another: a member takes its port and the next one"
            )
        ports |= taken
    return tuple(seats)


@dataclass(frozen=True)
class SeatedMember:
    """A member as its cluster lists it; one that has never served tells no `client_urls`."""

    member_id: int
    name: str
    peer_urls: tuple[str, ...]
    client_urls: tuple[str, ...] = ()


@dataclass(frozen=True)
class ClusterView:
    """What a machine knows: the seats that it was told of, and what the living cluster says, if there is one."""

    seats: tuple[Seat, ...]
    num_seats: int
    scheme: str
    listed: tuple[SeatedMember, ...] | None
    """The members by the word of a majority; None where there is no cluster that answers."""
    gone: Collection[int] = ()
    """Ids of members that have not answered for so long that they count as lost."""

    def member_at(self, seat: Seat) -> SeatedMember | None:
        """The member that this seat's machine is."""
        return next((m for m in self.listed or () if seat.is_at(m.peer_urls)), None)


@dataclass(frozen=True)
class Start:
    """Start etcd. `initial` and `is_new` count only where it has no data yet."""

    initial: str
    is_new: bool


@dataclass(frozen=True)
class Remove:
    """Take a member out of the cluster, for this reason."""

    member: SeatedMember
    reason: str


@dataclass(frozen=True)
class Add:
    """Become a member of the cluster."""

    peer_url: str


@dataclass(frozen=True)
class SetAside:
    """Move the data away: they are those of a member that the cluster has removed."""


@dataclass(frozen=True)
class StandBy:
    """Do nothing now, and look again later."""

    why: str


Step = Start | Remove | Add | SetAside | StandBy


def next_step(own: Seat, known: ClusterView, *, has_data: bool) -> Step:
    """Return what the machine at `own` does next; carried out, it asks anew."""
    first = known.seats[: known.num_seats]
    if known.listed is None:
        if has_data or own in first:
            return Start(_joined((seat.name, seat.peer_url(known.scheme)) for seat in first), is_new=True)
        return StandBy("there is no cluster yet")
    mine = known.member_at(own)
    if mine is not None:
        if has_data or not mine.client_urls:
            return Start(_initial(own, known, mine), is_new=False)
        return Remove(mine, "its data are gone")
    if has_data:
        return SetAside()
    if len(known.listed) < known.num_seats:
        return Add(own.peer_url(known.scheme))
    for member in known.listed:
        if member.member_id in known.gone:
            return Remove(member, "it does not answer any more")
    return StandBy("all seats are taken")


def _initial(own: Seat, known: ClusterView, mine: SeatedMember) -> str:
    """The members as `--initial-cluster` wants them: all that there are, this one by its own name."""
    return _joined(
        (own.name if member is mine else member.name or f"member-{member.member_id:x}", url)
        for member in known.listed or ()
        for url in member.peer_urls
    )


def _joined(pairs: Iterable[tuple[str, str]]) -> str:
    return ",".join(f"{name}={url}" for name, url in pairs)


def lost(known: ClusterView, answered_s: Mapping[int, float], now_s: float, replace_after_s: float) -> frozenset[int]:
    """Return the ids of members that count as lost.

    A member for which there is no seat any more (another machine was set up in its place) is lost once it has not
    answered for a moment; any other after `replace_after_s`.

    Args:
        answered_s: when each was seen to answer last, or first asked.
    """
    found = set()
    for member in known.listed or ():
        has_seat = any(seat.is_at(member.peer_urls) for seat in known.seats)
        patience_s = replace_after_s if has_seat else min(replace_after_s, REPLACED_S)
        if now_s - answered_s.get(member.member_id, now_s) > patience_s:
            found.add(member.member_id)
    return frozenset(found)
