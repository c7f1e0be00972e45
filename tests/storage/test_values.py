"""Values: what comes back is what was saved, or the save says no; nothing is run, and nothing is blamed."""

from __future__ import annotations

import collections
import contextlib
import datetime
import decimal
import enum
import fractions
import io
import os
import pathlib
import random
import time
import tracemalloc
import types
import uuid
import zoneinfo
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st

from storage import Checkpointer, ShardReader, ShardWriter, inspection, open_store
from storage.errors import Corrupt, UnloadableValue, UnsupportedValue, UsageError, one_line
from storage.format.equality import is_plain, same
from storage.format.values import check_value, decode_value, encode_value
from storage.state.fingerprint import fingerprint
from storage.transfer import copy_jobs
from storage.transfer.copying import Copier
from tests.storage.hostile_values import HOSTILE, Data, item_of, pickled
from tests.storage.small_runs import Events, state, states

ZONE = datetime.timezone(datetime.timedelta(hours=1), "x")
GRID = np.arange(6).reshape(2, 3)

KEPT: list[Any] = [
    *(np.float64(1), np.float32("nan"), np.bool_(True), np.int8(3), np.str_("äb"), np.bytes_(b"x"), np.bytes_(b"")),
    *(np.str_(""), np.longdouble(1) / 3, np.complex64(1j), np.void(b"abc"), np.timedelta64(25, "s")),
    *(np.datetime64("2020-01-01", "ns"), np.datetime64("NaT"), np.float32, np.dtype("f4"), np.dtype("M8[s]")),
    *(np.full((2, 3), 1, code) for code in "?bBhHiIlLqQefdgFDG"),
    *(np.zeros((2, 3), ">f8"), GRID.T, GRID[:, ::2], np.zeros((0, 3)), np.array(3.0), np.zeros(2, "M8[25s]")),
    *(np.array(["a", "bcd"]), np.array([b"a"]), np.zeros(2, [("a", "i4"), ("b", ">f4", (3,)), ("c", [("d", "u1")])])),
    np.zeros(2, np.dtype([("a", "u1"), ("b", "f8")], align=True)),
    *(random.getstate(), np.random.get_state(), np.random.get_state(legacy=False), torch.get_rng_state()),
    *(getattr(np.random, kind)(1).state for kind in ("PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64")),
    *(collections.deque([1, 2], 3), collections.deque(), collections.Counter("abca"), collections.OrderedDict(a=1)),
    *(collections.defaultdict(list, {1: [2]}), collections.defaultdict(None, {1: 2})),
    *({1, 2}, set(), frozenset([1, (2, 3)]), {float("nan")}, {(1, 2): 3, None: 4, True: 5}),
    *(datetime.date(2020, 1, 1), datetime.datetime(2020, 1, 2, 3), datetime.datetime(2020, 1, 1, tzinfo=ZONE), ZONE),
    *(datetime.datetime.now(datetime.UTC), datetime.time(1, 2, 3, 4), datetime.timedelta(1, 2, 3)),
    *(decimal.Decimal("1.00"), decimal.Decimal("sNaN"), decimal.Decimal("-Infinity"), uuid.UUID(int=7)),
    *(pathlib.Path("/a/b"), pathlib.PurePosixPath("x"), pathlib.PureWindowsPath("c:/x")),
    *(1j, complex("nan"), bytes(300), b"", bytearray(b"abc"), bytearray(), range(1, 9, 2), slice(1, None)),
    *(1 << 3000, -(1 << 70), float("nan"), -0.0, "\ud800", [1, (2, None)], int, True),
    *(torch.float32, torch.device("cuda:1"), torch.Size([1, 2]), torch.strided),
    (torch.ones(2), np.float32(1), torch.ones(4, 6).T, torch.ones(1).expand(5), torch.empty(0, 3)),
    (torch.nn.Parameter(torch.ones(2)), torch.ones(3, dtype=torch.float8_e4m3fn), torch.ones(2, dtype=torch.bfloat16)),
    (torch.ones(2).to_sparse(), torch.ones(2, dtype=torch.complex64).conj()),
    torch.nn.Linear(1, 1).state_dict(),
]


