"""Long items of stock DCP, read in parts."""

from __future__ import annotations

import io
import itertools
import os
import pickle
import random
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st

from storage import ShardReader, inspection, open_store, register_scheme
from storage.errors import Corrupt
from storage.format.checksum import combine_crc32
from storage.format.stock import LONG_ITEM_BYTES, Layout, look
from storage.format.zips import OutOfSight, Window
from storage.stores.memory import MemoryStore
from storage.verified.verifiers import StreamedZipVerifier
from tests.ranks import Ranks
from tests.storage import stock_cases as cases


def item_of(value: object) -> bytes:
    sink = io.BytesIO()
    torch.save(value, sink)
    return sink.getvalue()


def look_at(item: bytes) -> Layout | None:
    return look(lambda start, size: memoryview(item)[start : start + size], len(item))


def rebuilt(item: bytes, layout: Layout) -> torch.Tensor:
    """The tensor, by its layout alone."""
    turned = [layout.sizes[dim] for dim in layout.order]
    size_bytes = int(np.prod(turned)) * layout.dtype.itemsize
    raw = bytearray(item[layout.raw_offset : layout.raw_offset + size_bytes])
    tensor = torch.frombuffer(raw, dtype=torch.uint8).view(layout.dtype).reshape(turned)
    return tensor.permute(*np.argsort(layout.order).tolist())


BASE = torch.arange(60 * 500 * 3).reshape(60, 500, 3)


@pytest.mark.parametrize(
    "tensor",
    [
        BASE.float(),
        BASE.bfloat16(),
        BASE.to(torch.uint16),
        (BASE % 100).to(torch.float8_e4m3fn),
        BASE.to(torch.complex64),
        BASE.float().permute(2, 0, 1),
        BASE.short().transpose(0, 1),
        BASE[10:],
        BASE[:, None],
    ],
    ids=lambda tensor: f"{tensor.dtype} {tuple(tensor.shape)} {tensor.stride()}",
)
def test_where_a_tensor_lies(tensor: torch.Tensor) -> None:
    item = item_of(tensor)
    layout = look_at(item)
    assert layout is not None
    found = rebuilt(item, layout)
    assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(found.contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8))
    assert zlib.crc32(item[layout.start : layout.stop]) == layout.crc32


