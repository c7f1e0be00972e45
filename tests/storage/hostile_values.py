"""Pickled values that are made to harm whoever decodes them."""

from __future__ import annotations

import collections
import dataclasses
import importlib
import io
import os
import pickle
import zipfile
import zlib
from typing import Any

import numpy as np
import torch


@dataclasses.dataclass
class Data:
    number: int = 1


class Call:
    """Pickled as a call."""

    def __init__(self, function: Any, *args: Any, state: Any = None) -> None:
        self.parts = (function, args) if state is None else (function, args, state)

    def __reduce__(self) -> Any:
        return self.parts


def item_of(text: bytes, *, is_summed: bool = True) -> bytes:
    """The item whose `data.pkl` is that, with its checksum or none."""
    sink, out = io.BytesIO(), io.BytesIO()
    torch.save((torch.arange(4.0), 1), sink)
    with zipfile.ZipFile(sink) as old, zipfile.ZipFile(out, "w") as new:
        for member in old.infolist():
            new.writestr(member.filename, text if member.filename.endswith("data.pkl") else old.read(member))
    crc = zlib.crc32(text).to_bytes(4, "little")
    return out.getvalue() if is_summed else out.getvalue().replace(crc, bytes(4))


def pickled(value: Any) -> bytes:
    return pickle.dumps(value, 2)


def named(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


ONE_MB = b"X" + (1_000_000).to_bytes(4, "little") + b"a" * 1_000_000
MAKE_ARRAY = importlib.import_module("numpy._core.multiarray")._reconstruct
LONG_INT = b"\x8b" + (1_000_000).to_bytes(4, "little") + b"\x7f" * 1_000_000

HOSTILE: dict[str, bytes] = {
    "a shell": pickled(Call(os.system, "touch evil")),
    "eval": pickled(Call(eval, "__import__('os').system('touch evil')")),
    "a file": pickled(Call(open, "evil", "w")),
    "an attribute": pickled(Call(getattr, "x", "__class__")),
    "torch's own loader": pickled(Call(torch.storage._load_from_bytes, b"x")),
    "numpy's files": b"\x80\x02" + named("numpy.fromfile") + b"X\x04\x00\x00\x00evil\x85R.",
    "a large bytearray": pickled(Call(bytearray, 10**10)),
    "large bytes": pickled(Call(bytes, 10**10)),
    # the name is one that torch knows, and we do not
    "a large bytearray beside a sparse tensor": pickled([torch._utils._rebuild_sparse_tensor, Call(bytearray, 10**8)]),
    "a large array": pickled(Call(np.ndarray, (10**10,))),
    "a large array of a template": pickled(Call(MAKE_ARRAY, np.ndarray, (10**10,), b"b")),
    "an array that says too much": pickled(
        Call(MAKE_ARRAY, np.ndarray, (0,), b"b", state=(1, (10**10,), np.dtype("u1"), False, b"a"))
    ),
    "an array of nothing": pickled(
        Call(MAKE_ARRAY, np.ndarray, (0,), b"b", state=(1, (10**12,), np.dtype("S0"), False, b""))
    ),
    "a deque of much": pickled(Call(collections.deque, range(10**9))),
    "a set of much": pickled(Call(set, range(10**9))),
    "a Counter of much": pickled(Call(collections.Counter, range(10**9))),
    "a tensor larger than its storage": b"\x80\x02"
    + named("torch._utils._rebuild_tensor_v2")
    + b"((X\x07\x00\x00\x00storage"
    + named("torch.FloatStorage")
    + b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQK\x00J\x00\xe1\xf5\x05\x85K\x01\x85\x89"
    + named("collections.OrderedDict")
    + b")RtR.",
    "a class's attributes": b"\x80\x02" + named("collections.deque") + b"}X\x01\x00\x00\x00aK\x01sb.",
    "an OrderedDict's attributes": pickled(Call(collections.OrderedDict, state={"keys": 1})),
    "a state for a dtype": pickled(Call(np.dtype, "f8", state=(3, "|", None, ("a",), {"a": (1, 2)}, 8, 1, 63))),
    "a key that nests": b"\x80\x02}K\x01" + b"\x85" * 100_000 + b"K\x01s.",
    "a key of 2^60 parts": b"\x80\x02}K\x01q\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"K\x01s.",
    "a set of 2^60 parts": b"\x80\x02"
    + named("__builtin__.frozenset")
    + b"]K\x01q\x00"
    + b"h\x00h\x00\x86q\x00" * 60
    + b"a\x85R.",
    "a long number, hashed often": b"\x80\x02}" + LONG_INT + b"q\x00K\x01s" + b"h\x00K\x01s" * 100_000 + b".",
    "the same bytes, often": b"\x80\x02]("
    + named("_codecs.encode")
    + b"q\x00"
    + ONE_MB
    + b"X\x06\x00\x00\x00latin1\x86q\x01"
    + b"h\x00h\x01R" * 10_000
    + b"e.",
    "another protocol": pickle.dumps([1], 4),
    "an extension": b"\x80\x02\x82\x01.",
    "nothing": b"",
    "half": pickled([1, 2, 3])[:-4],
    "no mark": b"\x80\x02t.",
    "a name alone": b"\x80\x02" + named("_codecs.encode") + b".",
    "itself": b"\x80\x02" + named("uuid.UUID") + b")\x81.",
}
