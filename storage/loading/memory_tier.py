"""What a restore finds in the memory of nodes: the state to go on from, and the nearest place of each byte."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

from storage.errors import Corrupt, NoCheckpoint, StorageError
from storage.events import CheckpointEvent, Reporter
from storage.format import layout
from storage.format.index import Index, check_whole, of_manifest
from storage.held.buddies import PeerCard
from storage.held.choice import (
    HeldState,
    JoinedState,
    StoredState,
    Twins,
    held_states,
    is_same_state,
    join,
    worth_a_look,
)
from storage.held.distrust import worn_out
from storage.held.local import LocalMemory, Offer, dump_offer, load_offer
from storage.held.nearest import ByteSource, NearestStore, Nearness, Places, Reach
from storage.held.own_memory import OwnMemory
from storage.held.papers import PartPapers
from storage.held.peer_client import Peer
from storage.parallel import Pool, run_all
from storage.ranks.agreement import AgreeingGroup
from storage.run import catalog
from storage.stores.objects import ObjectStore

T = TypeVar("T")

_NUM_ASKED_AT_ONCE = 16
_RESTORE_S = 30.0


@dataclass(frozen=True)
class HeldIndex:
    """The index of a state to go on from, as it is sent to all ranks. `is_stored`: the store has it."""

    index: Index
    twins: tuple[Twins, ...] = ()
    is_stored: bool = True

    def dump(self) -> bytes:
        """Bytes for the way to the other ranks."""
        head = json.dumps({"is_stored": self.is_stored, "twins": [asdict(row) for row in self.twins]}).encode()
        return len(head).to_bytes(8, "little") + head + self.index.dump()

    @classmethod
    def load(cls, data: bytes) -> HeldIndex:
        """What `dump` dumped."""
        end = 8 + int.from_bytes(data[:8], "little")
        head = json.loads(data[8:end])
        twins = [
            Twins(row["name"], row["start"], row["length"], tuple((name, offset) for name, offset in row["others"]))
            for row in head["twins"]
        ]
        return cls(Index.load(data[end:]), tuple(twins), head["is_stored"])


class MemoryTier:
    """The memory of all nodes, as the ranks of one restore find it. Closed at its end.

    Args:
        offers: what each node has, the same on all ranks.
        own: this rank's node, by its number in `offers`; None where it has no memory.
        local: that node's memory, from within.
        num_ranks: how many restore, and how many of them on this rank's host.
        compares: no state is gone on from of which ranks hold a tensor differently, and no majority says who is right.
    """

    def __init__(
        self,
        offers: Sequence[Offer],
        own: int | None,
        local: LocalMemory | None,
        lineage: str,
        *,
        num_ranks: tuple[int, int],
        compares: bool = False,
    ) -> None:
        self._offers = offers
        self._num_ranks, self._num_ranks_here = num_ranks
        self._compares = compares
        self.states = held_states([offer.labels for offer in offers], lineage)
        self._peers = [
            Peer(offer.card, Nearness.OWN if number == own else Nearness.PEER) for number, offer in enumerate(offers)
        ]
        self._sources: list[list[ByteSource]] = [[peer] for peer in self._peers]
        self._own: OwnMemory | None = None
        if own is not None and local is not None:  # what it cannot read so is read as another node would read it
            self._own = OwnMemory(offers[own].card.node, local.descriptors)
            self._sources[own].insert(0, self._own)

    @property
    def has_a_state(self) -> bool:
        """Whether a state seems to be held whole; the same on all ranks."""
        return any(not state.why_not for state in self.states)

    @property
    def worn_out(self) -> list[str]:
        """The attempts that the job has gone on from too often."""
        return worn_out([offer.num_restores for offer in self._offers])

    def find_stored(
        self,
        store: ObjectStore,
        candidates: Iterable[tuple[int, object]],
        damaged: Collection[int],
        *,
        unhealthy: bool,
    ) -> StoredState | None:
        """The newest checkpoint of the store, as far as it has to be known (coordinator). `damaged`: to be left out.

        `candidates`: see `storage.run.catalog.candidates`. Raises Transient, Denied: by the store.
        """
        for step, _ in candidates:
            if step in damaged:
                continue
            if all(state.label.step <= step for state in self.states):
                return StoredState(step)  # nothing newer is held, whatever else there is to know of it
            try:
                commit = catalog.find_commit(store, layout.step_folder(step) + "/")
            except (NoCheckpoint, Corrupt):
                continue  # whoever opens it tells why
            if commit.manifest is None:
                return StoredState(step)
            if commit.manifest.healthy or unhealthy:
                return StoredState(step, commit.manifest.generation, commit.manifest.attempt)
        return None

    def close(self) -> None:
        """Close all connections, and let go of this node's memory."""
        for peer in self._peers:
            peer.close()
        if self._own is not None:
            self._own.close()

    def newest(
        self, stored: StoredState | None, passed_over: Collection[str], report: Reporter, *, unhealthy: bool
    ) -> HeldIndex | None:
        """The newest state that is newer than the store's and of which every byte is held (coordinator).

        `passed_over`: attempts that are not to be taken.
        """
        for state in worth_a_look(self.states, stored, unhealthy=unhealthy):
            if state.label.attempt in passed_over:
                continue
            why_not = state.why_not
            if not why_not:
                try:
                    return self._open(state, report)
                except StorageError as error:
                    why_not = str(error)
            report(CheckpointEvent.HELD_IN_PART, step=state.label.step, reason=why_not)
        return None

    def nearest(self, store: ObjectStore, found: HeldIndex, report: Reporter) -> NearestStore | None:
        """The store that reads the state from memory where it can; None where nobody holds any of it."""
        index = found.index
        state = next((state for state in self.states if state.label.attempt == index.save_id), None)
        if state is None:
            return None
        holders = {
            (index.save_id, rank): sorted((s for node in nodes for s in self._sources[node]), key=_distance)
            for rank, nodes in state.holders.items()
        }

        def tell(source: ByteSource, reason: str) -> None:
            fields = {"step": index.step, "node": source.name, "tier": source.nearness.value}
            report(CheckpointEvent.SOURCE_FAILED, **fields, reason=reason)

        return NearestStore(
            store,
            index.prefix,
            holders,
            Places(found.twins),
            tell,
            Reach(found.is_stored, self._is_everywhere(state, found), self._num_ranks_here),
        )

    def _is_everywhere(self, state: HeldState, found: HeldIndex) -> bool:
        """Whether each node holds every byte, under one name or another."""
        sets = [(row.name, *(name for name, _ in row.others)) for row in found.twins]
        if len(sets) < len(found.index):  # not all have twins, and which have not does not matter much
            sets += [(entry.name,) for entry in found.index.objects]
        ranks = {frozenset(part[1] for name in names if (part := layout.parse_data_name(name))) for names in sets}
        nodes = range(len(self._peers))
        return all(any(node in state.holders.get(rank, ()) for rank in among) for among in ranks for node in nodes)

    def _open(self, state: HeldState, report: Reporter) -> HeldIndex:
        """Raises StorageError: not every byte is held, or those who say so do not answer."""
        from storage.format.dtypes import check_sizes  # needs torch

        with Pool(_NUM_ASKED_AT_ONCE, thread_name_prefix="storage-papers") as pool:
            calls = [functools.partial(self._papers, state, rank, report) for rank in sorted(state.holders)]
            found = [papers for papers in run_all(pool, calls) if papers is not None]
        joined = join(found, self._num_ranks)
        self._tell_differing(state, joined, report)
        if joined.lost:
            report(
                CheckpointEvent.PER_RANK_RESIZED,
                step=state.label.step,
                names=list(joined.lost),
                saved=state.label.world_size,
                now=self._num_ranks,
                gone=sorted(set(range(state.label.world_size)) - {papers.label.rank for papers in found}),
            )
        prefix = layout.step_folder(state.label.step) + "/"
        index = check_whole(check_sizes(of_manifest(prefix, joined.manifest)))
        return HeldIndex(index, joined.twins, is_stored=False)

    def _tell_differing(self, state: HeldState, joined: JoinedState, report: Reporter) -> None:
        """Tell which ranks hold something else than most. Raises Corrupt where it is not known which of them are right.

        Without `compares` that is as it is for a save: the lowest rank's is taken, as of buffers that DDP lets differ.
        """
        for found in joined.differing:
            if not found.is_decided and not self._compares:
                continue
            for rank in found.ranks:
                report(
                    CheckpointEvent.REPLICA_DIFFERS,
                    step=state.label.step,
                    on_rank=rank,
                    host=self._offers[state.holders[rank][0]].card.host,
                    num=1,
                    name=found.name,
                    others=list(found.others),
                    healed=found.is_decided,
                )
            if not found.is_decided:
                ranks = " and ".join(f"rank {rank}" for rank in (*found.others[:1], *found.ranks[:1]))
                raise Corrupt(f"{ranks} hold {found.name!r} differently, and no majority says who is right")

    def _papers(self, state: HeldState, rank: int, report: Reporter) -> PartPapers | None:
        """The papers of a part, from the first of its holders that has them; None if none has."""
        key = (state.label.attempt, rank)
        for node in state.holders[rank]:
            peer = self._peers[node]
            try:
                papers = peer.papers(key)
                if is_same_state(papers.label, state.label):
                    return papers
                reason = f"{peer.name} says one thing of rank {rank}'s part, and its papers another"
            except StorageError as error:
                reason = str(error)
            fields = {"step": state.label.step, "node": peer.name, "tier": peer.nearness.value}
            report(CheckpointEvent.SOURCE_FAILED, **fields, reason=reason)
        return None


