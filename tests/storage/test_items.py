"""Items are byte for byte what `torch.save` makes, though most of them never went through it."""

from __future__ import annotations

import dataclasses
import io
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator

import pytest
import torch

from storage.arena.arena import Arena
from storage.arena.stager import Stager
from storage.format.checksum import crc32, crc32c
from storage.format.framing import DESCRIPTOR, EncodedItem, FramedItem, framing_of
from storage.format.items import Framings, item_of
from storage.format.tensors import bytes_of, tensor_over
from storage.saving.encoding import Encoding

DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
    torch.complex64,
)
SHAPES: tuple[tuple[int, ...], ...] = (
    (),
    (1,),
    (1, 1, 1),
    (0,),
    (3, 0),
    *((n,) for n in (15, 16, 17, 63, 64, 65)),
    (7, 11, 13),
    (65536 + 3,),
    (300, 401),
)


def stock(tensor: torch.Tensor) -> bytes:
    file = io.BytesIO()
    torch.save(tensor, file)
    return file.getvalue()


def joined(item: EncodedItem | FramedItem) -> bytes:
    encoding = Encoding(item)
    data = b"".join(encoding.views(0, item.length))
    assert len(data) == item.length
    assert encoding.crcs.whole == crc32c(data)
    return data


def some(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(
        0, 2 if dtype is torch.bool else 256, (num_bytes,), generator=torch.Generator().manual_seed(seed)
    )
    return tensor_over(bytes_of(raw.to(torch.uint8)), dtype, shape)


@pytest.fixture
def num_saved(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """How many tensors went through torch.save so far."""
    calls = []
    save = torch.save

    def counted(*args: object) -> None:
        calls.append(args)
        save(*args)  # type: ignore[arg-type]

    monkeypatch.setattr("storage.format.items.torch.save", counted)
    yield lambda: len(calls)
    monkeypatch.undo()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_item_is_what_torch_save_makes(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    framings = Framings()
    for seed in range(4):
        tensor = some(dtype, shape, seed)
        item = item_of(tensor, framings)
        data = joined(item)
        assert data == stock(tensor), seed
        assert data[item.raw_offset : item.raw_offset + tensor.nbytes] == bytes_of(tensor)
        loaded = torch.load(io.BytesIO(data), weights_only=True)
        assert (loaded.dtype, loaded.shape) == (dtype, tensor.shape)
        assert bytes_of(loaded) == bytes_of(tensor)
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            assert archive.testzip() is None


def test_only_the_first_two_of_a_kind_go_through_torch_save(num_saved: Callable[[], int]) -> None:
    framings = Framings()
    for seed in range(5):
        for shape in ((10, 3), (3, 10), (30,)):
            item_of(some(torch.float32, shape, seed), framings)
        item_of(some(torch.int32, (30,), seed), framings)
    assert num_saved() == 2 * 4


def test_the_same_bytes_twice_prove_nothing(num_saved: Callable[[], int]) -> None:
    framings, zeros = Framings(), torch.zeros(100)
    for _ in range(3):
        item_of(zeros, framings)
    assert num_saved() == 3
    for _ in range(2):
        item_of(torch.ones(100), framings)
    assert num_saved() == 4


def test_what_was_not_used_for_long_is_forgotten(num_saved: Callable[[], int]) -> None:
    framings = Framings(num_max=2)
    for length in (1, 1, 2, 2, 1, 3, 3):
        item_of(torch.rand(length), framings)
    assert num_saved() == 6
    for length in (1, 3, 2):  # of these two are known
        item_of(torch.rand(length), framings)
    assert num_saved() == 7


def test_bytes_that_torch_takes_for_a_descriptor(num_saved: Callable[[], int]) -> None:
    """They go into the serialization id, twice."""
    framings = Framings()
    for seed in range(3):
        item_of(some(torch.uint8, (64,), seed), framings)
    before = num_saved()
    tensor = torch.frombuffer(bytearray(DESCRIPTOR + bytes(60)), dtype=torch.uint8)
    assert joined(item_of(tensor, framings)) == stock(tensor)
    assert num_saved() == before + 2
    assert framings.find((torch.uint8, (64,), (1,))) is not None


def test_without_checksums_all_is_left_to_torch(num_saved: Callable[[], int]) -> None:
    framings = Framings()
    for seed in range(3):
        item_of(some(torch.float32, (8,), seed), framings)
    torch.serialization.set_crc32_options(False)
    try:
        tensor = torch.rand(8)
        assert joined(item_of(tensor, framings)) == stock(tensor)
    finally:
        torch.serialization.set_crc32_options(True)


def unknown_in_the_first(data: bytes) -> bytes:
    return data.replace(b"serialization_id", b"serialization_ID")


def unknown_in_the_second(data: bytes) -> bytes:
    """A time in the first header, as other writers put it there."""
    return data[:10] + struct.pack("<H", zlib.crc32(data) & 0xFFFF) + data[12:]


@pytest.mark.parametrize("change", [unknown_in_the_first, unknown_in_the_second])
def test_a_torch_that_is_not_known_keeps_the_work(
    change: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    framings, save = Framings(), torch.save

    def other(tensor: torch.Tensor, sink: io.BytesIO) -> None:
        file = io.BytesIO()
        save(tensor, file)
        sink.write(memoryview(change(file.getvalue())))

    monkeypatch.setattr(torch, "save", other)
    for seed in range(4):
        tensor = some(torch.float32, (50,), seed)
        item = item_of(tensor, framings)
        assert joined(item) == stock(tensor)
        assert joined(item)[item.raw_offset : item.raw_offset + tensor.nbytes] == bytes_of(tensor)
    assert framings.find((torch.float32, (50,), (1,))) is None
    assert [record.levelname for record in caplog.records if "is not known here" in record.message] == ["WARNING"]


def test_a_framing_is_refused_unless_it_makes_the_same_zip_again() -> None:
    tensor = torch.rand(1000)
    item = item_of(tensor, Framings())
    assert isinstance(item, EncodedItem)
    head, data, tail = (bytes(buffer) for buffer in item.buffers)
    framing = framing_of(head, data, tail)
    assert framing is not None
    assert framing.tail(crc32(data)) == tail
    assert dataclasses.replace(framing, crcs_before=1).tail(crc32(data)) != tail
    assert framing_of(head, data[:-1] + bytes([data[-1] ^ 1]), tail) is None
    for cut in range(len(tail)):
        assert framing_of(head, data, tail[:cut]) is None, cut
    for at in range(len(tail)):  # never an error, whatever it is
        framing_of(head, data, tail[:at] + bytes([tail[at] ^ 0xFF]) + tail[at + 1 :])


def test_the_checksum_of_zips_is_zlibs() -> None:
    data = torch.randint(0, 256, (100_000,), dtype=torch.uint8).numpy().tobytes()
    for cut in (0, 1, 15, 64, 65_537):
        assert crc32(data[cut:], crc32(data[:cut])) == zlib.crc32(data)
        assert crc32(memoryview(bytearray(data))[cut:]) == zlib.crc32(data[cut:])


def test_staged_tensors_share_framings() -> None:
    """The slot's alignment, and where in it a tensor lies, make no difference."""
    framings, stager = Framings(), Stager(Arena())
    tensors = [torch.rand(33, 5) for _ in range(5)]
    for tensor, staged in zip(tensors, stager.stage([("t", tensor) for tensor in tensors]).tensors, strict=True):
        assert joined(item_of(staged, framings)) == stock(tensor)
    assert framings.find((torch.float32, (33, 5), (5, 1))) is not None