class Color(enum.IntEnum):
    RED = 1


Point = collections.namedtuple("Point", "x y")

REFUSED: list[tuple[Any, str]] = [
    (np.array([object()]), "numpy.ndarray of objects"),
    (np.zeros(1, [("a", "O")]), "numpy.ndarray of objects"),
    (np.array(["a"], np.dtypes.StringDType()), "stringdtype"),
    (np.ma.array([1]), "numpy.ma"),
    (np.dtype("f8", metadata={"a": 1}), "metadata"),
    (np.random.default_rng(), "numpy.random"),
    (np.random.RandomState(), "numpy.random"),
    (random.Random(), "random.Random"),
    (torch.Generator(), "torch._C.Generator"),
    (Color.RED, "Color"),
    ([{"a": Color.RED}], "Color"),
    (Data(), "Data"),
    (Point(1, 2), "Point"),
    (types.SimpleNamespace(a=1), "SimpleNamespace"),
    (datetime.datetime(2020, 1, 1, fold=1), "would not come back as what it is"),
    (datetime.datetime(2020, 1, 1, tzinfo=zoneinfo.ZoneInfo("UTC")), "getattr"),
    (fractions.Fraction(1, 3), "fractions.Fraction"),
    (decimal.Decimal("1" * 2000), "Decimal"),
    (collections.ChainMap(), "ChainMap"),
    (collections.defaultdict(Data), "default factory|Data"),
    (lambda: 0, "cannot be saved"),
    (memoryview(b"a"), "cannot be saved"),
    (Ellipsis, "Ellipsis"),
    (os.system, "system"),
]


@pytest.mark.parametrize("value", KEPT, ids=lambda value: f"{type(value).__name__}")
def test_what_is_kept_comes_back_as_what_it_was(value: Any) -> None:
    before = torch.serialization.get_safe_globals()
    data = b"".join(encode_value("key", value).buffers)
    found = decode_value(memoryview(data), "key")
    assert same(value, found) and type(found) is type(value)
    stock = torch.load(io.BytesIO(data), weights_only=False)
    assert same(value, stock) or np.array_equal(value, stock)  # numpy's own loader turns the bytes of >f8
    assert torch.serialization.get_safe_globals() == before


@pytest.mark.parametrize(("value", "told"), REFUSED, ids=[type(value).__name__ for value, _ in REFUSED])
def test_what_is_not_kept_is_refused_when_it_is_saved(value: Any, told: str) -> None:
    with pytest.raises(UnsupportedValue, match=told) as caught:
        encode_value("the.key", value)
    assert "'the.key'" in str(caught.value) and "\n" not in str(caught.value)


def test_ranks_that_hold_different_values_are_told_apart() -> None:
    day, zone = datetime.datetime(2020, 1, 1), datetime.timezone.utc  # noqa: UP017
    pairs = [
        *((day, day.replace(second=1)), (day, day.replace(tzinfo=zone)), (day.date(), datetime.date(2020, 1, 2))),
        *(
            (decimal.Decimal("1.0"), decimal.Decimal("1.00")),
            (uuid.UUID(int=1), uuid.UUID(int=2)),
            (slice(1), slice(2)),
        ),
        *((pathlib.Path("a"), pathlib.Path("b")), (torch.float32, torch.float64), (int, float), (range(2), range(3))),
        (np.float32(1), np.float32(2)),
    ]
    for one, other in pairs:
        assert fingerprint(one) != fingerprint(other), one
        assert fingerprint([one]) == fingerprint([decode_value(b"".join(encode_value("k", one).buffers), "k")])


