"""What a restore needs of memory beside the state, whatever the size of the state."""

from __future__ import annotations

import mmap
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from storage import open_store
from tests import sample
from tests.ranks import Ranks
from tests.s3 import S3Server
from tests.storage import peak_cases as cases

PEAK_BYTES_MAX = 256 * cases.MIB
"""Less than the state has: a restore that holds all of it once more cannot pass."""


@pytest.fixture(scope="module")
def fresh_ranks() -> Iterator[Ranks]:
    """Processes that have loaded nothing before: memory that others have left behind would not be counted."""
    ranks = Ranks()
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def urls(fresh_ranks: Ranks, _juicefs: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """A checkpoint of ours and one of stock DCP, on a gateway; the tensor is one item of each."""
    found = {name: _juicefs.url(f"{name}-{uuid.uuid4().hex}") for name in ("ours", "stock")}
    fresh_ranks.run(cases.save, found["ours"], _juicefs.environment, False, world_size=1)
    folder = tmp_path_factory.mktemp("stock")
    fresh_ranks.run(cases.save, str(folder), {}, True, world_size=1)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in _juicefs.environment.items():
            patch.setenv(name, value)
        store = open_store(found["stock"])
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                with (
                    path.open("rb") as file,
                    mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
                    memoryview(data) as view,
                ):
                    store.put(str(path.relative_to(folder)), [view])
                path.unlink()
    fresh_ranks.close()
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("written_by", "layout", "world_size"),
    [
        ("ours", "replicated", 2),
        ("ours", "columns", 2),
        ("stock", "rows", 1),
        ("stock", "replicated", 2),
        sample.rest("ours", "rows", 1),
        sample.rest("stock", "columns", 2),
    ],
)
def test_a_restore_needs_little_beside_the_state(
    fresh_ranks: Ranks, urls: Mapping[str, str], juicefs: S3Server, written_by: str, layout: str, world_size: int
) -> None:
    assert cases.SIZE_BYTES > PEAK_BYTES_MAX
    args = (urls[written_by], juicefs.environment, layout)
    peaks_bytes = fresh_ranks.run(cases.peak_above_state, *args, world_size=world_size, timeout_s=120)
    fresh_ranks.close()
    print("peak above the state by rank, MiB:", [round(peak / cases.MIB) for peak in peaks_bytes])
    assert max(peaks_bytes) <= PEAK_BYTES_MAX
