"""The manifest: its golden file, older and newer versions, damage, and what contradicts itself."""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np
import pytest

from storage.errors import Corrupt, UsageError
from storage.format.columns import Boxes
from storage.format.containers import decode_key, encode_key
from storage.format.manifest import (
    ItemTable,
    ObjectEntry,
    dump_manifest,
    load_head,
    load_manifest,
)
from tests.storage.golden_manifest import GOLDEN, golden_manifest


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
    newer = dump_manifest(golden_manifest().model_copy(update={"version": 4}))
    with pytest.raises(UsageError, match="version 4"):
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
