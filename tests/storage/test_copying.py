"""`ckpt push` and `pull`: what arrives is what was there, whole or not at all, whenever a copy is killed."""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st

from elastic_moe.cli import transfer
from elastic_moe.cli.main import main
from elastic_moe.cli.transfer import ProgressLines
from storage import Checkpointer, inspection, open_store, register_scheme
from storage.errors import Corrupt, NoCheckpoint
from storage.format.checksum import combine_crc32c, crc32c
from storage.run import catalog
from storage.saving import writing
from storage.stores import memory
from storage.stores.memory import MemoryStore
from storage.stores.objects import ObjectInfo, parts_of_size
from storage.transfer import copy_jobs, copying
from storage.transfer.copyplan import BlockCheck, Blocks, choose
from tests.s3 import S3Server

ROOT = Path(__file__).parents[2]
COPIED = ("manifest.json", ".metadata", ".distcp")
_names = itertools.count()


def make_state(number: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(number)
    parts = {f"part{index}": torch.randn(300, 1000, generator=generator) for index in range(3)}
    return {**parts, "large": torch.randn(3000, 1000, generator=generator), "bias": torch.randn(7), "n": number}


def save(url: str, *steps: int) -> None:
    with pytest.MonkeyPatch.context() as patch, Checkpointer(url, keep=9) as ckpt:
        patch.setattr(writing, "OBJECT_SIZE_BYTES", 2 << 20)
        for step in steps:
            ckpt.save(step, make_state(step), wait=True)
            assert ckpt.wait()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with steps 10 and 20, each of five objects; nobody writes to it."""
    folder = tmp_path_factory.mktemp("source")
    save(str(folder), 10, 20)
    return folder


def contents(url: str) -> dict[str, bytes]:
    """All that is copied of a run, by name."""
    store = open_store(url)
    return {info.key: store.read(info.key) for info in store.list("") if info.key.endswith(COPIED)}


def run(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["ckpt", *argv, "--json", "--quiet"]) == code
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


# the way of the bytes -------------------------------------------------------------------------------------------


@given(st.binary(), st.binary())
def test_combined_checksums(first: bytes, second: bytes) -> None:
    assert combine_crc32c(crc32c(first), crc32c(second), len(second)) == crc32c(first + second)


@given(st.data())
def test_blocks_are_checked_whatever_the_parts_and_their_order(data: st.DataObject) -> None:
    content = data.draw(st.binary(min_size=1, max_size=200))
    block, part = data.draw(st.integers(1, 90)), data.draw(st.integers(1, 90))
    crcs = np.array([crc32c(content[at : at + block]) for at in range(0, len(content), block)], np.uint32)
    blocks = Blocks(len(content), np.arange(0, len(content), block), crcs)
    parts = data.draw(st.permutations(range(0, len(content), part)))
    check = BlockCheck("it", blocks)
    for offset in [*parts, parts[0]]:
        check.take(offset, memoryview(content[offset : offset + part]))
    flipped = bytearray(content)
    flipped[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    check = BlockCheck("it", blocks)

    def take_all() -> None:
        for offset in parts:
            check.take(offset, memoryview(flipped)[offset : offset + part])

    with pytest.raises(Corrupt, match="it is damaged"):
        take_all()


@pytest.mark.parametrize("kind", ["memory", "juicefs", "moto", "fsspec-s3"])
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
    url = f"memory://stock-{next(_names)}"
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
    scheme = f"copying-{next(_names)}"
    register_scheme(scheme, lambda rest: store)
    for key, data in contents(str(source)).items():
        if "20/" in key:
            store.put(key, [data])
    return f"{scheme}://run"


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


# deaths ---------------------------------------------------------------------------------------------------------


class Watcher:
    """A reader that looks at the target all the time, and at every byte of what it sees committed."""

    def __init__(self, url: str) -> None:
        self._store = open_store(url)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.problems: list[str] = []

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(self, *args: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.02) and not self.problems:
            for step in catalog.committed_steps(self._store):
                self.problems += inspection.verify(self._store, f"step-{step:09d}/").problems


def kill_copy(number: int, source: Path, url: str, environment: Mapping[str, str]) -> str:
    """Run a copy that dies before its write number `number`; before which, or "" if it did not come so far."""
    command = [sys.executable, "-m", "tests.storage.copy_cases", str(number), "ckpt", "push", str(source), url]
    done = subprocess.run(
        [*command, "--step", "20", "--quiet"],
        env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
    )
    assert done.returncode in (0, -9), done.stderr
    return done.stdout.partition("killed before ")[2].strip() if done.returncode else ""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["local", "juicefs"])
def test_a_copy_that_is_killed_anywhere_is_never_half_there_and_goes_on(
    kind: str,
    source: Path,
    make_url: Callable[[str], str],
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server: S3Server | None = request.getfixturevalue("juicefs") if kind == "juicefs" else None
    environment = server.environment if server else {}
    base, original = make_url(kind), {k: v for k, v in contents(str(source)).items() if "20/" in k}
    data = {key: len(value) for key, value in original.items() if key.endswith(".distcp")}
    killed = []
    later_unix_s = time.time() + copying.ABANDONED_AGE_S + 3600.0
    monkeypatch.setattr(transfer.time, "time", lambda: later_unix_s)  # uploads of the dead are given up by then
    # locally 5 objects, 2 manifests, .metadata; on S3 one of the objects is 3 parts and their completion
    for number in (0, 3, 5, 7) if server is None else (5, 7, 9, 10):
        path, mark, query = base.partition("?")
        url = f"{path}-{number}{mark}{query}" + ("&part_size_mib=5" if server else "")
        with Watcher(url) as watcher:
            killed.append(kill_copy(number, source, url, environment))
        assert watcher.problems == []
        store = open_store(url)
        assert catalog.committed_steps(store) == []
        there = {info.key: info.size_bytes for info in store.list("") if info.key in data}
        assert all(data[key] == size for key, size in there.items())
        result = run(capsys, "push", str(source), url, "--step", "20")
        assert (result["num_objects_present"], result["present_bytes"]) == (len(there), sum(there.values()))
        assert result["sent_bytes"] == sum(data.values()) - sum(there.values())
        assert contents(url) == original
        assert not server or store.uploads() == []
    assert killed[-1].startswith("put") and killed[-1].endswith("/.metadata")
    assert any(".distcp" in text for text in killed) and any("manifest.json" in text for text in killed)


def test_a_half_object_of_a_dead_copy_is_sent_again(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A mounted file system may keep half of a file whose host died; by its size, or by its bytes."""
    target = tmp_path / "target"
    run(capsys, "pull", str(source), str(target), "--step", "20")
    (target / "step-000000020/.metadata").unlink()
    small, large = (next(target.rglob(name)) for name in ("__0_1.distcp", "__0_4.distcp"))
    small.write_bytes(small.read_bytes()[:-1])
    data = bytearray(large.read_bytes())
    data[-5] ^= 1
    large.write_bytes(data)
    result = run(capsys, "pull", str(source), str(target), "--step", "20")
    assert (result["num_objects_sent"], result["num_objects_present"]) == (2, 3)
    assert main(["ckpt", "verify", str(target)]) == 0


class Racing(MemoryStore):
    """Another copy gets done with the same checkpoint right before the first object of that kind is put."""

    def __init__(self, done: dict[str, bytes], before: str) -> None:
        super().__init__("racing")
        self._done, self._before = done, before

    def put(self, key: str, buffers: Any, *, if_absent: bool = False) -> ObjectInfo:
        if key.endswith(self._before):
            while self._done:
                name, data = self._done.popitem()
                super().put(name, [data])
        return super().put(key, buffers, if_absent=if_absent)


@pytest.mark.parametrize("before", [".distcp", "/.metadata"])
def test_two_copies_at_once(source: Path, capsys: pytest.CaptureFixture[str], before: str) -> None:
    done = {key: data for key, data in contents(str(source)).items() if "20/" in key}
    store, scheme = Racing(done, before), f"racing-{next(_names)}"
    register_scheme(scheme, lambda rest: store)
    result = run(capsys, "push", str(source), f"{scheme}://run", "--step", "20")
    assert result["steps"][0]["state"] == "copied"
    assert not inspection.verify(store, "step-000000020/").problems


# the user's side ------------------------------------------------------------------------------------------------


@pytest.fixture
def other(tmp_path: Path) -> Iterator[str]:
    """A run that has another step 20."""
    save(f"{tmp_path}/other", 20)
    return f"{tmp_path}/other"


def test_mistakes_are_one_line_and_exit_code_2(
    source: Path, other: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.warns(UserWarning, match="single process"):
        dcp.save({"w": torch.ones(3)}, checkpoint_id=tmp_path / "bare")
    (tmp_path / "empty").mkdir()
    step = f"{source}/step-000000020"
    for argv, says in (
        (("push", f"{tmp_path}/nothing", "memory://x"), "no checkpoint at"),
        (("push", f"{tmp_path}/empty", "memory://x"), "no checkpoint at"),
        (("push", str(source), "memory://x", "--step", "30"), "step 30 is not committed in .*there are: 20, 10"),
        (("pull", str(source), other), "step-000000020 holds another checkpoint"),
        (("pull", str(source), str(source)), "two different places"),
        (("pull", str(source), f"{tmp_path}/a/step-000000020"), "give the folder above it"),
        (("pull", str(source), f"{tmp_path}/bare"), "is one checkpoint and no run"),
        (("pull", f"{tmp_path}/bare", other), "has steps in it; give the one to make"),
        (("pull", step, f"{tmp_path}/a/step-000000030"), "give the same step"),
        (("pull", step, f"{tmp_path}/a", "--last", "1"), "no steps to choose from"),
        (("push", "s3://bucket/run", str(source)), "the other way round"),
        (("pull", str(source), "memory://x"), "the other way round"),
        (("pull", str(source), f"{tmp_path}/a", "--profile", "x"), "--profile is for s3:// URLs"),
        (("pull", str(source), "nowhere://x"), "the other way round|no store"),
    ):
        assert main(["ckpt", *argv]) == 2, argv
        error = capsys.readouterr().err
        assert error.count("\n") == 1, error
        assert re.search(says, error), (says, error)
    assert not (tmp_path / "a").exists()
    for argv in (("--step", "-1"), ("--last", "0"), ("--step", "1", "--last", "1")):
        with pytest.raises(SystemExit) as caught:
            main(["ckpt", "pull", "a", "b", *argv])
        assert caught.value.code == 2


def test_choose() -> None:
    assert choose([30, 20, 10], "it", None, None) == [30, 20, 10]
    assert choose([30, 20, 10], "it", 20, None) == [20]
    assert choose([30, 20, 10], "it", None, 2) == [30, 20]
    with pytest.raises(NoCheckpoint):
        choose([30], "it", 20, None)


def test_a_dry_run_writes_nothing(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ckpt", "pull", str(source), f"{tmp_path}/to", "--dry-run"]) == 0
    assert capsys.readouterr().out.count("would copy") == 2
    assert not (tmp_path / "to").exists()
    result = run(capsys, "pull", str(source), f"{tmp_path}/to", "--dry-run")
    assert (result["dry_run"], result["num_objects_sent"], result["steps"][0]["state"]) == (True, 10, "planned")


def test_progress_without_a_terminal() -> None:
    now_s, lines = [100.0], list[str]()
    progress = ProgressLines(40 << 20, lambda: now_s[0], lines.append)
    progress.advance(10 << 20)
    now_s[0] += 5
    progress.advance(10 << 20)
    now_s[0] += 4
    progress.advance(10 << 20)
    assert lines == ["20.0 MiB of 40.0 MiB, 4.0 MiB/s, 5 s left"]


def test_what_is_told(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for says in ("step-000000020: copied, ", "step-000000020: there already, "):
        assert main(["ckpt", "pull", str(source), f"{tmp_path}/to"]) == 0
        assert says in capsys.readouterr().out


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
    target = copy_jobs.open_target(f"memory://parts-{next(_names)}")
    (job,) = copy_jobs.plan(inspection.locate(url), target)
    found = copy_jobs.look(store, target.store, job)
    assert isinstance(found, copy_jobs.Found)
    advanced: list[int] = []
    assert copying.Copier(store, target.store, 0.0, advanced.append).copy(found).state == "copied"
    assert max(lengths) == 1 << 20
    assert sum(advanced) == sum(lengths) == found.size_bytes
