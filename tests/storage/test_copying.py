"""`ckpt push` and `pull`: what arrives is what was there, and no damaged or replaced checkpoint is committed."""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st

from elastic_moe.cli.main import main
from storage import Checkpointer, inspection, open_store
from storage.errors import Corrupt
from storage.format.checksum import combine_crc32c, crc32c
from storage.run import catalog
from storage.stores import memory
from storage.stores.memory import MemoryStore
from storage.stores.objects import parts_of_size
from storage.transfer import copy_jobs, copying
from storage.verified.verifiers import BlockSums, BlockVerifier
from tests import sample
from tests.storage.copied_runs import contents, make_state, run
from tests.storage.small_runs import fresh_memory_url, opened

# the way of the bytes -------------------------------------------------------------------------------------------


@given(st.binary(), st.binary())
def test_combined_checksums(first: bytes, second: bytes) -> None:
    assert combine_crc32c(crc32c(first), crc32c(second), len(second)) == crc32c(first + second)


@given(st.data())
def test_blocks_are_checked_whatever_the_parts_and_their_order(data: st.DataObject) -> None:
    content = data.draw(st.binary(min_size=1, max_size=200))
    block, part = data.draw(st.integers(1, 90)), data.draw(st.integers(1, 90))
    crcs = np.array([crc32c(content[at : at + block]) for at in range(0, len(content), block)], np.uint32)
    sums = BlockSums(np.arange(0, len(content), block), len(content), crcs)
    parts = data.draw(st.permutations(range(0, len(content), part)))
    check = BlockVerifier("it", sums)
    for offset in [*parts, parts[0]]:
        check.take(offset, memoryview(content[offset : offset + part]))
    flipped = bytearray(content)
    flipped[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    check = BlockVerifier("it", sums)

    def take_all() -> None:
        for offset in parts:
            check.take(offset, memoryview(flipped)[offset : offset + part])

    with pytest.raises(Corrupt, match="it is damaged"):
        take_all()


@pytest.mark.parametrize("kind", ["local", "juicefs", "moto", sample.rest("fsspec-s3")])
def test_there_and_back(
    kind: str, source: Path, tmp_path: Path, make_url: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    url, back = make_url(kind), str(tmp_path / "back")
    options = [f"{url}&part_size_mib=5" if kind in ("juicefs", "moto") else url]
    pushed = run(capsys, "push", str(source), *options)
    assert [(row["step"], row["state"]) for row in pushed["steps"]] == [(20, "copied"), (10, "copied")]
    assert (pushed["num_objects_sent"], pushed["num_objects_present"], pushed["present_bytes"]) == (10, 0, 0)
    assert pushed["sent_bytes"] == sum(path.stat().st_size for path in source.rglob("*.distcp"))
    assert main(["ckpt", "verify", url]) == 0
    capsys.readouterr()
    assert run(capsys, "pull", url, back, "--last", "1")["num_objects_sent"] == 5
    assert run(capsys, "pull", url, back)["num_objects_present"] == 5
    assert contents(back) == contents(str(source))
    again = run(capsys, "push", str(source), url)
    assert (again["sent_bytes"], [row["state"] for row in again["steps"]]) == (0, ["present", "present"])
    state = make_state(0)
    with Checkpointer(back) as ckpt:
        assert ckpt.restore(state) == 20
    assert torch.equal(state["large"], make_state(20)["large"])


def test_from_store_to_store_and_one_step(
    source: Path, make_url: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = make_url("juicefs"), make_url("moto")
    run(capsys, "push", f"{source}/step-000000010", first)
    endpoint = first.partition("?")[2]
    assert first != second
    other = first.replace("?", "-other?")
    assert endpoint in other
    copied = run(capsys, "pull", first, other, "--step", "10")
    assert [row["step"] for row in copied["steps"]] == [10]
    assert contents(other) == {key: data for key, data in contents(str(source)).items() if "10/" in key}


def test_checkpoints_of_stock_dcp(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = make_state(1)
    for folder in ("bare", "run/step-000000030"):
        with pytest.warns(UserWarning, match="single process"):
            dcp.save(state, checkpoint_id=tmp_path / folder)
    url = f"{tmp_path}/there"
    assert run(capsys, "push", f"{tmp_path}/run", url)["steps"][0]["state"] == "copied"
    assert run(capsys, "push", f"{tmp_path}/bare", f"{url}/step-000000040")["steps"][0]["state"] == "copied"
    assert main(["ckpt", "verify", url]) == 0
    capsys.readouterr()
    assert run(capsys, "pull", f"{tmp_path}/bare", f"{tmp_path}/copy")["num_objects_sent"] == 1
    loaded = make_state(2)
    with pytest.warns(UserWarning, match="single process"):
        dcp.load(loaded, checkpoint_id=tmp_path / "copy")
    assert torch.equal(loaded["large"], state["large"])


def test_what_lies_at_the_target_of_a_stock_checkpoint_is_compared_byte_by_byte(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The next save of stock DCP leaves objects of the same names and sizes."""
    with pytest.warns(UserWarning, match="single process"):
        dcp.save(make_state(1), checkpoint_id=tmp_path / "stock")
    (data,) = (tmp_path / "stock").glob("*.distcp")
    (tmp_path / "copy").mkdir()
    other = bytearray(data.read_bytes())
    other[len(other) // 2] ^= 1
    (tmp_path / "copy" / data.name).write_bytes(other)
    assert run(capsys, "pull", f"{tmp_path}/stock", f"{tmp_path}/copy")["num_objects_sent"] == 1
    (tmp_path / "copy/.metadata").unlink()
    assert run(capsys, "pull", f"{tmp_path}/stock", f"{tmp_path}/copy")["num_objects_present"] == 1
    assert (tmp_path / "copy" / data.name).read_bytes() == data.read_bytes()


# damage and change ----------------------------------------------------------------------------------------------


def copy_of(source: Path, folder: Path) -> str:
    subprocess.run(["cp", "-r", source, folder], check=True)
    return str(folder)


@pytest.mark.parametrize("victim", ["__0_0.distcp", "__0_3.distcp", "manifest.json", ".metadata"])
def test_a_damaged_source_is_refused_and_what_is_good_is_copied(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], victim: str
) -> None:
    url = copy_of(source, tmp_path / "damaged")
    for path in Path(url, "step-000000020").rglob(victim):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    target = f"{tmp_path}/target"
    result = run(capsys, "pull", url, target, code=1)
    assert [(row["step"], row["state"]) for row in result["steps"]] == [(20, "damaged"), (10, "copied")]
    assert "damaged" in result["steps"][0]["reason"] or "checksum" in result["steps"][0]["reason"]
    assert [row.state for row in inspection.summaries(inspection.locate(target))][-1] == "committed"
    assert catalog.committed_steps(open_store(target)) == [10]
    assert main(["ckpt", "pull", url, target, "--step", "20", "--quiet"]) == 1
    assert "step-000000020: DAMAGED, not copied" in capsys.readouterr().out


class Flipping(MemoryStore):
    """Flips a bit of the first data that is read."""

    left = 1

    def read_into(self, key: str, offset: int, buffers: Sequence[memoryview], *, if_match: str | None = None) -> str:
        etag = super().read_into(key, offset, buffers, if_match=if_match)
        if self.left:
            self.left -= 1
            buffers[0][0] ^= 1
        return etag


class Replacing(MemoryStore):
    """Removes or replaces `.metadata` once data is read, as the job does whose checkpoint it is."""

    replacement: bytes | None = None

    def read_into(self, key: str, offset: int, buffers: Sequence[memoryview], *, if_match: str | None = None) -> str:
        etag = super().read_into(key, offset, buffers, if_match=if_match)
        self.delete("step-000000020/.metadata")
        if self.replacement is not None:
            self.put("step-000000020/.metadata", [self.replacement])
        return etag


def filled(store: MemoryStore, source: Path) -> str:
    """The URL of that store, with the source's step 20 in it."""
    for key, data in contents(str(source)).items():
        if "20/" in key:
            store.put(key, [data])
    return opened(store)


def test_a_bit_that_flips_on_the_way_is_read_again(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = filled(Flipping("x"), source)
    assert run(capsys, "pull", url, f"{tmp_path}/to")["steps"][0]["state"] == "copied"
    assert main(["ckpt", "verify", f"{tmp_path}/to"]) == 0


@pytest.mark.parametrize("replacement", [None, b"another checkpoint"])
def test_a_checkpoint_that_goes_while_it_is_copied_is_not_committed(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], replacement: bytes | None
) -> None:
    store = Replacing("x")
    store.replacement = replacement
    result = run(capsys, "pull", filled(store, source), f"{tmp_path}/to")
    assert result["steps"][0]["state"] == "removed"
    assert catalog.committed_steps(open_store(f"{tmp_path}/to")) == []


def test_no_object_is_read_whole(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However large it is, it is in memory in parts."""
    lengths, read_into = list[int](), MemoryStore.read_into

    def seen(self: MemoryStore, key: str, offset: int, buffers: Any, **kwargs: Any) -> str:
        lengths.append(sum(buffer.nbytes for buffer in buffers))
        return read_into(self, key, offset, buffers, **kwargs)

    store = MemoryStore("x")
    url = filled(store, source)
    monkeypatch.setattr(MemoryStore, "read_into", seen)
    monkeypatch.setattr(memory, "parts_of_size", functools.partial(parts_of_size, part_bytes=1 << 20))
    target = copy_jobs.open_target(fresh_memory_url())
    (job,) = copy_jobs.plan(inspection.locate(url), target)
    found = copy_jobs.look(store, target.store, job)
    assert isinstance(found, copy_jobs.Found)
    advanced: list[int] = []
    assert copying.Copier(store, target.store, 0.0, advanced.append).copy(found).state == "copied"
    assert max(lengths) == 1 << 20
    assert sum(advanced) == sum(lengths) == found.size_bytes
