"""Stored items: one `torch.save` zip for each chunk or value, so that stock DCP reads them too."""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from storage.errors import Corrupt, UnsupportedValue
from storage.objects import Buffer
from storage.zips import member_start


@dataclass(frozen=True)
class EncodedItem:
    """An item ready to be stored: the concatenation of `buffers`.

    The tensor's own memory is among the buffers, uncopied, `raw_offset` bytes from the start; it must not change
    before the item is stored.
    """

    buffers: tuple[Buffer, ...]
    raw_offset: int
    length: int


class _Collector:
    """A file for torch.save that keeps the tensor's memory as it is given and copies the small framing around it."""

    def __init__(self, raw_address: int, raw_size_bytes: int) -> None:
        self._raw = (raw_address, raw_size_bytes)
        self.buffers: list[Buffer] = []
        self.length = 0
        self.raw_offset: int | None = None

    def write(self, data: memoryview) -> int:
        view = memoryview(data).cast("B")
        if self.raw_offset is None and (_address(view), view.nbytes) == self._raw:
            self.raw_offset = self.length
            self.buffers.append(view)
        else:
            # torch reuses this memory after the call
            self.buffers.append(bytes(view))
        self.length += view.nbytes
        return view.nbytes

    def flush(self) -> None:
        """torch.save asks for it; there is nothing to flush."""


def encode_tensor(tensor: torch.Tensor) -> EncodedItem:
    """The item of a contiguous CPU tensor which is the whole of its storage."""
    assert tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    collector = _Collector(tensor.data_ptr(), tensor.nbytes)
    torch.save(tensor, collector)  # type: ignore[arg-type]
    if tensor.nbytes == 0:
        return EncodedItem(tuple(collector.buffers), collector.length, collector.length)
    if collector.raw_offset is None:  # a torch that copies first: correct all the same, only slower to find
        data = b"".join(collector.buffers)
        return EncodedItem((data,), _find_raw(data), len(data))
    return EncodedItem(tuple(collector.buffers), collector.raw_offset, collector.length)


def encode_value(key: str, value: Any) -> EncodedItem:
    """The item of anything that is no tensor.

    Raises:
        UnsupportedValue: `torch.load(weights_only=True)` could not load it, and nothing else ever will.
    """
    sink = io.BytesIO()
    kind = type(value).__qualname__
    try:
        torch.save(value, sink)
    except Exception as error:
        raise UnsupportedValue(f"state {key!r} is a {kind} that cannot be saved: {error}") from error
    data = sink.getvalue()
    if not isinstance(value, (bool, int, float, str, bytes, type(None))):
        try:
            decode_value(data, key)
        except Corrupt:
            raise UnsupportedValue(
                f"state {key!r} is a {kind} (or holds something) that no safe loader can read back; keep plain Python"
                " values and tensors in the state, for example with numpy arrays turned into tensors"
            ) from None
    return EncodedItem((data,), 0, len(data))


def decode_value(data: Buffer, key: str) -> Any:
    """The value of an item, loaded without executing code. Raises Corrupt."""
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        first_line = str(error).split("\n", 1)[0]
        raise Corrupt(f"item {key!r} cannot be loaded: {first_line}") from error


def _find_raw(data: bytes) -> int:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        member = next(info for info in archive.infolist() if info.filename.endswith("/data/0"))
    return member_start(memoryview(data), member.header_offset)


def _address(view: memoryview) -> int:
    return int(np.frombuffer(view, np.uint8).ctypes.data) if view.nbytes else 0
