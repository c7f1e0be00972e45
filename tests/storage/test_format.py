"""What is on disk: checksums, sealed documents, the manifest's golden file, items, the restricted metadata parser."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import pickle
import random
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path, PosixPath
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.serialization import _get_layout

from storage.errors import Corrupt, Denied, UnsupportedValue, UsageError
from storage.format import dcp_pickle, layout
from storage.format.checksum import BlockCrcs, block_size_bytes, crc32c, pack_crcs, unpack_crcs
from storage.format.columns import Boxes
from storage.format.containers import Container, decode_key, encode_key
from storage.format.dcp_metadata import load_metadata, metadata_of
from storage.format.dcp_pickle import dump_metadata
from storage.format.index import Index, of_manifest
from storage.format.items import item_of
from storage.format.manifest import (
    ItemEntry,
    ItemTable,
    Manifest,
    ObjectEntry,
    Receipt,
    TensorEntry,
    ValueEntry,
    dump_manifest,
    load_head,
    load_manifest,
)
from storage.format.tensors import bytes_of
from storage.format.values import decode_value, encode_value
from storage.format.zips import check_zip
from storage.saving.commit import Attempt, Contents, Origin, build_manifest
from storage.saving.encoding import Encoding
from storage.saving.staging import StagingBuffer, as_staged

GOLDEN = Path(__file__).with_name("golden_manifest.json")
ATTEMPT = "00000000-1111-2222-3333-444444444444"


def golden_manifest() -> Manifest:
    def item(key: str, offsets: tuple[int, ...] | None, at: int, rank_object: int) -> ItemEntry:
        sizes = None if offsets is None else (2, 3)
        crcs = pack_crcs([crc32c(key.encode())])
        return ItemEntry(
            key=key,
            offsets=offsets,
            sizes=sizes,
            object=rank_object,
            offset=at,
            length=1577,
            raw_offset=704 if sizes else 0,
            crc32c=crc32c(key.encode()),
            block_size_bytes=16384,
            block_crcs=crcs,
        )

    receipts = [
        Receipt(
            rank=rank,
            attempt=ATTEMPT,
            objects=(ObjectEntry(name=layout.data_name(ATTEMPT, rank, 0), size_bytes=size, etag=f"etag-{rank}"),),
            items=ItemTable.of(items),
        )
        for rank, size, items in (
            (0, 3154, (item("model.weight", (0, 0), 0, 0), item("step", None, 1577, 0))),
            (1, 1577, (item("model.weight", (2, 0), 0, 0),)),
        )
    ]
    contents = Contents(
        tensors={"model.weight": TensorEntry(dtype="float32", shape=(4, 3), path=("model", "weight"))},
        values={"step": ValueEntry(path=("step",))},
        containers=(
            Container(path=("seen",), kind="Counter", keys=(("int", "3"), "3"), names=("3(int)", "3")),
            Container(path=("rows",), kind="defaultdict", factory="int"),
        ),
    )
    origin = Origin(generation=7, lineage="launch-a", mesh={"replicate": 1, "shard": 2, "expert": 1})
    manifest, _ = build_manifest(Attempt.of_step(120, ATTEMPT, 2), origin, contents, receipts, 1700000000.5)
    # the pickle's bytes belong to torch's version, not to this format
    return manifest.model_copy(update={"metadata_size_bytes": 1234, "metadata_crc32c": 567})


def altered(**columns: Any) -> dict[str, ItemTable]:
    """The golden items with other columns, which nothing has checked."""
    return {"items": golden_manifest().items.model_copy(update=columns)}


def test_manifest_is_the_golden_one() -> None:
    data = dump_manifest(golden_manifest())
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_bytes(data)
    assert data == GOLDEN.read_bytes()
    assert load_manifest(GOLDEN.read_bytes()) == golden_manifest()
    assert json.loads(data)["manifest"]["items"]["object"] == [0, 0, 1]


def test_manifests_of_version_1_are_still_read() -> None:
    old = GOLDEN.with_name("golden_manifest_v1.json").read_bytes()
    assert load_manifest(old) == golden_manifest().model_copy(update={"version": 1, "containers": ()})
    assert load_head(old) is not None


@pytest.mark.parametrize(
    "key", ["", "a.b", 0, -7, 1 << 70, True, False, None, 1.0, float("inf"), b"\x00\xff", (), (1, "1", (None, 2.5))]
)
def test_a_key_of_a_dict_comes_back_as_it_was(key: Any) -> None:
    encoded = json.loads(json.dumps(encode_key(key)))
    decoded = decode_key(encoded if isinstance(encoded, str) else tuple(encoded))
    assert decoded == key and type(decoded) is type(key)


@pytest.mark.parametrize(
    "encoded", [("int", "x"), ("bool", "yes"), ("float", "z"), ("bytes", "0"), ("tuple", "[" * 5000), ("set", "")]
)
def test_what_is_no_key_is_damage(encoded: Any) -> None:
    with pytest.raises(Corrupt):
        decode_key(encoded)


def test_any_flipped_bit_of_a_manifest_is_noticed() -> None:
    data = dump_manifest(golden_manifest())
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 1 << (position % 8)
        with pytest.raises(Corrupt):
            load_manifest(bytes(flipped))
    for cut in (0, 10, len(data) - 1):
        with pytest.raises(Corrupt):
            load_manifest(data[:cut])


def test_a_newer_manifest_is_no_damage() -> None:
    newer = dump_manifest(golden_manifest().model_copy(update={"version": 3}))
    with pytest.raises(UsageError, match="version 3"):
        load_manifest(newer)


@pytest.mark.parametrize(
    "change",
    [
        {"objects": (ObjectEntry(name="../../etc/passwd", size_bytes=9999, etag=""),) * 2},
        {"objects": ()},
        {"tensors": {}},
        {"values": {}},
        altered(length=np.array([1577, 1577])),
        altered(length=np.array([1577, 1578, 1577])),
        altered(length=np.array([1577, 1577, 1 << 64], object)),
        altered(offset=np.array([0, 1577, -1])),
        altered(offset=np.array([0, 1577, (1 << 63) - 1577])),
        altered(raw_offset=np.array([704, 0, 1578])),
        altered(object=np.array([0, 0, 2])),
        altered(block_size_bytes=np.array([16384, 16384, 0])),
        altered(offsets=Boxes.of([None, None, (2, 0)])),
        altered(offsets=Boxes.of([(0,), None, (2, 0)])),
        altered(offsets=Boxes(np.array([2, -1, 2]), np.array([0, 0, 2, -1]))),
        altered(offsets=Boxes.of([None] * 3), sizes=Boxes.of([None] * 3)),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(change: dict[str, Any]) -> None:
    data = dump_manifest(golden_manifest().model_copy(update=change))
    with pytest.raises(Corrupt):
        load_manifest(data)


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
    buffer = StagingBuffer()
    for _ in range(2):  # the second time in reused memory
        for tensor, staged in zip(TENSORS, buffer.stage(TENSORS), strict=True):
            item = Encoding(item_of(staged))
            data = b"".join(item.views(0, item.length))
            loaded = torch.load(io.BytesIO(data), weights_only=True)
            assert (loaded.dtype, loaded.shape) == (tensor.dtype, tensor.shape)
            assert bytes_of(loaded.contiguous()) == bytes_of(tensor.resolve_conj().contiguous())
            assert data[item.raw_offset : item.raw_offset + loaded.nbytes] == bytes_of(loaded.contiguous())
            assert len(data) == item.length
            check_zip(data, "item")


def test_staging_does_not_share_memory_with_the_state() -> None:
    tensor = torch.ones(100)
    (copy,) = StagingBuffer().stage([tensor])
    tensor.zero_()
    assert copy.sum() == 100


def zip_of(tensor: torch.Tensor) -> bytes:
    item = Encoding(item_of(tensor))
    return b"".join(item.views(0, item.length))


def test_zip_checksums_find_a_flip_in_the_data() -> None:
    data = bytearray(zip_of(torch.randn(1000)))
    data[2000] ^= 4
    with pytest.raises(Corrupt, match="checksum"):
        check_zip(data, "item")
    with pytest.raises(Corrupt):
        check_zip(data[:100], "item")


def test_a_damaged_zip_is_corrupt_and_no_other_error() -> None:
    data = zip_of(torch.rand(10))
    for at in range(len(data)):
        for flip in (0x01, 0x80, 0xFF):
            with contextlib.suppress(Corrupt):
                check_zip(data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :], "item")


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


def stock_metadata(folder: Path) -> bytes:
    state = {"m": torch.randn(3, 3), "n": {"b": torch.ones(2, dtype=torch.bfloat16), "v": [1, 2]}, "x": 5}
    with pytest.warns(UserWarning, match="single process"):
        dcp.save(state, checkpoint_id=folder)
    return (folder / ".metadata").read_bytes()


def test_stock_metadata_is_read_as_pickle_would(tmp_path: Path) -> None:
    data = stock_metadata(tmp_path)
    check_same(parse(data), pickle.loads(data))


def parse(data: bytes, name: str = ".metadata") -> Index:
    return load_metadata(data, "", 0, {}, name)


def check_same(ours: Index, theirs: Metadata) -> None:
    """The index says what the unpickled metadata says."""
    view = metadata_of(ours)
    assert dict(view.state_dict_metadata.items()) == theirs.state_dict_metadata
    assert view.planner_data == theirs.planner_data
    places = {}
    for key, entry in ours.entries.items():
        for item in range(entry.first, entry.last):
            index = MetadataIndex(key, ours.box(key, item)[0] if entry.is_tensor else None)
            columns = ours.columns
            name = ours.objects[columns.object[item]].name
            places[index] = _StorageInfo(name, int(columns.offset[item]), int(columns.length[item]))
            hint = item - entry.first if entry.is_tensor else None
            assert next(found for found in theirs.storage_data if found == index).index in (hint, None)
    assert places == theirs.storage_data


def test_an_index_survives_the_way_to_another_rank(tmp_path: Path) -> None:
    for index in (of_manifest("run/", golden_manifest()), parse(stock_metadata(tmp_path))):
        other = Index.load(index.dump())
        assert (other.prefix, other.step, other.is_stock, other.objects, other.transforms) == (
            (index.prefix, index.step, index.is_stock, index.objects, index.transforms)
        )
        assert other.entries == index.entries
        everything = np.arange(len(index))
        if not index.is_stock:
            assert other.num_crcs(everything[1:]) == len(index.crcs_of(everything[1:])) == 2
            assert np.array_equal(
                other.with_crcs(everything[1:], index.crcs_of(everything[1:])).crcs_of(everything[2:]),
                index.crcs_of(everything[2:]),
            )
            other = other.with_crcs(everything, index.crcs_of(everything))
        for field in dataclasses.fields(index.columns):
            if index.is_stock and field.name == "first_crc":
                continue
            assert np.array_equal(getattr(other.columns, field.name), getattr(index.columns, field.name)), field.name


def test_our_metadata_is_stock(tmp_path: Path) -> None:
    index = of_manifest("run/", golden_manifest())
    metadata = pickle.loads(dump_metadata(index, ATTEMPT))
    check_same(index, metadata)
    assert (metadata.storage_meta, metadata.version) == (StorageMeta(save_id=ATTEMPT), CURRENT_DCP_VERSION)
    check_same(parse(dump_metadata(index, ATTEMPT)), metadata)


@given(st.integers(0, 1 << 70))
def test_whole_numbers_of_any_size_survive_our_pickling(number: int) -> None:
    assert pickle.loads(b"\x80\x04" + dcp_pickle._integer(number) + b".") == number


class Evil:
    def __init__(self, call: Any, *args: Any) -> None:
        self._reduced = (call, args)

    def __reduce__(self) -> Any:
        return self._reduced


def test_a_malicious_pickle_executes_nothing(tmp_path: Path) -> None:
    trace = tmp_path / "executed"
    metadata = Metadata({}, storage_data={})
    for call, args in (
        (os.system, (f"touch {trace}",)),
        (eval, (f"open({str(trace)!r}, 'w')",)),
        (subprocess.Popen, (["touch", str(trace)],)),
        (torch.load, (str(trace),)),
        (getattr, ("text", "upper")),
    ):
        metadata.planner_data = Evil(call, *args)
        with pytest.raises(Denied, match="refused: it names") as caught:
            parse(pickle.dumps(metadata), "run/.metadata")
        assert "\n" not in str(caught.value)
    assert not trace.exists()


def test_a_pickle_cannot_alter_the_classes() -> None:
    # GLOBAL Metadata, then BUILD with (None, {"evil": "x"}): setattr on the class itself
    alters = b"\x80\x04ctorch.distributed.checkpoint.metadata\nMetadata\nN}(\x8c\x04evil\x8c\x01xu\x86b."
    with pytest.raises(Corrupt):
        parse(alters)
    assert not hasattr(Metadata, "evil")
    # the same to what is no class of DCP's: builtins cannot be altered, and the functions are the file's own
    for name in ("torch\nSize", "torch.serialization\n_get_layout", "pathlib\nPosixPath", "collections\nOrderedDict"):
        with pytest.raises(Corrupt):
            parse(b"\x80\x04c" + name.encode() + b"\nN}(\x8c\x04evil\x8c\x01xu\x86b.")
    assert not any(hasattr(kind, "evil") for kind in (tuple, str, PosixPath, OrderedDict, torch.Size, _get_layout))


def test_damaged_metadata_never_escapes_as_another_error(tmp_path: Path) -> None:
    data = stock_metadata(tmp_path)
    seed = 11
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(400):
        flipped = bytearray(data)
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        with contextlib.suppress(Corrupt, Denied):
            parse(bytes(flipped))
    for junk in (b"", b"\x80\x04N.", pickle.dumps({"a": 1}), pickle.dumps(Metadata({"k": 3}, storage_data={}))):  # type: ignore[dict-item]
        with pytest.raises(Corrupt):
            parse(junk)


def test_metadata_that_points_out_of_its_folder_is_refused(tmp_path: Path) -> None:
    metadata = pickle.loads(stock_metadata(tmp_path))
    next(iter(metadata.storage_data.values())).relative_path = "../../secret"
    with pytest.raises(Denied, match="refused object name"):
        parse(pickle.dumps(metadata))


def test_listing_needs_no_torch() -> None:
    code = "import sys, storage, storage.inspection; assert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_only_what_lies_otherwise_is_copied_before_it_is_written() -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    rows = as_staged(whole[1:])
    assert rows is not None and rows.data_ptr() == whole[1:].data_ptr()
    assert torch.equal(rows, whole[1:])
    assert rows.untyped_storage().nbytes() == rows.nbytes  # or torch.save would write all of `whole`
    assert as_staged(whole.t()) is None
    assert as_staged(torch.ones(2, dtype=torch.complex64).conj()) is None
