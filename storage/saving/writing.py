"""One rank's part of a save: encode, pack into objects, store, and say what was stored."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from storage.format import layout
from storage.format.checksum import pack_crcs
from storage.format.framing import EncodedItem, FramedItem
from storage.format.manifest import ItemEntry, ObjectEntry
from storage.parallel import Pool, run_all
from storage.saving.encoding import Encoding, ObjectContent
from storage.saving.saveplan import Chunk
from storage.stores.objects import ObjectStore

if TYPE_CHECKING:  # the service, which has no torch, writes what workers have made items of
    import torch

NUM_THREADS = 4
NUM_PART_THREADS = 16
SMALL_ITEM_BYTES = 1024 * 1024
OBJECT_SIZE_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True)
class Payload:
    """A chunk with its content: a staged tensor (see `storage.arena.stager`), or an item: of a tensor, or a value."""

    chunk: Chunk
    content: torch.Tensor | EncodedItem | FramedItem

    @property
    def size_bytes(self) -> int:
        """Size of the content; a tensor's item is longer by its framing, and is as long as the tensor here."""
        match self.content:
            case EncodedItem(buffers=(_, data, _)) if self.chunk.sizes is not None:
                return len(data)
            case EncodedItem(length=length):
                return length
            case FramedItem(data=data):
                return data.nbytes
            case tensor:
                return tensor.nbytes

    def item(self) -> EncodedItem | FramedItem:
        """The content as it is stored. Of a tensor's bytes the checksums may be made here, which takes a while."""
        if isinstance(self.content, EncodedItem | FramedItem):
            return self.content
        from storage.format.items import item_of

        return item_of(self.content)


class Content(Protocol):
    """The bytes of an object that is made, wherever they lie."""

    @property
    def size_bytes(self) -> int:
        """How many they are."""

    def views(self, offset: int, length: int) -> Sequence[memoryview]:
        """Some of them."""


@dataclass(frozen=True)
class MadeObjects:
    """A rank's part of a save of which all checksums are made: entries and items as `write_payloads` returns them, and
    the objects by name. The store has none of it yet, so the entries know no etag.
    """

    entries: tuple[ObjectEntry, ...]
    items: tuple[ItemEntry, ...]
    objects: Mapping[str, Content]


def pack(sizes_bytes: Sequence[int]) -> list[list[int]]:
    """Which items share an object. Pure.

    All small items (below 1 MiB) sit together in the first objects, so that a reader of many of them opens few
    objects; the others follow in order. No object is filled past 256 MiB of content, but an item is never divided.
    """
    small = [index for index, size in enumerate(sizes_bytes) if size < SMALL_ITEM_BYTES]
    large = [index for index, size in enumerate(sizes_bytes) if size >= SMALL_ITEM_BYTES]
    objects: list[list[int]] = []
    for group in (small, large):
        filled_bytes = OBJECT_SIZE_BYTES
        for index in group:
            if filled_bytes + sizes_bytes[index] > OBJECT_SIZE_BYTES:
                objects.append([])
                filled_bytes = 0
            objects[-1].append(index)
            filled_bytes += sizes_bytes[index]
    return objects


def write_payloads(
    store: ObjectStore,
    prefix: str,
    attempt: str,
    rank: int,
    payloads: Sequence[Payload],
) -> tuple[tuple[ObjectEntry, ...], tuple[ItemEntry, ...]]:
    """Store the payloads as data objects of `attempt`, and say what was written, `ItemEntry.object` counting from 0.

    Staged tensors must not change before this returns. Raises what the store raises.
    """
    groups = pack([payload.size_bytes for payload in payloads])
    with (
        Pool(NUM_THREADS, thread_name_prefix="storage-write") as pool,
        Pool(NUM_PART_THREADS, thread_name_prefix="storage-part") as parts,
    ):
        calls = [
            functools.partial(
                _write_object,
                store,
                prefix,
                layout.data_name(attempt, rank, index),
                index,
                [payloads[position] for position in group],
                parts,
            )
            for index, group in enumerate(groups)
        ]
        written = run_all(pool, calls)
    return tuple(entry for entry, _ in written), tuple(item for _, items in written for item in items)


def put_made(store: ObjectStore, prefix: str, made: MadeObjects) -> tuple[ObjectEntry, ...]:
    """Store objects that are made, as they are; their entries. Raises what the store raises."""

    def put(entry: ObjectEntry) -> ObjectEntry:
        content = made.objects[entry.name]
        info = store.put_from(prefix + entry.name, content.size_bytes, content.views, parts)
        return ObjectEntry(name=entry.name, size_bytes=info.size_bytes, etag=info.etag)

    with (
        Pool(NUM_THREADS, thread_name_prefix="storage-write") as pool,
        Pool(NUM_PART_THREADS, thread_name_prefix="storage-part") as parts,
    ):
        return tuple(run_all(pool, [functools.partial(put, entry) for entry in made.entries]))


def _write_object(
    store: ObjectStore, prefix: str, name: str, index: int, payloads: Sequence[Payload], parts: Executor
) -> tuple[ObjectEntry, list[ItemEntry]]:
    content = ObjectContent([Encoding(payload.item()) for payload in payloads])
    # nothing else has this name, since the attempt's is random: there is no need to look whether it is taken
    info = store.put_from(prefix + name, content.size_bytes, content.fetch, parts)
    entries = [
        ItemEntry(
            key=payload.chunk.key,
            offsets=payload.chunk.offsets,
            sizes=payload.chunk.sizes,
            object=index,
            offset=offset,
            length=item.length,
            raw_offset=item.raw_offset,
            crc32c=item.crcs.whole,
            block_size_bytes=item.crcs.size_bytes,
            block_crcs=pack_crcs(item.crcs.blocks),
        )
        for payload, item, offset in zip(payloads, content.items, content.offsets[:-1], strict=True)
    ]
    return ObjectEntry(name=name, size_bytes=info.size_bytes, etag=info.etag), entries
