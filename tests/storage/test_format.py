"""What is on disk: names, checksums and blocks, items that stock torch reads, and values of plain types."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.arena.arena import Arena
from storage.arena.moves import lies_plainly
from storage.arena.stager import Stager, in_place
from storage.errors import Corrupt, UnsupportedValue
from storage.format import layout
from storage.format.checksum import BlockCrcs, block_size_bytes, crc32c, pack_crcs, unpack_crcs
from storage.format.items import item_of
from storage.format.tensors import bytes_of
from storage.format.values import decode_value, encode_value
from storage.format.zips import check_zip
from storage.saving.encoding import Encoding
from tests.storage.golden_manifest import ATTEMPT


def test_layout_names() -> None:
    assert layout.step_folder(120) == "step-000000120"
    for step in (0, 120, 10**12):
        assert layout.parse_step(layout.step_folder(step)) == step
    assert layout.parse_step("step-12") is None
    assert layout.parse_attempt(layout.attempt_folder(ATTEMPT)) == ATTEMPT
    assert layout.is_data_name(layout.data_name(ATTEMPT, 3, 0))
    assert not layout.is_data_name("attempt-12345678/../__0_0.distcp")
    assert layout.split_step_url("memory://run/step-000000010/") == ("memory://run", "step-000000010/")
    assert layout.split_step_url("/data/run") == ("/data/run", "")


@given(st.lists(st.binary(max_size=60), max_size=8), st.integers(1, 50))
@settings(deadline=None)
def test_block_crcs_do_not_depend_on_how_the_bytes_are_cut(buffers: list[bytes], size: int) -> None:
    data = b"".join(buffers)
    crcs = [crc32c(data[at : at + size]) for at in range(0, len(data), size)]
    found = BlockCrcs(size)
    for buffer in buffers:
        found.add(memoryview(buffer))
    assert (found.whole, found.blocks) == (crc32c(data), crcs)
    assert list(unpack_crcs(pack_crcs(crcs))) == crcs


def test_crc32c_is_castagnoli() -> None:
    assert crc32c(b"123456789") == 0xE3069283  # RFC 3720, appendix B.4


@given(st.integers(0, 1 << 42))
@settings(deadline=None)
def test_blocks_bound_both_costs(length: int) -> None:
    size = block_size_bytes(length)
    assert 16 * 1024 <= size <= 8 << 20
    assert size & (size - 1) == 0
    assert size == 16 * 1024 or size <= 2 * (length // 512 + 1)
    assert length <= 512 * size or size == 8 << 20


TENSORS = [
    torch.arange(10.0),
    torch.tensor(3.0),
    torch.empty(0, 5),
    torch.randn(3, 4).bfloat16(),
    torch.randn(4, 6).t(),
    torch.arange(10)[2:5],
    torch.randn(3).to(torch.float8_e4m3fn),
    torch.randn(3, dtype=torch.complex64).conj(),
    torch.tensor([True, False]),
    torch.randn(40000),
]


def test_items_are_stock_and_hold_the_tensor_where_they_say() -> None:
    stager = Stager(Arena(1))
    for _ in range(2):  # the second time in reused memory
        copy = stager.stage([("t", tensor) for tensor in TENSORS])
        for tensor, staged in zip(TENSORS, copy.tensors, strict=True):
            item = Encoding(item_of(staged))
            data = b"".join(item.views(0, item.length))
            loaded = torch.load(io.BytesIO(data), weights_only=True)
            assert (loaded.dtype, loaded.shape) == (tensor.dtype, tensor.shape)
            assert bytes_of(loaded.contiguous()) == bytes_of(tensor.resolve_conj().contiguous())
            assert data[item.raw_offset : item.raw_offset + loaded.nbytes] == bytes_of(loaded.contiguous())
            assert len(data) == item.length
            check_zip([(0, memoryview(data))], "item")
        copy.release()


def test_staging_does_not_share_memory_with_the_state() -> None:
    tensor = torch.ones(100)
    (copy,) = Stager(Arena()).stage([("t", tensor)]).tensors
    tensor.zero_()
    assert copy.sum() == 100


def zip_of(tensor: torch.Tensor) -> bytes:
    item = Encoding(item_of(tensor))
    return b"".join(item.views(0, item.length))


def test_zip_checksums_find_a_flip_in_the_data() -> None:
    data = bytearray(zip_of(torch.randn(1000)))
    data[2000] ^= 4
    with pytest.raises(Corrupt, match="checksum"):
        check_zip([(0, memoryview(data))], "item")
    with pytest.raises(Corrupt):
        check_zip([(0, memoryview(data[:100]))], "item")


def test_a_damaged_zip_is_corrupt_and_no_other_error() -> None:
    data = zip_of(torch.rand(10))
    for at in range(len(data)):
        for flip in (0x01, 0x80, 0xFF):
            with contextlib.suppress(Corrupt):
                check_zip([(0, memoryview(data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :]))], "item")


class Custom:
    """Nothing that a safe loader would make."""


@pytest.mark.parametrize("value", [1, None, "text", 2.5, {"a": [1, (2, 3)]}, torch.Size([1]), {"t": torch.ones(2)}])
def test_plain_values_survive(value: Any) -> None:
    item = encode_value("key", value)
    assert str(decode_value(b"".join(item.buffers), "key")) == str(value)


@pytest.mark.parametrize("value", [Custom(), [Custom()], lambda: 0])
def test_values_that_need_code_are_refused_when_saved(value: Any) -> None:
    with pytest.raises(UnsupportedValue, match="'key'"):
        encode_value("key", value)


def test_listing_needs_no_torch() -> None:
    code = "import sys, storage, storage.inspection; assert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_only_what_lies_otherwise_is_copied_before_it_is_written() -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    assert lies_plainly(whole[1:])
    rows = in_place(whole[1:])
    assert rows.data_ptr() == whole[1:].data_ptr()
    assert torch.equal(rows, whole[1:])
    assert rows.untyped_storage().nbytes() == rows.nbytes  # or torch.save would write all of `whole`
    assert not lies_plainly(whole.t())
    assert not lies_plainly(torch.ones(2, dtype=torch.complex64).conj())