class Evil:
    """Would make a folder where it is unpickled by anybody who trusts it."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("evil",)


def with_pickle(item: bytes, data: bytes) -> bytes:
    """The item with another `data.pkl`, and right checksums."""
    sink = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(item)) as old, zipfile.ZipFile(sink, "w") as new:
        for member in old.infolist():
            new.writestr(member.filename, data if member.filename.endswith("data.pkl") else old.read(member))
    return sink.getvalue()


def test_all_else_is_left_to_the_safe_loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tensor = torch.arange(40000.0)
    item = item_of(tensor)
    assert look_at(item) is not None
    others = [[tensor, tensor + 1], {"a": tensor}, tensor[::2], tensor.to(torch.complex64).conj(), bytes(200_000)]
    for odd in (*map(item_of, others), item[:-100], bytes(len(item)), with_pickle(item, pickle.dumps(Evil()))):
        assert look_at(odd) is None
    assert list(tmp_path.iterdir()) == []


def test_a_flipped_bit_at_either_end_is_noticed_or_harmless() -> None:
    item = item_of(torch.arange(40000.0))
    whole = look_at(item)
    generator = random.Random(5)
    for _ in range(300):
        place = generator.choice([generator.randrange(1200), len(item) - 1 - generator.randrange(1200)])
        damaged = bytearray(item)
        damaged[place] ^= 1 << generator.randrange(8)
        found = look_at(bytes(damaged))
        # whatever it says now, the bytes do not have the checksum that it says
        assert found in (None, whole) or zlib.crc32(damaged[found.start : found.stop]) != found.crc32, place


@given(st.binary(max_size=300), st.binary(max_size=300))
@settings(max_examples=200, deadline=None)
def test_combined_checksums(first: bytes, second: bytes) -> None:
    assert combine_crc32(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(first + second)


def test_a_sum_of_parts_in_any_order() -> None:
    data = random.Random(4).randbytes(5000)
    crc = zlib.crc32(data[100:4100])
    cuts = [0, 50, 100, 700, 3000, 4100, 4200, 5000]
    parts = [(start, memoryview(data)[start:stop]) for start, stop in itertools.pairwise(cuts)]
    for seed in range(20):
        random.Random(seed).shuffle(parts)
        total = StreamedZipVerifier("object", 100, 4100, crc)
        for start, part in parts:
            total.take(start, part)
        total.check()
        *first, (last, part) = [row for row in parts if row[0] in (100, 700, 3000)]
        total = StreamedZipVerifier("object", 100, 4100, crc)
        for start, earlier in first:
            total.take(start, earlier)
        total.take(last, memoryview(bytes(len(part))))
        with pytest.raises(Corrupt, match="object is damaged"):
            total.check()
        total.take(last, part)  # read again, it is whole
        total.check()


def test_a_window() -> None:
    data = bytes(range(200))
    window = Window(200, ((0, memoryview(data)[:50]), (150, memoryview(data)[150:])))
    file = io.BufferedReader(window)
    assert file.read(10) == data[:10]
    file.seek(-20, io.SEEK_END)
    assert file.read() == data[-20:]
    file.seek(60)
    with pytest.raises(OutOfSight):
        file.read(1)
    assert window.view(40, 10) == data[40:50]
    assert window.view(45, 10) is None


@pytest.mark.parametrize(("layout", "world_size"), [("rows", 1), ("columns", 3), ("replicated", 2)])
def test_long_items_arrive_bit_for_bit(ranks: Ranks, tmp_path: Path, layout: str, world_size: int) -> None:
    ranks.run(cases.save, str(tmp_path), world_size=1)
    for found in ranks.run(cases.load, str(tmp_path), layout, world_size=world_size):
        assert found == []


@pytest.mark.parametrize("layout", ["columns", "replicated"])
def test_a_bit_that_flips_on_its_way_to_several_ranks_is_read_again(ranks: Ranks, tmp_path: Path, layout: str) -> None:
    ranks.run(cases.save, str(tmp_path), world_size=1)
    found = ranks.run(cases.load_with_a_flip, str(tmp_path), layout, world_size=2)
    assert [wrong for wrong, _ in found] == [[], []]
    # what one fetched for both was damaged for both
    assert all(num_retries >= 1 for _, num_retries in found), found


class Flipping(MemoryStore):
    """Flips a bit of the next `num_bad` reads that touch byte `place` of a data object."""

    place = 0
    num_bad = 0

    def read_into(self, key: str, offset: int, buffers: Sequence[memoryview], *, if_match: str | None = None) -> str:
        etag = super().read_into(key, offset, buffers, if_match=if_match)
        for buffer in buffers:
            if self.num_bad and key.endswith(".distcp") and offset <= self.place < offset + buffer.nbytes:
                self.num_bad -= 1
                buffer[self.place - offset] ^= 1
            offset += buffer.nbytes
        return etag


class CountingPlanner(dcp.DefaultLoadPlanner):
    """Counts the tensors that it is told are there."""

    def __init__(self) -> None:
        super().__init__()
        self.num_committed = 0

    def commit_tensor(self, read_item: dcp.planner.ReadItem, tensor: torch.Tensor) -> None:
        self.num_committed += 1
        super().commit_tensor(read_item, tensor)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("is_plain", [True, False])
@pytest.mark.parametrize("num_bad", [1, 2])
def test_a_bit_of_a_long_item_that_flipped_on_the_way_is_read_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, is_plain: bool, num_bad: int
) -> None:
    whole = torch.arange(LONG_ITEM_BYTES // 4 * 2, dtype=torch.int32)
    if not is_plain:  # a tensor with holes is no layout that can be read in parts
        whole = torch.stack((whole, whole), 1)[:, 0]
    dcp.save({"w": whole}, checkpoint_id=f"{tmp_path}/step-000000007", no_dist=True)
    store = Flipping("flipping")
    for path in tmp_path.glob("*/*"):
        store.put(f"{path.parent.name}/{path.name}", [path.read_bytes()])
    register_scheme("flipping", lambda rest: store)
    store.place = 11_000_001  # in the first of several parts

    store.num_bad = num_bad
    problems = inspection.verify(store, "step-000000007/").problems
    assert len(problems) == num_bad - 1

    store.num_bad = num_bad
    found, planner = {"w": torch.zeros(whole.shape, dtype=whole.dtype)}, CountingPlanner()
    reader = ShardReader("flipping://run")
    if num_bad == 1:
        dcp.load(found, storage_reader=reader, planner=planner, no_dist=True)
        assert torch.equal(found["w"], whole)
        assert "is whole; the first time" in caplog.text
        assert store.retries.snapshot().num_by_cause == {"damaged": 2}
    else:
        with pytest.raises(dcp.CheckpointException, match="checksum of"):
            dcp.load(found, storage_reader=reader, planner=planner, no_dist=True)
    assert planner.num_committed == 2 - num_bad


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_damage_in_the_middle_of_a_long_item_is_found(tmp_path: Path) -> None:
    state = {"w": torch.arange(LONG_ITEM_BYTES // 4 * 2, dtype=torch.int32)}
    dcp.save(state, checkpoint_id=f"{tmp_path}/step-000000007", no_dist=True)
    (path,) = tmp_path.glob("*/*.distcp")
    with path.open("r+b") as file:
        file.seek(11_000_001)
        file.write(b"\xff")
    verdict = inspection.verify(open_store(str(tmp_path)), "step-000000007/")
    assert len(verdict.problems) == 1
    assert "checksum of its tensor" in verdict.problems[0]
    with pytest.raises(dcp.CheckpointException, match="checksum of its tensor"):
        dcp.load({"w": torch.zeros_like(state["w"])}, storage_reader=ShardReader(str(tmp_path)), no_dist=True)