def test_what_was_read_may_be_changed() -> None:
    found = decode_value(b"".join(encode_value("k", (np.zeros(3), torch.zeros(3))).buffers), "k")
    found[0][1] = found[1][1] = 5
    assert found[1].resize_(9).numel() == 9


def test_parts_that_are_one_stay_one() -> None:
    one, array = [1], np.zeros(2)
    found = decode_value(b"".join(encode_value("k", [one, one, array, array]).buffers), "k")
    assert found[0] is found[1] and found[2] is found[3]


_atoms = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(), st.complex_numbers(), st.uuids(),
    st.dates(), st.times(), st.datetimes(), st.timedeltas(), st.decimals(),
    st.sampled_from([kind(1) for kind in (np.float16, np.int64, np.bool_, np.complex128, np.str_)]),
)  # fmt: skip
_keys = st.one_of(st.integers(), st.text(), st.booleans(), st.tuples(st.integers(), st.text()))
_values = st.recursive(
    _atoms,
    lambda parts: st.one_of(
        st.lists(parts), st.dictionaries(_keys, parts), st.tuples(parts, parts), st.lists(parts).map(collections.deque),
        st.dictionaries(_keys, parts).map(collections.OrderedDict), st.frozensets(_keys), st.sets(_keys),
    ),
    max_leaves=12,
)  # fmt: skip


@given(_values)
@settings(deadline=None, max_examples=150)
def test_any_value_comes_back_or_is_refused(value: Any) -> None:
    try:
        data = b"".join(encode_value("key", value).buffers)
    except UnsupportedValue:
        return
    found = decode_value(data, "key")
    assert same(value, found)
    assert not is_plain(value) or repr(value) == repr(found)


