"""`manifest.json`: the index of one checkpoint, and the receipts it is made of.

A sealed document (`sealed`), version 2, or 3 where data objects are spread over prefixes, since older programs refuse
such names as damage. It answers without a pickle where every byte of every tensor is, and
what its checksum must be:

- `objects`: the data objects with their sizes, and the etags that the store gave when they were written (an etag
  means something only in the store of that time; a copied checkpoint has others).
- `tensors`, `values`: what the state held by flattened key, with the path of the key in the nested state.
- `containers`: those dicts and lists of the nested state that the paths do not tell in full (since version 2).
- `items`: one stored chunk each, as columns (item i is the i-th entry of every column). An item lies at `offset` of
  its object, `length` bytes, and is a complete `torch.save` zip; the tensor's own bytes, row-major and contiguous,
  start `raw_offset` after the item's start (for a value `raw_offset` is 0 and the item as a whole is the value).
  Items tile their object without gaps. A tensor without elements has no item.
- checksums: `crc32c` over the item, `block_crcs` over each of its blocks (see `checksum` for why blocks).
- `healthy`: false where whoever saved it said that the state is not to be gone on from (since version 2).
- `metadata_*`: size and checksum of the `.metadata` that commits this manifest, so that neither can be taken for
  another checkpoint's.
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json

from storage.errors import Corrupt, UsageError
from storage.format import layout
from storage.format.checksum import unpack_crcs
from storage.format.columns import Boxes, IntColumn
from storage.format.containers import Container, Path
from storage.format.sealed import Document, check_seal, seal, unseal

MANIFEST_VERSION = 2
SPREAD_VERSION = 3
"""The version of a manifest whose objects are spread over prefixes (see `layout.data_name`)."""
_VERSIONS_READ = (1, MANIFEST_VERSION, SPREAD_VERSION)
HEAD_SIZE_BYTES = 16 * 1024
"""Enough of a manifest for `load_head`, unless its mesh or lineage are described at unusual length."""
_RAW_OFFSET_MIN = 64  # what torch.save puts before a tensor's bytes is longer
_KIND = "manifest"
_FIRST_LIST = "objects"
_RECEIPT_KIND = "receipt"
_ABORTED_KIND = "aborted"

Count = Field(ge=0, lt=1 << 63)


class ObjectEntry(Document):
    """One data object; `name` is relative to the step's folder."""

    name: str
    size_bytes: int = Count
    etag: str


class TensorEntry(Document):
    """One tensor of the state: torch dtype without its prefix ("bfloat16"), global shape, path in the state."""

    dtype: str
    shape: tuple[int, ...]
    path: Path


class ValueEntry(Document):
    """One value that is no tensor."""

    path: Path


