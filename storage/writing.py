"""One rank's part of a save: encode, pack into objects, store, and say what was stored."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from storage import layout
from storage.checksum import block_crcs, block_size_bytes, crc32c_of, pack_crcs
from storage.items import EncodedItem, encode_tensor
from storage.manifest import ItemEntry, ObjectEntry
from storage.objects import ObjectStore
from storage.parallel import run_all
from storage.saveplan import Piece

NUM_THREADS = 4
SMALL_ITEM_BYTES = 1024 * 1024
OBJECT_SIZE_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True)
class Payload:
    """A piece with its content: a staged tensor (see `storage.staging`), or a value that is encoded already."""

    piece: Piece
    content: torch.Tensor | EncodedItem


def pack(lengths: Sequence[int]) -> list[list[int]]:
    """Which items share an object. Pure.

    All small items (below 1 MiB) sit together in the first objects, so that a reader of many of them opens few
    objects; the others follow in order. No object is filled past 256 MiB, but an item is never divided.
    """
    small = [index for index, length in enumerate(lengths) if length < SMALL_ITEM_BYTES]
    large = [index for index, length in enumerate(lengths) if length >= SMALL_ITEM_BYTES]
    objects: list[list[int]] = []
    for group in (small, large):
        filled_bytes = OBJECT_SIZE_BYTES
        for index in group:
            if filled_bytes + lengths[index] > OBJECT_SIZE_BYTES:
                objects.append([])
                filled_bytes = 0
            objects[-1].append(index)
            filled_bytes += lengths[index]
    return objects


def write_payloads(
    store: ObjectStore,
    prefix: str,
    attempt: str,
    rank: int,
    payloads: Sequence[Payload],
) -> tuple[tuple[ObjectEntry, ...], tuple[ItemEntry, ...]]:
    """Store the payloads as data objects of `attempt`; what was written, `ItemEntry.object` counting from 0.

    Staged tensors must not change before this returns. Raises what the store raises.
    """
    encoded = [_encode(payload) for payload in payloads]
    groups = pack([item.length for item in encoded])
    with ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="storage-write") as pool:
        calls = [
            functools.partial(
                _write_object,
                store,
                prefix,
                layout.data_name(attempt, rank, index),
                index,
                [(payloads[position].piece, encoded[position]) for position in group],
            )
            for index, group in enumerate(groups)
        ]
        written = run_all(pool, calls)
    return tuple(entry for entry, _ in written), tuple(item for _, items in written for item in items)


def _encode(payload: Payload) -> EncodedItem:
    if isinstance(payload.content, torch.Tensor):
        return encode_tensor(payload.content)
    return payload.content


def _write_object(
    store: ObjectStore, prefix: str, name: str, index: int, items: Sequence[tuple[Piece, EncodedItem]]
) -> tuple[ObjectEntry, list[ItemEntry]]:
    entries, offset = [], 0
    for piece, item in items:
        size = block_size_bytes(item.length)
        entries.append(
            ItemEntry(
                key=piece.key,
                offsets=piece.offsets,
                sizes=piece.sizes,
                object=index,
                offset=offset,
                length=item.length,
                raw_offset=item.raw_offset,
                crc32c=crc32c_of(item.buffers),
                block_size_bytes=size,
                block_crcs=pack_crcs(block_crcs(item.buffers, size)),
            )
        )
        offset += item.length
    info = store.put(prefix + name, [buffer for _, item in items for buffer in item.buffers], if_absent=True)
    return ObjectEntry(name=name, size_bytes=info.size_bytes, etag=info.etag), entries
