"""`.metadata` as stock DCP's own pickler would have written it, without making the objects first.

A checkpoint of 256k shards is a million small objects in DCP's classes. Made and pickled, they cost ten seconds during
which the interpreter does nothing else, and so nothing is trained. The opcodes below say the same: every distinct key,
name and size is written once and fetched from the unpickler's memo after that, which also makes the file smaller and
its reading faster.
"""

from __future__ import annotations

import functools
import io
import struct
from collections.abc import Iterator

from storage.format.columns import Ints
from storage.format.index import Entry, Index
from storage.torch_private import CONTIGUOUS_FORMAT, GET_LAYOUT, MEMORY_FORMAT, STORAGE_INFO, STRIDED

_DCP = "torch.distributed.checkpoint.metadata"
_VERSION = "1.0.0"  # DCP's own version of this layout (filesystem.CURRENT_DCP_VERSION)
# the opcodes used (Lib/pickletools.py): ( MARK  ) EMPTY_TUPLE  ] EMPTY_LIST  } EMPTY_DICT  \x81 NEWOBJ  b BUILD
# R REDUCE  \x85 TUPLE1  t TUPLE  e APPENDS  u SETITEMS  c GLOBAL  j LONG_BINGET  r LONG_BINPUT  N None  \x89 False
_NEW = b")\x81"
_NUM_SHARDINGS = 64  # remembered at most; a model has few, each of many tensors
_INT32 = struct.Struct("<ci").pack


def dump_metadata(index: Index, save_id: str) -> bytes:
    """The bytes of `.metadata` for a checkpoint of ours; `save_id` is noted in it."""
    sink = io.BytesIO()
    sink.writelines(_Writer(index, save_id).opcodes())  # a join would first hold a million pieces
    return sink.getvalue()