@dataclass(frozen=True, slots=True)
class ItemEntry:
    """One stored chunk; see the module's docstring. `offsets` and `sizes` are None for a value."""

    key: str
    offsets: tuple[int, ...] | None
    sizes: tuple[int, ...] | None
    object: int
    offset: int
    length: int
    raw_offset: int
    crc32c: int
    block_size_bytes: int
    block_crcs: str

    def blocks(self) -> tuple[int, ...]:
        """The CRC32C of every block. Raises Corrupt when their number does not fit the length."""
        crcs = unpack_crcs(self.block_crcs)
        if len(crcs) != -(-self.length // self.block_size_bytes):
            raise Corrupt(f"item {self.key!r} has {len(crcs)} block checksums for {self.length} bytes")
        return crcs


_NO_BOXES = Boxes.of(())
_NO_NUMBERS = np.zeros(0, np.int64)


class ItemTable(Document):
    """Many items, a column (of numbers: an array) for each field: a checkpoint may have hundreds of thousands."""

    key: tuple[str, ...] = ()
    offsets: Boxes = _NO_BOXES
    sizes: Boxes = _NO_BOXES
    object: IntColumn = _NO_NUMBERS
    offset: IntColumn = _NO_NUMBERS
    length: IntColumn = _NO_NUMBERS
    raw_offset: IntColumn = _NO_NUMBERS
    crc32c: IntColumn = _NO_NUMBERS
    block_size_bytes: IntColumn = _NO_NUMBERS
    block_crcs: tuple[str, ...] = ()

    @classmethod
    def of(cls, entries: Iterable[ItemEntry]) -> ItemTable:
        """The table with those rows."""
        rows = [operator.attrgetter(*_COLUMNS)(entry) for entry in entries]
        if not rows:
            return cls()
        columns: dict[str, Any] = dict(zip(_COLUMNS, zip(*rows, strict=True), strict=True))
        return cls(**columns | {name: Boxes.of(columns[name]) for name in ("offsets", "sizes")})

    @classmethod
    def join(cls, tables: Sequence[ItemTable], first_objects: Sequence[int]) -> ItemTable:
        """The rows of all tables, in which object 0 of a table is number `first_objects` of all."""
        if not tables:
            return cls()
        columns: dict[str, Any] = {name: [getattr(table, name) for table in tables] for name in _COLUMNS}
        columns["object"] = [column + first for column, first in zip(columns["object"], first_objects, strict=True)]
        for name, parts in columns.items():
            if name in ("key", "block_crcs"):
                columns[name] = tuple(itertools.chain.from_iterable(parts))
            else:
                columns[name] = Boxes.join(parts) if name in ("offsets", "sizes") else np.concatenate(parts)
        return cls(**columns)

    def __len__(self) -> int:
        return len(self.key)

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, ItemTable) and all(
            np.array_equal(mine, theirs) if isinstance(mine, np.ndarray) else mine == theirs
            for mine, theirs in ((getattr(self, name), getattr(other, name)) for name in _COLUMNS)
        )

    def rows(self) -> Iterator[ItemEntry]:
        """Every item, in order, made when it is asked for."""
        columns = (getattr(self, name) for name in _COLUMNS)
        return itertools.starmap(ItemEntry, zip(*map(_plain, columns), strict=True))

    @model_validator(mode="after")
    def _even(self) -> ItemTable:
        if len({len(getattr(self, name)) for name in _COLUMNS}) > 1:
            raise ValueError("columns of different length")
        if self.block_size_bytes.min(initial=1) < 1:
            raise ValueError("blocks without bytes")
        if not np.array_equal(self.offsets.num_dims, self.sizes.num_dims):
            raise ValueError("an item whose offsets and sizes are not of the same number")
        return self


def _plain(column: Any) -> Iterable[Any]:
    """A column's rows in Python's own types."""
    if isinstance(column, Boxes):
        return column.rows()
    rows: Iterable[Any] = column.tolist() if isinstance(column, np.ndarray) else column
    return rows


_COLUMNS = tuple(field.name for field in dataclasses.fields(ItemEntry))


class Manifest(Document):
    """The index of a committed checkpoint."""

    format: Literal["elastic-moe-checkpoint"] = "elastic-moe-checkpoint"
    version: int = MANIFEST_VERSION
    step: int = Count
    attempt: str
    created_unix_s: float
    world_size: int = Field(ge=1)
    generation: int
    lineage: str
    mesh: dict[str, Any] | None
    healthy: bool = True
    metadata_size_bytes: int = Count
    metadata_crc32c: int = Count
    objects: tuple[ObjectEntry, ...]
    tensors: dict[str, TensorEntry]
    values: dict[str, ValueEntry]
    containers: tuple[Container, ...] = ()
    items: ItemTable

    @property
    def size_bytes(self) -> int:
        """The size of all data objects together."""
        return sum(entry.size_bytes for entry in self.objects)

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        for entry in self.objects:
            if not layout.is_data_name(entry.name):
                raise ValueError(f"refused object name {entry.name!r}")
        table = self.items
        is_value = table.sizes.num_dims < 0
        for known, among in ((self.values, is_value), (self.tensors, ~is_value)):
            if not known.keys() >= set(itertools.compress(table.key, among.tolist())):
                raise ValueError("an item belongs to nothing in the manifest")
        if table.object.max(initial=-1) >= len(self.objects):
            raise ValueError("an item is in an object that is not in the manifest")
        object_sizes = np.array([entry.size_bytes for entry in self.objects], np.int64)
        # not the sum of both, which may be too large for 64 bits
        room = object_sizes[table.object] - table.offset
        if bool((table.length > room).any() or (table.raw_offset > table.length).any()):
            raise ValueError("an item reaches past its end, or the end of its object")
        if bool(((table.raw_offset > 0) & (table.raw_offset < _RAW_OFFSET_MIN)).any()):
            raise ValueError("a tensor begins where the head of its item is")
        return self


