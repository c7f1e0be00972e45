"""Stock DCP's `.metadata`: read without executing it, written as stock writes it, and the index made of it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
import random
import subprocess
from collections import OrderedDict
from pathlib import Path, PosixPath
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.serialization import _get_layout

from storage.errors import Corrupt, Denied
from storage.format import dcp_pickle
from storage.format.dcp_metadata import load_metadata
from storage.format.dcp_pickle import dump_metadata
from storage.format.dcp_view import metadata_of
from storage.format.index import Index, of_manifest
from tests.storage.golden_manifest import ATTEMPT, golden_manifest


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
        assert (other.prefix, other.step, other.objects, other.transforms) == (
            (index.prefix, index.step, index.objects, index.transforms)
        )
        assert other.entries == index.entries
        everything = np.arange(len(index))
        num_crcs = 2 if len(index.columns.crcs) else 0  # stock DCP has none
        assert other.columns.num_crcs[1:].sum() == len(index.crcs_of(everything[1:])) == num_crcs
        assert np.array_equal(
            other.with_crcs(everything[1:], index.crcs_of(everything[1:])).crcs_of(everything[2:]),
            index.crcs_of(everything[2:]),
        )
        other = other.with_crcs(everything, index.crcs_of(everything))
        for field in dataclasses.fields(index.columns):
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