def test_what_is_the_same() -> None:
    different = [
        0.0,
        -0.0,
        0,
        False,
        "",
        b"",
        None,
        (),
        [],
        {},
        np.float32(0),
        np.float64(0),
        np.zeros(1),
        {1},
        [1],
    ]
    for number, one in enumerate(different):
        for other_number, other in enumerate(different):
            assert same(one, other) == (number == other_number), (one, other)
    deep: list[Any] = []
    for _ in range(60):
        deep = [deep, deep]  # 2^60 paths
    assert is_plain(deep) and same([deep, {1}], [deep, {1}])


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_made_to_harm_is_neither_run_nor_built(
    name: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data, started_s = item_of(HOSTILE[name]), time.process_time()
    tracemalloc.start()
    try:
        with pytest.raises(UnloadableValue, match="'key'"):
            decode_value(data, "key")
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 64 * len(data) + 1_000_000
    assert time.process_time() - started_s < 5
    assert list(tmp_path.iterdir()) == []
    assert not hasattr(collections.deque, "a")


@given(st.data())
@settings(deadline=None, max_examples=300)
def test_any_change_of_a_pickle_is_a_value_or_an_error_of_ours(data: st.DataObject) -> None:
    value = data.draw(st.sampled_from([kept for kept in KEPT if not isinstance(kept, (torch.Tensor, tuple))]))
    whole = bytearray(pickled(value))
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(UnloadableValue):
        decode_value(item_of(bytes(whole)), "key")


def test_any_number_of_threads_may_decode() -> None:
    items = [b"".join(encode_value("k", value).buffers) for value in KEPT]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            for value, found in zip(KEPT, pool.map(lambda data: decode_value(data, "k"), items), strict=True):
                assert same(value, found)


def test_without_a_checksum_nonsense_is_damage_and_an_unknown_class_is_none() -> None:
    with pytest.raises(Corrupt, match="'key'"):
        decode_value(item_of(b"\x80\x02nonsense", is_summed=False), "key", is_checked=False)
    for is_summed, text in ((True, b"\x80\x02nonsense"), (False, pickled(Data()))):
        with pytest.raises(UnloadableValue):
            decode_value(item_of(text, is_summed=is_summed), "key", is_checked=False)


def test_messages_are_one_line_without_codes() -> None:
    assert one_line("a\x1b[1mb\x1b[0m \n\t c\x00\u202e") == "ab c"
    error = UsageError("\x1b[31mred\nand more")
    assert str(error) == "red and more" and "\x1b" not in repr(error)


# whole checkpoints ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_class_that_is_not_registered_any_more_is_no_damage(tmp_path: pathlib.Path, events: Events) -> None:
    """Nothing is set aside, and no older checkpoint is taken."""
    url = str(tmp_path)
    with Checkpointer(url) as ckpt:
        ckpt.save(1, {**state(1), "data": 0}, wait=True)
        with torch.serialization.safe_globals([Data]):
            ckpt.save(2, {**state(2), "data": Data(5)}, wait=True)
    with Checkpointer(url, on_event=events[1]) as ckpt:
        with pytest.raises(UnloadableValue, match=r"step 2 in .*'data' holds .*Data, .*add_safe_globals"):
            ckpt.restore({**state(0), "data": None})
        assert events[0] == []
        assert ckpt.restore(state(0), ignore=["data"]) == 2  # who does not ask for it has the rest
        found = {**state(0), "data": None}
        with torch.serialization.safe_globals([Data]):
            assert ckpt.restore(found) == 2
    assert found["data"] == Data(5)
    assert states(url) == [(2, "committed"), (1, "committed")]
    with pytest.raises(dcp.CheckpointException, match="UnloadableValue"):
        dcp.load({"data": None}, storage_reader=ShardReader(f"{url}/step-000000002"), no_dist=True)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_values_of_stock_checkpoints(tmp_path: pathlib.Path, events: Events) -> None:
    """Numpy is loaded; what is not is no damage for restoring, for `ckpt verify` and for `ckpt push`."""
    url, kept = f"{tmp_path}/run", {"rng": np.random.get_state(), "n": np.float32(3), "path": pathlib.Path("/a")}
    dcp.save({**state(7), **kept, "data": Data(5)}, checkpoint_id=f"{url}/step-000000007", no_dist=True)
    with Checkpointer(url, on_event=events[1]) as ckpt:
        with pytest.raises(UnloadableValue, match=r"'data' holds .*Data"):
            ckpt.restore({**state(0), "data": None}, strict=False)
        found = {**state(0), "rng": None, "n": None, "path": None}
        assert ckpt.restore(found, ignore=["data"]) == 7
    assert same({key: found[key] for key in kept}, kept)
    assert {name for name, _ in events[0]} == {"restored", "restored_in_part"}
    found = dict.fromkeys(kept)
    dcp.load(found, storage_reader=ShardReader(url), no_dist=True)
    assert same(found, kept)
    assert inspection.verify(open_store(url), "step-000000007/").problems == ()
    target = copy_jobs.open_target(f"{tmp_path}/pushed")
    source = inspection.locate(url)
    for wanted in copy_jobs.plan(source, target):
        job = copy_jobs.look(source.store, target.store, wanted)
        assert isinstance(job, copy_jobs.Found)
        assert Copier(source.store, target.store, 0.0).copy(job).state == "copied"
    assert states(url) == states(f"{tmp_path}/pushed") == [(7, "stock")]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_shard_writer_refuses_what_no_safe_loader_reads_back(tmp_path: pathlib.Path) -> None:
    with pytest.raises(dcp.CheckpointException, match=r"UnsupportedValue: state 'deep\.data' holds .*Data"):
        dcp.save({"deep": {"data": Data()}}, storage_writer=ShardWriter(f"{tmp_path}/a"), no_dist=True)
    assert not list(tmp_path.glob("**/.metadata"))
    dcp.save({"n": np.float32(3)}, storage_writer=ShardWriter(f"{tmp_path}/b"), no_dist=True)
    check_value(encode_value("k", np.float32(3)).buffers[0], "k")
