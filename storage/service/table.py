"""What a rank hands to the service beside its tensors: the list of what is to be written, in a slot of its own.

The table is JSON, and behind it what is no tensor, or does not lie in the slot of tensors. So whoever has the two
descriptors has the whole save, and needs no torch to make objects of it: of the items of tensors that `torch.save`
would make, the framing comes ready.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pydantic import TypeAdapter, ValidationError

from storage.arena.slot import Slot
from storage.errors import Corrupt
from storage.format.containers import Container
from storage.format.framing import MISREAD_BYTES, EncodedItem, FramedItem, Framing, is_misread
from storage.format.manifest import TensorEntry, ValueEntry
from storage.format.sealed import check_seal, seal_bytes
from storage.priority import without_collections
from storage.run.attempt import StateContents
from storage.saving.saveplan import Chunk
from storage.saving.writing import Payload
from storage.stores.buffers import address_of

if TYPE_CHECKING:  # the service, which has no torch, only reads tables
    from storage.format.items import Kind

_KIND = "table"
_HEAD = struct.Struct("!Q")  # size of the JSON
_ALIGNMENT_BYTES = 64
_PADDING = bytes(_ALIGNMENT_BYTES)


@dataclass(frozen=True, slots=True)
class Place:
    """Bytes of the slot of tensors, or (`in_table`) behind the table's JSON."""

    offset: int
    length: int
    in_table: bool = False


@dataclass(frozen=True, slots=True)
class FramingRow:
    """A `Framing`, whose two ends lie behind the JSON."""

    head: Place
    last: Place
    data_places: tuple[int, ...]
    identity_at: int
    identity_places: tuple[int, ...]
    crcs_before: int
    crcs_after: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PayloadRow:
    """One payload: the bytes of a tensor, to be framed by `framing`, or pieces that are the item as it is."""

    chunk: Chunk
    pieces: tuple[Place, ...]
    framing: int | None = None
    raw_offset: int = 0


@dataclass(frozen=True)
class ContentsRow:
    """`StateContents`, as the coordinator has it."""

    tensors: dict[str, TensorEntry]
    values: dict[str, ValueEntry]
    containers: tuple[Container, ...] = ()


@dataclass(frozen=True)
class Table:
    """The JSON of a table. `staging_error`: why there are no payloads."""

    payloads: tuple[PayloadRow, ...]
    framings: tuple[FramingRow, ...] = ()
    contents: ContentsRow | None = None
    staging_error: str | None = None


_table = TypeAdapter(Table)


@dataclass(frozen=True)
class HandedOver:
    """What is to be written, over the memory that it lies in. That must stay as it is for as long as this is used."""

    payloads: list[Payload]
    contents: StateContents | None
    staging_error: str | None
    slots: tuple[Slot, ...]

    @property
    def size_bytes(self) -> int:
        """The memory of all slots."""
        return sum(slot.size_bytes for slot in self.slots)


@dataclass
class _Blob:
    """What will lie behind the JSON: bytes, or which buffer of which payload."""

    sources: list[memoryview | tuple[int, int]] = field(default_factory=list)
    size_bytes: int = 0

    def add(self, data: memoryview, source: tuple[int, int] | None = None) -> Place:
        place = Place(self.size_bytes, data.nbytes, in_table=True)
        self.sources.append(source or data)
        self.size_bytes += data.nbytes + -data.nbytes % _ALIGNMENT_BYTES
        return place


@dataclass(frozen=True)
class _Written:
    """A table that was written. `head` is its JSON, ready, `sources` what lies behind that.

    `key` says what it was made of (see `_key_of`), None if it is of no use again; `framings` are those of its tensors,
    by their kinds.
    """

    key: tuple[object, ...] | None
    framings: Mapping[Kind, Framing]
    head: bytes
    sources: Sequence[memoryview | tuple[int, int]]

    def is_of(self, key: tuple[object, ...] | None, payloads: Sequence[Payload], slot: Slot | None) -> bool:
        """Whether it is the table of these payloads too, but for the content of what is no tensor."""
        if key is None or slot is None or key != self.key:
            return False
        from storage.format.items import framing_now

        if any(framing_now(kind) is not framing for kind, framing in self.framings.items()):
            return False
        starts = [at for payload in payloads if (at := _offset_of(payload.content, slot)) is not None]
        return not any(is_misread(slot.memory[start : start + MISREAD_BYTES]) for start in starts)

    def slot_of(self, payloads: Sequence[Payload]) -> Slot:
        """It, with what these payloads have that is no tensor. Raises MemoryError."""
        parts: list[bytes | memoryview] = [self.head]
        for source in self.sources:
            data = source if isinstance(source, memoryview) else _buffer(payloads[source[0]], source[1])
            parts += (data, _PADDING[: -data.nbytes % _ALIGNMENT_BYTES])
        return Slot.of(parts)