class Head(BaseModel):
    """What a manifest says before its long lists: which `.metadata` it goes with."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    version: int
    metadata_size_bytes: int = Count
    metadata_crc32c: int = Count

    @classmethod
    def of(cls, manifest: Manifest) -> Head:
        """The head of a whole manifest."""
        return cls(**{name: getattr(manifest, name) for name in cls.model_fields})


class _Version(BaseModel):
    """The one field that every version of the manifest has."""

    version: int


class Receipt(Document):
    """What one rank wrote in one attempt, or (`error`) why it did not."""

    rank: int = Count
    attempt: str
    error: str | None = None
    objects: tuple[ObjectEntry, ...] = ()
    items: ItemTable = ItemTable()


class Aborted(Document):
    """The coordinator's note that an attempt will never be committed."""

    attempt: str
    reason: str


def dump_manifest(manifest: Manifest) -> bytes:
    """The bytes of `manifest.json`."""
    return seal(_KIND, manifest)


def load_manifest(data: bytes, name: str = layout.MANIFEST) -> Manifest:
    """The manifest in `data`.

    Raises:
        Corrupt: damaged or inconsistent.
        UsageError: intact, but written by another version of this package.
    """
    try:
        manifest = unseal(_KIND, Manifest, data, name)
        version = manifest.version
    except Corrupt:
        # perhaps what this program does not know; most are of this version, and parsed once
        manifest, version = None, _version_of(check_seal(_KIND, data, name), name)
        if version in _VERSIONS_READ:
            raise
    if manifest is None or version not in _VERSIONS_READ:
        raise UsageError(
            f"{name} has version {version}, this program reads up to {_VERSIONS_READ[-1]}; use the newer program"
        )
    return manifest


def load_head(data: bytes) -> Head | None:
    """What the first bytes of a manifest say; None if they do not reach as far, or are not those of a known version.

    No checksum covers them alone, so they are good for being compared with an object's size and checksum, and for
    nothing else: what a flipped bit makes of those fits no object.
    """
    try:
        body = from_json(data, allow_partial=True)[_KIND]
        head = Head.model_validate(body)
    except (ValueError, TypeError, KeyError):
        return None
    # without the first list after them the last number may have been cut
    return head if head.version in _VERSIONS_READ and _FIRST_LIST in body else None


def _version_of(body: bytes, name: str) -> int:
    try:
        return _Version.model_validate_json(body).version
    except ValidationError:
        raise Corrupt(f"{name} has no version") from None


def dump_receipt(receipt: Receipt) -> bytes:
    """The bytes of a receipt."""
    return seal(_RECEIPT_KIND, receipt)


def load_receipt(data: bytes, name: str) -> Receipt:
    """The receipt in `data`. Raises Corrupt."""
    return unseal(_RECEIPT_KIND, Receipt, data, name)


def dump_aborted(aborted: Aborted) -> bytes:
    """The bytes of `aborted.json`."""
    return seal(_ABORTED_KIND, aborted)


def load_aborted(data: bytes, name: str) -> Aborted:
    """The note in `data`. Raises Corrupt."""
    return unseal(_ABORTED_KIND, Aborted, data, name)