class MemoryAccess:
    """A rank's access to the memory of all nodes. Every method without underscore is a collective.

    Args:
        local: the memory of this rank's node; None where it has none.
        run: the URL of the run.
        lineage: of the job: states of another one are not gone on from.
        compares: see `MemoryTier`.
    """

    def __init__(
        self, local: LocalMemory | None, run: str, lineage: str, group: AgreeingGroup, *, compares: bool = False
    ) -> None:
        self._compares = compares
        self._local = local
        self._run = run
        self._lineage = lineage
        self._group = group
        self._speaks = False  # for all ranks of its node
        self._known: list[PeerCard | None] = []  # by rank, as was told just now

    @property
    def is_there(self) -> bool:
        """Whether this rank's node has one. No collective."""
        return self._local is not None

    def meet(self, report: Reporter) -> None:
        """Have the nodes of all ranks know each other, so that each finds a buddy for its copies."""
        self._meet(report)

    def open(self, report: Reporter) -> MemoryTier | None:
        """What all nodes have; None where none has a memory. The caller closes it."""
        known, self._known = self._known, []
        cards = known or self._meet(report)
        if not cards:
            return None
        nodes = list(dict.fromkeys(card.node for card in cards if card is not None))
        mine = cards[self._group.rank]
        told = self._group.all_gather_long(self._offer(mine, report) if self._speaks and mine else b"")
        offers = {offer.card.node: offer for offer in map(load_offer, filter(None, told))}
        found = [offers[node] for node in nodes if node in offers]
        own = next((number for number, offer in enumerate(found) if mine and offer.card.node == mine.node), None)
        num_here = sum(card is not None and mine is not None and card.host == mine.host for card in cards)
        num_ranks = self._group.world_size, max(num_here, 1)
        tier = MemoryTier(found, own, self._local, self._lineage, num_ranks=num_ranks, compares=self._compares)
        if not tier.has_a_state:
            self.way_free(report)  # what is on its way to the store may be all that there is
        return tier

    def has_a_state(self, report: Reporter) -> bool:
        """Whether nodes hold a state that could be gone on from if the store were away."""
        self._known = cards = self._meet(report)
        tier = self.open(report) if cards else None
        if tier is None:
            return False
        tier.close()
        if all(card is not None for card in cards):
            self._known = cards  # a restore comes next, and need not ask for them once more
        return tier.has_a_state

    def make_way(self, report: Reporter) -> None:
        """Have this node store and copy nothing while its memory is read. No collective; all ranks call it."""
        if self._speaks:
            self._ask(lambda local: local.make_way(_RESTORE_S), report)

    def way_free(self, report: Reporter, after_s: float = 0.0) -> None:
        """It was read, or is not: what waits goes on, be it since workers stopped for others. As `make_way`."""
        if self._speaks:
            self._ask(lambda local: local.way_free(after_s), report)

    def went_on(self, attempt: str, step: int, report: Reporter) -> None:
        """Tell the memory of this node that the job goes on from a state of it. No collective; all ranks call it."""
        if self._speaks:
            self._ask(lambda local: local.restored(attempt, step), report)

    def distrust(self, reason: str, report: Reporter) -> None:
        """Have this node's memory dropped. No collective; all ranks call it."""
        if self._speaks:
            self._ask(lambda local: local.drop(None, reason), report)

    def _meet(self, report: Reporter) -> list[PeerCard | None]:
        """The card of each rank's node, by rank; empty if no node has a memory."""
        mine = self._ask(lambda local: local.card(), report)
        told = self._group.all_gather(mine.model_dump_json().encode() if mine is not None else b"")
        if not any(told):
            return []
        cards = [PeerCard.model_validate_json(data) if data else None for data in told]
        self._speaks = mine is not None and not any(
            card is not None and card.node == mine.node for card in cards[: self._group.rank]
        )
        if self._speaks:
            known = {card.node: card for card in cards if card is not None}
            self._ask(lambda local: local.meet(list(known.values())), report)
        return cards

    def _offer(self, card: PeerCard, report: Reporter) -> bytes:
        labels = self._ask(lambda local: local.labels(self._run), report) or ()
        num_restores = self._ask(lambda local: local.num_restores(), report) or {}
        return dump_offer(Offer(card=card, labels=tuple(labels), num_restores=num_restores))

    def _ask(self, question: Callable[[LocalMemory], T], report: Reporter) -> T | None:
        """The local memory's answer; None, and an event, where it has none."""
        if self._local is None:
            return None
        try:
            return question(self._local)
        except StorageError as error:
            report(CheckpointEvent.MEMORY_AWAY, reason=str(error))
            return None


def _distance(source: ByteSource) -> int:
    return list(Nearness).index(source.nearness)
