"""An attempt that is about to be committed, and a store in which something happens meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from storage.format.checksum import pack_crcs
from storage.format.manifest import ItemEntry, ItemTable, Manifest, ObjectEntry, Receipt, TensorEntry
from storage.run import owner
from storage.run.attempt import Attempt, StateContents
from storage.run.job import Origin
from storage.saving import commit
from storage.stores.buffers import Buffer
from storage.stores.memory import MemoryStore
from storage.stores.objects import ObjectInfo, ObjectStore

ATTEMPT = Attempt.of_step(10, "a" * 8, 1)
STEP, FOLDER = ATTEMPT.prefix, f"{ATTEMPT.prefix}attempt-{ATTEMPT.id}/"
METADATA, DATA, MANIFEST = STEP + ".metadata", FOLDER + "__0_0.distcp", FOLDER + "manifest.json"
SIZE_BYTES = 4096


def built(mesh: dict[str, Any] | None = None, num_items: int = 1) -> tuple[Manifest, bytes]:
    """Of one object that holds `num_items` items."""
    size = SIZE_BYTES // num_items
    entries = [
        ItemEntry("w", (row,), (1,), 0, row * size, size, 0, 7, 1 << 14, pack_crcs(np.array([7], np.uint32)))  # type: ignore[arg-type]
        for row in range(num_items)
    ]
    objects = (ObjectEntry(name=DATA.removeprefix(STEP), size_bytes=size * num_items, etag=""),)
    receipt = Receipt(rank=0, attempt=ATTEMPT.id, objects=objects, items=ItemTable.of(entries))
    contents = StateContents({"w": TensorEntry(dtype="float32", shape=(num_items,), path=("w",))}, {})
    return commit.build_manifest(ATTEMPT, Origin(mesh=mesh), contents, [receipt], 0.0)


def owner_of(generation: int) -> owner.Owner:
    return owner.Owner(lineage="a", generation=generation, epoch=0, token=f"token-{generation}")


def claimed(store: ObjectStore, generation: int = 0) -> owner.Claim:
    return owner.Claim(store, owner.claim(store, owner_of(generation))[0])


def ready(store: MemoryStore) -> owner.Claim:
    """Everything is there but the commit."""
    MemoryStore.put(store, DATA, [bytes(SIZE_BYTES)])
    return claimed(store)


class Scripted(MemoryStore):
    """Something happens right before a request."""

    def __init__(self) -> None:
        super().__init__("x")
        self.before: dict[str, Callable[[], object]] = {}

    def put(self, key: str, buffers: Sequence[Buffer], *, if_absent: bool = False) -> ObjectInfo:
        self._act(f"put {key}")
        return super().put(key, buffers, if_absent=if_absent)

    def read(self, key: str) -> bytes:
        self._act(f"read {key}")
        return super().read(key)

    def list(self, prefix: str) -> Sequence[ObjectInfo]:
        self._act(f"list {prefix}")
        return super().list(prefix)

    def _act(self, request: str) -> None:
        if (act := self.before.pop(request, None)) is not None:
            act()
