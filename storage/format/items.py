"""Stored items of tensors: one `torch.save` zip for each chunk, so that stock DCP reads them too."""

from __future__ import annotations

import io
import logging
import threading
import zipfile
from collections import OrderedDict

import torch

from storage.format.checksum import crc32
from storage.format.framing import EncodedItem, FramedItem, Framing, framing_of, is_misread
from storage.format.tensors import bytes_of
from storage.format.zips import member_start
from storage.stores.buffers import Buffer, address_of

log = logging.getLogger(__name__)

NUM_FRAMINGS = 1024

Kind = tuple[torch.dtype, tuple[int, ...], tuple[int, ...]]
"""A tensor's dtype, shape and strides: all that its framing depends on, but for its bytes."""


class _Collector:
    """A file for torch.save that keeps the tensor's memory as it is given and copies the small framing around it."""

    def __init__(self, raw_address: int, raw_size_bytes: int) -> None:
        self._raw = (raw_address, raw_size_bytes)
        self.raw: memoryview | None = None
        self.before: list[bytes] = []
        self.after: list[bytes] = []

    def write(self, data: memoryview) -> int:
        view = memoryview(data).cast("B")
        if self.raw is None and (address_of(view), view.nbytes) == self._raw:
            self.raw = view
        else:
            # torch reuses this memory after the call
            (self.before if self.raw is None else self.after).append(bytes(view))
        return view.nbytes

    def flush(self) -> None:
        """torch.save asks for it; there is nothing to flush."""


class Framings:
    """What torch.save puts around tensors, learnt from what it has put around others. Thread-safe.

    A framing is found once a second tensor of its kind, with other content, went through torch.save and got the zip
    that the first one's framing makes. Where it gets another (from a torch that is not known here), all are forgotten,
    and nothing is learnt any more.
    """

    def __init__(self, num_max: int = NUM_FRAMINGS) -> None:
        self._num_max = num_max
        self._lock = threading.Lock()
        self._known: OrderedDict[Kind, tuple[Framing, bool]] = OrderedDict()
        self._learns = True

    def find(self, kind: Kind) -> Framing | None:
        """The framing of that kind of tensor, if it is known for sure."""
        with self._lock:
            framing, is_proven = self._known.get(kind, (None, False))
            if is_proven:
                self._known.move_to_end(kind)
            return framing if is_proven else None

    def learn(self, kind: Kind, item: EncodedItem) -> None:
        """Learn from what torch.save has put around the bytes of a tensor of that kind."""
        head, data, tail = (bytes(item.buffers[0]), item.buffers[1], bytes(item.buffers[2]))
        with self._lock:
            if not self._learns:
                return
            framing, is_proven = self._known.get(kind, (None, False))
            if framing is None:
                framing = framing_of(head, data, tail)
            elif (framing.head, framing.tail(crc32(data))) == (head, tail):
                is_proven = is_proven or tail != framing.last  # of the same bytes again it says nothing
            else:
                framing = None
            if framing is None:
                self._forget()
                return
            self._known[kind] = framing, is_proven
            if len(self._known) > self._num_max:
                self._known.popitem(last=False)

    def _forget(self) -> None:
        self._learns = False
        self._known.clear()
        log.warning(
            "torch %s stores tensors in a way that is not known here: all of them go through torch.save, which takes"
            " longer",
            torch.__version__,
        )


_framings = Framings()


def kind_of(tensor: torch.Tensor) -> Kind:
    """Of which kind a tensor is."""
    return tensor.dtype, tuple(tensor.shape), tensor.stride()


def framing_now(kind: Kind, framings: Framings = _framings) -> Framing | None:
    """What `item_of` puts around tensors of that kind; None where torch does, which may be for all of them."""
    return framings.find(kind) if torch.serialization.get_crc32_options() else None


def item_of(tensor: torch.Tensor, framings: Framings = _framings) -> EncodedItem | FramedItem:
    """The item of a contiguous CPU tensor which is the whole of its storage: what `torch.save` makes of it."""
    assert tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    assert type(tensor) is torch.Tensor and not tensor.requires_grad
    if not tensor.nbytes or not torch.serialization.get_crc32_options():
        return _saved(tensor)
    kind, data = kind_of(tensor), bytes_of(tensor)
    if is_misread(data):
        return _saved(tensor)
    framing = framings.find(kind)
    if framing is not None:
        return FramedItem(framing, data)
    item = _saved(tensor)
    framings.learn(kind, item)
    return item


def _saved(tensor: torch.Tensor) -> EncodedItem:
    collector = _Collector(tensor.data_ptr(), tensor.nbytes)
    torch.save(tensor, collector)  # type: ignore[arg-type]
    before = b"".join(collector.before)
    if tensor.nbytes == 0:
        return _framed(before, b"", b"")
    if collector.raw is None:  # a torch that copies first: correct all the same, only slower to find
        start = _find_raw(before)
        return _framed(before[:start], before[start : start + tensor.nbytes], before[start + tensor.nbytes :])
    return _framed(before, collector.raw, b"".join(collector.after))


def _framed(head: bytes, data: Buffer, tail: bytes) -> EncodedItem:
    return EncodedItem((head, data, tail), len(head), len(head) + len(data) + len(tail))


def _find_raw(data: bytes) -> int:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        member = next(info for info in archive.infolist() if info.filename.endswith("/data/0"))
    return member_start(memoryview(data), member.header_offset)
