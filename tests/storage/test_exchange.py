"""Ranks that read together: every dtype and layout arrives, every byte is read once per job, and nobody hangs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.loading.requests import packed
from storage.verified.readplan import Stripes
from tests import sample
from tests.ranks import Ranks
from tests.storage import exchange_cases as cases


def world_size(layout: str) -> int:
    return int(np.prod(cases.LAYOUTS[layout][0]))


@pytest.mark.slow
def test_every_dtype_and_layout_arrives_bit_for_bit(ranks: Ranks, tmp_path: Path) -> None:
    urls = []
    for layout, stock in (("rows of 3", False), ("columns of 2", False), ("hsdp 2x2", False), ("tiles 2x2", True)):
        urls.append(str(tmp_path / f"{layout} {stock}"))
        ranks.run(cases.save, urls[-1], layout, stock, world_size=world_size(layout))
    for number, layout in enumerate(cases.LAYOUTS):
        of_layout = sample.turn(urls, number, 1)
        for wrong in ranks.run(cases.load, of_layout, layout, world_size=world_size(layout), timeout_s=120):
            assert not wrong, layout


@pytest.mark.parametrize(
    ("saved", "loaded", "with_dcp"),
    [
        ("rows of 4", "rows of 4", False),
        ("rows of 2", "rows of 4", False),
        ("rows of 4", "rows of 3", False),
        ("hsdp 2x2", "hsdp 2x2", True),
        ("rows of 2", "hsdp 2x2", False),
        ("rows of 2", "columns of 4", True),
        ("columns of 4", "rows of 4", False),
        ("rows of 2", "hsdp 2x2 by columns", False),
        ("rows of 3", "tiles 2x2", False),
        ("rows of 2", "replicated on 3", False),
    ],
)
def test_a_job_reads_what_it_needs_once(ranks: Ranks, tmp_path: Path, saved: str, loaded: str, with_dcp: bool) -> None:
    ranks.run(cases.save_large, str(tmp_path), saved, world_size=world_size(saved))
    counted = ranks.run(cases.count, str(tmp_path), loaded, with_dcp, world_size=world_size(loaded))
    needed = cases.NUM_TENSORS * cases.ROWS * cases.COLUMNS * 4
    read = [rank_read for rank_read, _ in counted]
    assert sum(read) <= 1.02 * needed
    assert max(read) <= 1.3 * needed / len(read)  # and its ranks read about as much as each other


def test_ranks_of_one_host_read_a_folder_each_for_itself(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(cases.save_large, str(tmp_path), "hsdp 2x2", world_size=4)
    counted = ranks.run(cases.count, str(tmp_path), "hsdp 2x2", False, True, world_size=4)
    of_a_rank = cases.NUM_TENSORS * cases.ROWS * cases.COLUMNS * 4 // 2
    assert all(of_a_rank <= read <= 1.02 * of_a_rank for read, _ in counted)


@pytest.mark.parametrize(("layout", "victim"), [("hsdp 2x2", 0), ("columns of 2", 1)])
def test_a_rank_that_fails_at_any_read_fails_all_and_none_hangs(
    ranks: Ranks, tmp_path: Path, layout: str, victim: int
) -> None:
    ranks.run(cases.save, str(tmp_path), "rows of 2", False, world_size=2)
    num_reads = ranks.run(cases.fail, str(tmp_path), layout, -1, 0, world_size=world_size(layout))[victim][1]
    assert num_reads > 10
    for fail_at in {0, 1, num_reads // 3, num_reads // 2, num_reads - 1}:
        for message, _ in ranks.run(cases.fail, str(tmp_path), layout, victim, fail_at, world_size=world_size(layout)):
            assert message == "Transient: out of order"
    message, *others = ranks.run(cases.fail_dcp, str(tmp_path), layout, victim, world_size=world_size(layout))
    assert f"{victim}: 'out of order'" in message
    assert set(others) == {message}


@pytest.mark.parametrize("lacking", ["_held", "_messages", "_incoming"])
def test_a_rank_that_lacks_memory_fails_all_and_none_hangs(ranks: Ranks, tmp_path: Path, lacking: str) -> None:
    ranks.run(cases.save, str(tmp_path), "rows of 2", False, world_size=2)
    for message in ranks.run(cases.lack_memory, str(tmp_path), "hsdp 2x2", 1, lacking, world_size=4, timeout_s=60.0):
        assert "none is left" in message


@st.composite
def stripes(draw: st.DrawFn) -> Stripes:
    length = draw(st.integers(1, 6))
    return Stripes(draw(st.integers(0, 20)), length + draw(st.integers(0, 9)), length, draw(st.integers(1, 6)))


@given(stripes(), st.integers(0, 60), st.integers(0, 60))
@settings(max_examples=400, deadline=None)
def test_packed_stripes_are_those_between(stripes: Stripes, start: int, size: int) -> None:
    item = np.arange(200, dtype=np.uint8)
    runs = [item[stripes.start + k * stripes.stride :][: stripes.length] for k in range(stripes.count)]
    expected = [byte for run in runs for byte in run.tolist() if start <= byte < start + size]
    assert packed(item[start : start + size], start, stripes).tolist() == expected
    before = [byte for run in runs for byte in run.tolist() if byte < start]
    assert stripes.before(start) == len(before)


@st.composite
def boxes(draw: st.DrawFn) -> tuple[list[int], list[int], list[int]]:
    sizes = draw(st.lists(st.integers(1, 5), min_size=0, max_size=4))
    offsets = [draw(st.integers(0, size - 1)) for size in sizes]
    return sizes, offsets, [draw(st.integers(1, size - at)) for size, at in zip(sizes, offsets, strict=True)]


@pytest.mark.filterwarnings("ignore")  # torch's own, that it will drop this version one day
def test_fsdp_of_the_first_version(ranks: Ranks, tmp_path: Path) -> None:
    urls = [str(tmp_path / "run"), str(tmp_path / "run-stock")]
    saved = ranks.run(cases.save_fsdp1, urls[0], world_size=2)[0]
    for found in ranks.run(cases.load_fsdp1, urls, world_size=3):
        for weights in found:
            assert weights.keys() == saved.keys()
            assert all(torch.equal(weights[name], value) for name, value in saved.items())
