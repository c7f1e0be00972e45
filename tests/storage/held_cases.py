"""Parts of small states in memory, as ranks of a former job would have staged them, and nodes that hold them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from storage import Checkpointer, JobIdentity
from storage.arena.slot import Slot
from storage.events import Reporter
from storage.format.manifest import ItemTable, Receipt, TensorEntry, ValueEntry
from storage.format.values import encode_value
from storage.held.buddies import PeerCard
from storage.held.inventory import HeldObject, HeldPart
from storage.held.keeping import KeepingStore
from storage.held.local import LocalMemory, Offer
from storage.held.node_memory import NodeIdentity, NodeMemory
from storage.held.papers import Contents, PartLabel, PartPapers
from storage.held.peer_server import CopyRules
from storage.held.rate import RateLimit
from storage.loading.memory_tier import MemoryTier
from storage.loading.restorer import Restorer
from storage.ranks.agreement import AgreeingGroup
from storage.run.attempt import Attempt, StateContents
from storage.saving.saveplan import Chunk
from storage.saving.writing import Payload, write_payloads
from storage.state.wants import Ignored
from storage.stores.memory import MemoryStore
from storage.stores.objects import ObjectStore
from tests.storage.small_runs import fresh_memory_url

ROWS, COLUMNS = 40, 1000
SIZE_BYTES = 2 * ROWS * COLUMNS * 4
LINEAGE = "job"
RUN = "memory://held"

_ids = itertools.count(1)


class Anonymous:
    """Memory that no other process can read."""

    fd = -1

    def __init__(self, size_bytes: int) -> None:
        self.memory = memoryview(np.zeros(size_bytes, np.uint8))  # type: ignore[arg-type]

    def populate(self, begin: int, stop: int) -> None:
        pass

    def close(self) -> None:
        pass


def attempt_id() -> str:
    return f"{next(_ids):08x}"


def whole(step: int, world_size: int) -> torch.Tensor:
    """The tensor that the state of `step` has under `w`."""
    return torch.arange(world_size * ROWS * COLUMNS, dtype=torch.float32).reshape(-1, COLUMNS) + step


@dataclass(frozen=True)
class Staged:
    """One attempt of a job: its parts by rank."""

    step: int
    world_size: int = 2
    generation: int = 1
    is_all: bool = False
    healthy: bool = True
    lineage: str = LINEAGE
    run: str = RUN
    id: str = field(default_factory=attempt_id)

    def part(self, rank: int, release: Callable[[], None] = lambda: None) -> HeldPart:
        """What `rank` has staged: its rows of `w`, or with `is_all` all of it; rank 0 also `n`."""
        tensor, rows = whole(self.step, self.world_size), slice(rank * ROWS, (rank + 1) * ROWS)
        mine = tensor if self.is_all else tensor[rows].clone()
        offsets = (0 if self.is_all else rows.start, 0)
        chunk = Chunk("w", ("w",), offsets, tuple(mine.shape), tuple(tensor.shape), "float32", mine.nbytes)
        payloads = [Payload(chunk, mine)]
        if rank == 0 or self.is_all:
            value = Chunk("n", ("n",), None, None, None, "", 0)
            payloads.append(Payload(value, encode_value("n", self.step)))
        attempt = Attempt.of_step(self.step, self.id, self.world_size)
        keeping = KeepingStore(MemoryStore("nothing"), stores=False)
        entries, items = write_payloads(keeping, attempt.prefix, attempt.id, rank, payloads)
        contents = StateContents(
            {"w": TensorEntry(dtype="float32", shape=tuple(tensor.shape), path=("w",))},
            {"n": ValueEntry(path=("n",))},
        )
        has_contents = rank == 0 or self.is_all
        label = PartLabel(
            run=self.run,
            lineage=self.lineage,
            generation=self.generation,
            step=self.step,
            attempt=self.id,
            world_size=self.world_size,
            rank=rank,
            size_bytes=sum(entry.size_bytes for entry in entries),
            healthy=self.healthy,
            is_all=self.is_all,
            has_contents=has_contents,
        )
        papers = PartPapers(
            label=label,
            receipt=Receipt(rank=rank, attempt=self.id, objects=entries, items=ItemTable.of(items)),
            created_unix_s=0.0,
            contents=Contents.of(contents) if has_contents else None,
        )
        kept = keeping.objects(attempt.prefix)  # in memory of the tensor, which goes with this function
        objects = {name: HeldObject([bytes(piece) for piece in held.pieces]) for name, held in kept.items()}
        return HeldPart(papers, objects, release=release)


Told = list[tuple[str, dict[str, Any]]]
COPIES = CopyRules(Anonymous, 1 << 30)


@contextmanager
def nodes(
    names: Sequence[str], told: Told | None = None, copies: CopyRules | None = COPIES
) -> Iterator[list[NodeMemory]]:
    """Nodes of those names, each on a host of its own, that do not know each other yet."""
    seen: Told = [] if told is None else told
    with ExitStack() as stack:
        found = []
        for name in names:

            def tell(event: str, name: str = name, **fields: Any) -> None:
                seen.append((str(event), {"by": name, **fields}))

            node = NodeMemory(copies, RateLimit(None), tell, grace_s=0.0)
            stack.callback(node.close)
            found.append(node.start(NodeIdentity(name, f"host-{name}")))
        yield found


def meet(found: Sequence[NodeMemory]) -> list[PeerCard]:
    cards = [node.card() for node in found]
    for node in found:
        node.meet(cards)
    return cards


class Seen:
    """What the only rank of a restore sees of several nodes, the first of which is its own."""

    def __init__(
        self,
        found: Sequence[NodeMemory],
        local: LocalMemory | None = None,
        run: str = RUN,
        *,
        num_ranks: int = 1,
        num_here: int = 1,
        compares: bool = False,
    ) -> None:
        self._num_ranks = num_ranks, num_here
        self._compares = compares
        self._nodes = found
        self._local = local
        self._run = run

    def open(self, report: Reporter) -> MemoryTier:
        offers = [
            Offer(card=node.card(), labels=tuple(node.labels(self._run)), num_restores=node.num_restores())
            for node in self._nodes
        ]
        return MemoryTier(offers, 0, self._local, LINEAGE, num_ranks=self._num_ranks, compares=self._compares)

    is_there = True

    def make_way(self, report: Reporter) -> None:
        pass

    def way_free(self, report: Reporter, after_s: float = 0.0) -> None:
        pass

    def went_on(self, attempt: str, step: int, report: Reporter) -> None:
        for node in self._nodes:
            node.restored(attempt, step)

    def distrust(self, reason: str, report: Reporter) -> None:
        for node in self._nodes:
            node.drop(None, reason)


def restore(
    store: ObjectStore, memory: Any, told: Told, world_size: int = 2, *, unhealthy: bool = False, adopted: Any = None
) -> tuple[int, dict[str, Any]]:
    """Restore into a fresh state: the step, and the state."""
    state = {"w": torch.zeros(world_size * ROWS, COLUMNS), "n": -1}
    report = Reporter(lambda event, fields: told.append((str(event), fields)))
    restorer = Restorer(store, None, AgreeingGroup(alone=True), report, memory, adopted)
    return restorer.restore(state, strict=True, ignored=Ignored(()), unhealthy=unhealthy), state


def of(told: Told, event: str) -> list[dict[str, Any]]:
    """The fields of those events."""
    return [fields for name, fields in told if name == event]


def store_with(*steps: int, generation: int = 1, world_size: int = 2) -> MemoryStore:
    """A run in a store, with those steps of the same kind of state."""
    url = fresh_memory_url()
    with Checkpointer(url, job=JobIdentity(lineage=LINEAGE, generation=generation)) as ckpt:
        for step in steps:
            ckpt.save(step, {"w": whole(step, world_size), "n": step}, wait=True)
    return MemoryStore.named(url.removeprefix("memory://"))


def add(
    node: NodeMemory, staged: Staged, *ranks: int, change: Callable[[HeldPart], HeldPart] = lambda part: part
) -> None:
    for rank in ranks:
        node.add(change(staged.part(rank)))


def damaged(part: HeldPart) -> HeldPart:
    """The part, of whose bytes one was flipped after its checksums were made: in the middle of the longest object."""
    objects = {}
    for name, held in part.objects.items():
        data = bytearray(b"".join(held.pieces))
        if held.size_bytes == max(other.size_bytes for other in part.objects.values()):
            data[len(data) // 2] ^= 1
        objects[name] = HeldObject([data])
    return HeldPart(part.papers, objects, part.of_node)


def check(step: int, found: tuple[int, dict[str, Any]], world_size: int = 2) -> None:
    restored, state = found
    assert (restored, state["n"]) == (step, step)
    assert torch.equal(state["w"], whole(step, world_size))


def in_shared_memory(part: HeldPart) -> HeldPart:
    """The part as one is that lies in a slot: its long pieces in memory with a descriptor, others elsewhere."""
    memory, objects, at = Slot.create(part.label.size_bytes), {}, 0
    for name, held in part.objects.items():
        pieces: list[Any] = []
        for piece in held.pieces:
            if piece.nbytes > 4096:
                memory.memory[at : at + piece.nbytes] = piece
                pieces.append(memory.memory[at : at + piece.nbytes])
                at += piece.nbytes
            else:
                pieces.append(piece)
        objects[name] = HeldObject(pieces)
    return HeldPart(part.papers, objects, part.of_node, (memory,), memory.close)