class _Writer:
    def __init__(self, index: Index, save_id: str) -> None:
        self._index = index
        self._save_id = save_id
        self._memo: dict[object, bytes] = {}  # opcodes that fetch what the unpickler remembers under a name
        self._heads: dict[str, bytes] = {}
        self._shardings: dict[object, bytes] = {}  # the chunks of tensors that are sharded alike

    def opcodes(self) -> Iterator[bytes]:
        yield b"\x80\x04" + self._global(_DCP, "Metadata") + _NEW + b"}(" + self._text("state_dict_metadata") + b"}("
        for key, entry in self._index.entries.items():
            yield self._text(key)
            yield from self._tensor(entry) if entry.is_tensor else [self._global(_DCP, "BytesStorageMetadata") + _NEW]
        yield b"u" + self._text("planner_data") + b"}("
        for key, entry in self._index.entries.items():
            parts = (self._text(part) if isinstance(part, str) else _integer(part) for part in entry.path)
            yield self._text(key) + b"(" + b"".join(parts) + b"t"
        yield b"u" + self._text("storage_data") + b"}("
        for key, entry in self._index.entries.items():
            if entry.last > entry.first:
                yield self._places(key, entry)
        yield b"u" + self._text("storage_meta") + self._storage_meta()
        yield self._text("version") + self._text(_VERSION) + b"ub."

    def _tensor(self, entry: Entry) -> Iterator[bytes]:
        yield self._global(_DCP, "TensorStorageMetadata") + _NEW + b"}(" + self._text("properties")
        yield self._properties(entry.dtype) + self._text("size") + self._size(entry.shape)
        yield self._text("chunks") + b"](" + self._chunks(entry) + b"eub"

    def _chunks(self, entry: Entry) -> bytes:
        columns, span = self._index.columns, slice(entry.first, entry.last)
        # the number as well: boxes of no dimensions are no bytes, however many
        sharding = (
            entry.last - entry.first,
            len(entry.shape),
            *(column[span].tobytes() for column in (columns.offsets, columns.sizes)),
        )
        known = self._shardings.get(sharding)
        if known is not None:
            return known
        num_remembered = len(self._memo)
        parts: list[bytes] = []
        for offsets, sizes in zip(self._boxes(entry, "offsets"), self._boxes(entry, "sizes"), strict=True):
            head = self._head(_DCP, "ChunkStorageMetadata", "offsets")
            parts += head, self._size(offsets), self._text("sizes"), self._size(sizes), b"ub"
        chunks = b"".join(parts)
        if len(self._memo) == num_remembered and len(self._shardings) < _NUM_SHARDINGS:
            self._shardings[sharding] = chunks  # it only fetches: so the next tensor with these shards says the same
        return chunks

    def _places(self, key: str, entry: Entry) -> bytes:
        columns, objects = self._index.columns, self._index.objects
        span = slice(entry.first, entry.last)
        rows = zip(
            self._corners(entry),
            columns.object[span].tolist(),
            _integers(columns.offset[span]),
            _integers(columns.length[span]),
            strict=True,
        )
        words, known_words = self._place_words(key), self._place_words(key)
        parts: list[bytes] = []
        for corner, where, offset, length in rows:
            before, between, at, long = words
            parts += before, corner, between, self._text(objects[where].name), at, offset, long, length, b"ub"
            words = known_words
        return b"".join(parts)

    def _place_words(self, key: str) -> tuple[bytes, bytes, bytes, bytes]:
        """What is the same in all places of a key: before the item's number, between its corner and its object's name,
        before its offset, and before its length.
        """
        before = self._head(_DCP, "MetadataIndex", "fqn") + self._text(key) + self._text("index")
        between = b"ub" + self._head(*STORAGE_INFO, "relative_path")
        return before, between, self._text("offset"), self._text("length")

    def _corners(self, entry: Entry) -> list[bytes]:
        """Number and offsets of each item of a tensor, whose offsets are remembered from its chunks."""
        if not entry.is_tensor:
            return [b"N"] * (entry.last - entry.first)
        boxes = enumerate(self._boxes(entry, "offsets"))
        return [_integer(number) + self._text("offset") + self._size(box) for number, box in boxes]

    def _boxes(self, entry: Entry, name: str) -> Iterator[tuple[int, ...]]:
        column = getattr(self._index.columns, name)
        return map(tuple, column[entry.first : entry.last, : len(entry.shape)].tolist())

    def _head(self, module: str, name: str, field: str) -> bytes:
        """A new object of that class, up to the value of its first field."""
        known = self._heads.get(name)
        if known is not None:
            return known
        head = self._global(module, name) + _NEW + b"}(" + self._text(field)
        self._heads[name] = self._global(module, name) + _NEW + b"}(" + self._text(field)
        return head

    def _once(self, name: object, opcodes: bytes) -> bytes:
        """What pushes `opcodes`' object now, and lets it be fetched by `name` from here on."""
        number = struct.pack("<I", len(self._memo))
        self._memo[name] = b"j" + number
        return opcodes + b"r" + number

    def _storage_meta(self) -> bytes:
        head = self._global(_DCP, "StorageMeta") + _NEW + b"}("
        fields = [self._text(name) + b"N" for name in ("checkpoint_id", "load_id")]
        fields += [self._text("save_id") + self._text(self._save_id), self._text("modules") + b"]"]
        return head + b"".join(fields) + b"ub"

    def _properties(self, dtype: str) -> bytes:
        known = self._memo.get(("properties", dtype))
        if known is not None:
            return known
        layout = self._global(*GET_LAYOUT) + self._text(STRIDED) + b"\x85R"
        form = self._global(*MEMORY_FORMAT) + _integer(CONTIGUOUS_FORMAT) + b"\x85R"
        state = b"(" + self._global("torch", dtype) + layout + b"\x89" + form + b"\x89t"
        opcodes = self._global(_DCP, "TensorProperties") + _NEW + state + b"b"
        return self._once(("properties", dtype), opcodes)

    def _global(self, module: str, name: str) -> bytes:
        return self._memo.get((module, name)) or self._once((module, name), f"c{module}\n{name}\n".encode())

    def _text(self, text: str) -> bytes:
        known = self._memo.get(text)
        if known is not None:
            return known
        data = text.encode("utf-8", "surrogatepass")
        return self._once(text, b"X" + struct.pack("<I", len(data)) + data)

    def _size(self, size: tuple[int, ...]) -> bytes:
        known = self._memo.get(("size", size))
        if known is not None:
            return known
        numbers = b"".join(map(_integer, size))
        return self._once(("size", size), self._global("torch", "Size") + b"(" + numbers + b"t\x85R")


def _integers(column: Ints) -> list[bytes]:
    """`_integer` of each; most take the one form that is written here."""
    return [_INT32(b"J", number) if 255 < number < 1 << 31 else _integer(number) for number in column.tolist()]


@functools.lru_cache(1 << 12)
def _integer(number: int) -> bytes:
    """A whole number >= 0."""
    if number < 256:
        return b"K" + bytes((number,))
    if number < 1 << 31:
        return b"J" + struct.pack("<i", number)
    data = number.to_bytes(number.bit_length() // 8 + 1, "little")
    return b"\x8a" + bytes((len(data),)) + data