class TableWriter:
    """Writes the tables of one rank's saves. Thread-safe.

    Most saves have the payloads of the one before, in the same places of a slot, with other bytes: of their tables all
    is the same but what is no tensor.
    """

    def __init__(self) -> None:
        self._before: _Written | None = None

    @without_collections()
    def write(
        self, payloads: Sequence[Payload], slot: Slot | None, contents: StateContents | None, staging_error: str | None
    ) -> Slot:
        """A slot with the table of the payloads; `slot` is where their tensors lie. What lies elsewhere is copied.

        Raises MemoryError.
        """
        key, written = _key_of(payloads, slot, contents, staging_error), self._before
        if written is None or not written.is_of(key, payloads, slot):
            written = _written(key, payloads, slot, contents, staging_error)
            self._before = written if written.key is not None else None
        return written.slot_of(payloads)


def write(
    payloads: Sequence[Payload], slot: Slot | None, contents: StateContents | None, staging_error: str | None
) -> Slot:
    """The one table of a `TableWriter`."""
    return TableWriter().write(payloads, slot, contents, staging_error)


def _key_of(
    payloads: Sequence[Payload], slot: Slot | None, contents: StateContents | None, staging_error: str | None
) -> tuple[object, ...] | None:
    """Of what a table is made, but for bytes; None where that cannot be told."""
    found: list[object] = [contents, staging_error]
    for payload in payloads:
        content = payload.content
        if isinstance(content, EncodedItem):
            found.append((payload.chunk, content.raw_offset, tuple(len(buffer) for buffer in content.buffers)))
        elif slot is not None and (offset := _offset_of(content, slot)) is not None:
            found.append((payload.chunk, offset))
        else:
            return None
    return tuple(found)


def _offset_of(content: object, slot: Slot) -> int | None:
    """Where a staged tensor begins in the slot; None of what is none, or lies elsewhere."""
    if isinstance(content, EncodedItem | FramedItem):
        return None
    offset = int(content.data_ptr()) - slot.address  # type: ignore[attr-defined]
    return offset if 0 <= offset < slot.size_bytes else None


def _written(
    key: tuple[object, ...] | None,
    payloads: Sequence[Payload],
    slot: Slot | None,
    contents: StateContents | None,
    staging_error: str | None,
) -> _Written:
    blob, numbers, rows = _Blob(), dict[Framing, int](), []
    framing_rows: list[FramingRow] = []
    by_kind: dict[Kind, Framing] = {}
    reach = (0, 0) if slot is None else (slot.address, slot.address + slot.size_bytes)

    def place_of(buffer: object, source: tuple[int, int] | None = None) -> Place:
        view = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        address = address_of(view)
        if reach[0] <= address and address + view.nbytes <= reach[1] and view.nbytes:
            return Place(address - reach[0], view.nbytes)
        return blob.add(view, source)

    for at, payload in enumerate(payloads):
        if (known := _framed_row(payload, slot, by_kind, numbers)) is not None:
            rows.append(known)
            continue
        item = payload.item()
        if isinstance(item, EncodedItem):
            is_given = item is payload.content
            key = key if is_given else None  # how a tensor is framed is not known yet, or it is odd
            pieces = [place_of(buffer, (at, n) if is_given else None) for n, buffer in enumerate(item.buffers)]
            rows.append(PayloadRow(payload.chunk, tuple(pieces), raw_offset=item.raw_offset))
            continue
        number = numbers.get(item.framing)
        if number is None:
            number = numbers[item.framing] = len(framing_rows)
            framing_rows.append(_framing_row(item.framing, blob))
        if not isinstance(payload.content, FramedItem | EncodedItem):
            from storage.format.items import kind_of

            by_kind[kind_of(payload.content)] = item.framing
        rows.append(PayloadRow(payload.chunk, (place_of(item.data),), framing=number))
    of_contents = None if contents is None else ContentsRow(contents.tensors, contents.values, contents.containers)
    body = seal_bytes(_KIND, _table.dump_json(Table(tuple(rows), tuple(framing_rows), of_contents, staging_error)))
    head = _HEAD.pack(len(body)) + body
    return _Written(key, by_kind, head.ljust(_begin(len(body)), b"\0"), blob.sources)


