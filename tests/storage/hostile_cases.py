"""Metadata that was made to cost its reader, and what a process with little memory makes of it.

Run as a program: it prints the longest time of a case in seconds, or fails.
"""

from __future__ import annotations

import contextlib
import itertools
import pickle
import resource
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata

from storage.errors import Corrupt, Denied
from storage.format.dcp_metadata import load_metadata

ROOM_BYTES = 300 << 20
_HEAD = b"\x80\x04ctorch.distributed.checkpoint.metadata\nMetadata\n)\x81}("
_END = b"ub."


def field(name: str, value: bytes) -> bytes:
    return b"\x8c" + bytes([len(name)]) + name.encode() + value


def metadata(planner_data: bytes) -> bytes:
    """Metadata of nothing, in which only that may be odd."""
    return (
        _HEAD
        + field("state_dict_metadata", b"}")
        + field("storage_data", b"}")
        + field("planner_data", planner_data)
        + _END
    )


def text(length: int) -> bytes:
    return b"X" + struct.pack("<I", length) + b"a" * length


def doubled(depth: int) -> bytes:
    """A tuple of 2 ** depth parts, of 15 bytes for each level."""
    place = [struct.pack("<I", 100 + level) for level in range(depth + 1)]
    levels = (b"j" + old + b"j" + old + b"\x86r" + new for old, new in itertools.pairwise(place))
    return b")r" + place[0] + b"".join(levels)


def cases() -> Iterator[tuple[str, bytes]]:
    """Name and pickle; all of them short or, where they must grow, a few hundred KB."""
    yield "hashed tuples of tuples", metadata(b"}(" + doubled(40) + b"Nu")
    yield "a key that doubles", metadata(b"}" + b")q\x01" + b"h\x01h\x01\x86q\x01" * 60 + b"Ns")
    yield "nested until the stack ends", metadata(b"})" + b"\x85" * 200_000 + b"Ns")
    yield "nested lists as a key", metadata(b"}" + b"](" * 1000 + b"e" * 1000 + b"Ns")
    yield "a far place in the memo", metadata(b"Nr\xff\xff\xff\x7f")
    yield "a far place, hidden in a text before", metadata(field("r" * 50, b"Nr\xff\xff\xff\x2f"))
    yield "a short text that says it is long", metadata(b"X\xff\xff\xff\x7fabc")
    yield "bytes that say they are long", metadata(b"B\xff\xff\xff\x7fabc")
    yield "more bytes than there is memory", metadata(b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7fabc")
    yield "a frame beyond the end", b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f" + metadata(b"N")[2:]
    yield (
        "a list copied again and again",
        metadata(b"ctorch\nSize\nq\x01](" + b"N" * 100_000 + b"eq\x02" + b"h\x01h\x02\x85R" * 50_000 + b"N"),
    )
    yield (
        "a text as the parts of a size",
        metadata(b"ctorch\nSize\nq\x01" + text(100_000) + b"q\x02" + b"h\x01h\x02\x85R" * 50_000),
    )
    yield (
        "a text shown again and again",
        metadata(
            b"ctorch.serialization\n_get_layout\nq\x01" + b")" + b"\x85" * 100_000 + b"q\x02" + b"h\x01h\x02\x85R" * 10
        ),
    )
    yield (
        "a long number from a text",
        metadata(
            b"ctorch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING\nq\x01"
            + text(100_000).replace(b"a", b"1")
            + b"q\x02"
            + b"h\x01h\x02\x85R" * 50_000
        ),
    )
    yield (
        "a state given to many",
        metadata(
            b"ctorch.distributed.checkpoint.metadata\nStorageMeta\nq\x01}("
            + b"".join(field(f"{n:06}", b"N") for n in range(20_000))
            + b"uq\x02"
            + b"h\x01)\x81h\x02b" * 50_000
        ),
    )
    yield (
        "numbers that hash alike",
        metadata(
            b"}("
            + b"".join(b"\x8a\x0a" + (n * ((1 << 61) - 1)).to_bytes(10, "little") + b"N" for n in range(1, 20_000))
            + b"u"
        ),
    )
    yield (
        "paths of many parts",
        metadata(b"cpathlib\nPosixPath\nq\x01(" + b"N" * 100_000 + b"tq\x02" + b"h\x01h\x02R" * 50_000),
    )
    yield "nothing but lists", metadata(b"}(" + b"]" * 5_000_000 + b"u")
    yield "nothing but marks", metadata(b"(" * 1_000_000)
    yield "an object outside", metadata(b"N" + b"Q")
    yield "a list within itself", metadata(b"]q\x01h\x01a")
    yield "negative sizes", hostile_tensor((-1, 4))
    yield "huge sizes", hostile_tensor((1 << 62, 1 << 62))
    yield "sizes beyond 64 bits", hostile_tensor((1 << 80,))
    yield "many dimensions", hostile_tensor((1,) * 5000)


def hostile_tensor(size: tuple[int, ...]) -> bytes:
    """A tensor of an odd size whose only shard is as odd."""
    import torch
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    class Size(tuple[int, ...]):
        def __reduce__(self) -> tuple[Any, ...]:
            return torch.Size, (tuple(self),)

    chunk = ChunkStorageMetadata(Size((0,) * len(size)), Size(size))  # type: ignore[arg-type]
    stored = TensorStorageMetadata(TensorProperties(), Size(size), [chunk])  # type: ignore[arg-type]
    index = MetadataIndex("key")
    object.__setattr__(index, "offset", Size((0,) * len(size)))
    return pickle.dumps(Metadata({"key": stored}, storage_data={index: _StorageInfo("__0_0.distcp", 0, 100)}))


def main() -> None:
    made = list(cases())
    load_metadata(metadata(b"}"), "", 0, {})  # what is loaded at first use
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + ROOM_BYTES,) * 2)
    longest_s = 0.0
    for name, data in made:
        began_s = time.process_time()
        with contextlib.suppress(Corrupt, Denied):
            load_metadata(data, "", 0, {})
        took_s = time.process_time() - began_s
        print(f"{took_s:.2f} s for {len(data)} bytes: {name}", file=sys.stderr, flush=True)
        longest_s = max(longest_s, took_s)
    print(longest_s)


if __name__ == "__main__":
    main()