def _framed_row(
    payload: Payload, slot: Slot | None, by_kind: Mapping[Kind, Framing], numbers: Mapping[Framing, int]
) -> PayloadRow | None:
    """The row of a tensor in the slot of whose kind another one was framed before; None of any other payload."""
    if slot is None or (offset := _offset_of(payload.content, slot)) is None:
        return None
    from storage.format.items import kind_of

    framing = by_kind.get(kind_of(payload.content))  # type: ignore[arg-type]
    length = payload.chunk.size_bytes
    if framing is None or is_misread(slot.memory[offset : offset + MISREAD_BYTES]):
        return None
    return PayloadRow(payload.chunk, (Place(offset, length),), framing=numbers[framing])


def _buffer(payload: Payload, number: int) -> memoryview:
    assert isinstance(payload.content, EncodedItem)
    return memoryview(payload.content.buffers[number]).cast("B")


def read(table: Slot, slot: Slot | None) -> HandedOver:
    """What `write` has written. Raises Corrupt."""
    (length,) = _HEAD.unpack(table.memory[: _HEAD.size])
    if _HEAD.size + length > table.size_bytes:
        raise Corrupt("the table of what was staged is damaged: it is longer than its slot")
    body = check_seal(_KIND, bytes(table.memory[_HEAD.size : _HEAD.size + length]), "the table of what was staged")
    try:
        found = _table.validate_json(body)
    except ValidationError as error:
        raise Corrupt(f"the table of what was staged: {error.errors()[0]['msg']}") from None
    behind = table.memory[_begin(length) :]

    def bytes_at(place: Place) -> memoryview:
        memory = behind if place.in_table else slot.memory if slot is not None else behind[:0]
        if min(place.offset, place.length) < 0 or place.offset + place.length > memory.nbytes:
            raise Corrupt("the table of what was staged names bytes that are not in its slot")
        return memory[place.offset : place.offset + place.length]

    framings = [_framing(row, bytes_at) for row in found.framings]
    payloads = []
    for row in found.payloads:
        pieces = tuple(bytes_at(place) for place in row.pieces)
        if row.framing is None:
            item: EncodedItem | FramedItem = EncodedItem(pieces, row.raw_offset, sum(piece.nbytes for piece in pieces))
        elif row.framing < len(framings) and len(pieces) == 1:
            item = FramedItem(framings[row.framing], pieces[0])
        else:
            raise Corrupt("the table of what was staged names a framing that is not in it")
        payloads.append(Payload(row.chunk, item))
    of_contents = found.contents
    contents = None if of_contents is None else StateContents(**vars(of_contents))
    slots = (table,) if slot is None else (table, slot)
    return HandedOver(payloads, contents, found.staging_error, slots)


def _begin(length: int) -> int:
    """Where what lies behind a JSON of that length begins."""
    return -(-(_HEAD.size + length) // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def _framing_row(framing: Framing, blob: _Blob) -> FramingRow:
    return FramingRow(
        blob.add(memoryview(framing.head)),
        blob.add(memoryview(framing.last)),
        *(framing.data_places, framing.identity_at, framing.identity_places),
        *(framing.crcs_before, framing.crcs_after),
    )


def _framing(row: FramingRow, bytes_at: Callable[[Place], memoryview]) -> Framing:
    return Framing(
        bytes(bytes_at(row.head)),
        bytes(bytes_at(row.last)),
        *(row.data_places, row.identity_at, row.identity_places),
        *(row.crcs_before, row.crcs_after),
    )
