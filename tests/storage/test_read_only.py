"""Who may only read restores: nothing is claimed or written, and what cannot be listed is asked for by name."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch.distributed.checkpoint as dcp

from elastic_moe.cli.main import main
from storage import Access, Checkpointer, JobIdentity, ShardReader, ShardWriter, open_store
from storage.errors import Corrupt, Denied, Forbidden, UsageError
from storage.format import layout
from storage.run import catalog, owner
from storage.stores.objects import ObjectStore
from tests.ranks import Ranks
from tests.s3 import S3Server
from tests.storage.proxy import FaultProxy
from tests.storage.small_runs import Events, damage_data, save, state

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

_NOBODY = 65534


def contents(store: ObjectStore) -> dict[str, str]:
    return {info.key: info.etag for info in store.list("")}


def damage_index(store: ObjectStore, step: int) -> None:
    for info in store.list(f"step-{step:09d}/"):
        if info.key.endswith("manifest.json"):
            store.put(info.key, [b"{"])


def may_only_read(method: str, target: str) -> bool:
    return method not in ("GET", "HEAD")


def may_only_get(method: str, target: str) -> bool:
    return method not in ("GET", "HEAD") or "list-type" in target or "uploads" in target


@pytest.fixture
def run(juicefs: S3Server, make_url: Callable[[str], str]) -> str:
    """The URL of a fresh run on a real server, by those who may do everything."""
    return make_url("juicefs")


@pytest.fixture
def proxy(juicefs: S3Server) -> Iterator[FaultProxy]:
    with FaultProxy(juicefs) as proxy:
        yield proxy


def through(proxy: FaultProxy, url: str, key: str = "") -> str:
    """The same run by way of the proxy."""
    prefix = url.removeprefix("s3://").partition("?")[0].partition("/")[2]
    return proxy.url(f"{prefix}/{key}".rstrip("/"))


def test_a_reader_restores_while_another_job_owns_the_run(run: str, proxy: FaultProxy, events: Events) -> None:
    proxy.denies = may_only_read
    store = open_store(run)
    with Checkpointer(run, job=JobIdentity(run_id="owner", lineage="a")) as owner:
        owner.save(10, state(10), wait=True)
        assert owner.wait()
        before = contents(store)
        with Checkpointer(through(proxy, run), access=Access.READ, on_event=events[1]) as reader:
            found = state(0)
            assert (reader.restore(found), found["n"]) == (10, 10)
            beats = {key for key in before if key.startswith(layout.HEARTBEAT_PREFIX)}
            assert {key: tag for key, tag in contents(store).items() if key not in beats} == {
                key: tag for key, tag in before.items() if key not in beats
            }
            owner.save(20, state(20), wait=True)
            assert owner.wait()  # it was not fenced
            assert (reader.restore(found), found["n"]) == (20, 20)
            with pytest.raises(UsageError, match=r"opened with Access.READ") as caught:
                reader.save(30, found)
            assert "\n" not in str(caught.value)
            reader.announce_end()
    assert {method for method, _ in proxy.requests} <= {"GET", "HEAD"}
    assert [name for name, _ in events[0]] == ["restored", "restored"]


def restored_on_rank(url: str, environment: Mapping[str, str]) -> tuple[int, int, list[str]]:
    """On a rank, whose process may have been started before the server was."""
    os.environ.update(environment)
    return restored(url)


def restored(url: str) -> tuple[int, int, list[str]]:
    seen: list[str] = []
    with Checkpointer(url, access=Access.READ, on_event=lambda name, fields: seen.append(name)) as reader:
        found = state(0)
        return reader.restore(found), found["n"], seen


def test_ranks_pass_over_what_is_damaged_and_move_nothing(
    run: str, proxy: FaultProxy, juicefs: S3Server, ranks: Ranks
) -> None:
    proxy.denies = may_only_read
    save(run, 10, 20, 30)
    store = open_store(run)
    damage_data(store, 20)
    damage_index(store, 30)
    before = contents(store)
    first, second = ranks.run(restored_on_rank, through(proxy, run), juicefs.environment, world_size=2)
    assert first == (10, 10, ["checkpoint_damaged", "checkpoint_damaged", "restored"])
    assert second == (10, 10, ["restored"])
    assert contents(store) == before
    assert {method for method, _ in proxy.requests} <= {"GET", "HEAD"}


def test_a_run_without_any_good_checkpoint_is_told(memory_url: str) -> None:
    save(memory_url, 10)
    damage_data(open_store(memory_url), 10)
    with (
        Checkpointer(memory_url, access=Access.READ) as reader,
        pytest.raises(Corrupt, match="no good checkpoint is left"),
    ):
        reader.restore(state(0))


def test_a_run_that_nobody_owns_is_read(tmp_path: Path) -> None:
    """What was copied has no owner, and neither has what stock DCP wrote."""
    dcp.save(state(7), checkpoint_id=tmp_path / "run/step-000000007", no_dist=True)
    assert restored(f"{tmp_path}/run")[:2] == (7, 7)
    assert restored(f"{tmp_path}/empty")[0] == 0
    assert not (tmp_path / "empty").exists()


@pytest.mark.parametrize("access", Access)
def test_a_step_is_not_opened_as_a_run(access: Access) -> None:
    with pytest.raises(UsageError, match="is one checkpoint; give the URL of its run"):
        Checkpointer("/run/step-000000010", access=access)


def test_options_by_their_former_names_work_and_warn(memory_url: str) -> None:
    with pytest.warns(DeprecationWarning, match=r"^take_over, run_id, generation of Checkpointer: say access="):
        owning = Checkpointer(memory_url, take_over=True, run_id="a", generation=3)
    with owning:
        owning.save(1, state(1), wait=True)
    assert "job 'a' (generation 3" in owner_of_run(memory_url)
    with pytest.warns(DeprecationWarning, match="read_only"):
        reading = Checkpointer(memory_url, read_only=True)
    with reading, pytest.raises(UsageError, match=r"opened with Access.READ"):
        reading.save(2, state(2))
    with (
        pytest.warns(DeprecationWarning, match="read_only"),
        pytest.raises(UsageError, match="take_over is for jobs that save"),
    ):
        Checkpointer(memory_url, read_only=True, take_over=True)
    with pytest.raises(TypeError, match="unexpected keyword argument 'redonly'"):
        Checkpointer(memory_url, redonly=True)  # type: ignore[call-arg]


def owner_of_run(url: str) -> str:
    found = owner.read_owner(open_store(url))
    assert found is not None
    return found.who


@contextlib.contextmanager
def _unprivileged() -> Iterator[None]:
    """Root writes whatever the modes say."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(_NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def frozen() -> Iterator[Path]:
    """A folder with a run that was made read-only, such as others mount it."""
    top = Path(tempfile.mkdtemp(prefix="frozen-"))
    top.chmod(0o755)
    (top / "run").mkdir()
    save(f"{top}/run", 10, 20)
    stale = top / "run/.tmp" / ("0" * 32)
    stale.write_bytes(b"half")
    os.utime(stale, (0, 0))
    for path in (top / "run", *(top / "run").rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        yield top / "run"
    finally:
        for path in (top, *top.rglob("*")):
            path.chmod(0o700 if path.is_dir() else 0o600)
        shutil.rmtree(top)


def test_a_folder_that_cannot_be_written(frozen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(open_store(str(frozen)))
    target = Path(tempfile.mkdtemp(prefix="pulled-"))
    target.chmod(0o777)
    try:
        with _unprivileged():
            with pytest.raises(PermissionError):
                (frozen / "x").write_text("the folder can be written after all")
            assert restored(str(frozen))[:2] == (20, 20)
            found = state(0)
            dcp.load(found, storage_reader=ShardReader(f"{frozen}/step-000000010"))
            assert found["n"] == 10
            for action in ("ls", "show", "verify"):
                assert main(["ckpt", action, str(frozen)]) == 0, capsys.readouterr()
            assert main(["ckpt", "pull", "--quiet", str(frozen), f"{target}/run"]) == 0, capsys.readouterr()
            assert restored(f"{target}/run")[:2] == (20, 20)
            with pytest.raises(Denied):  # who does not say that it only reads is told why it cannot
                Checkpointer(str(frozen)).start()
    finally:
        shutil.rmtree(target)
    assert contents(open_store(str(frozen))) == before
    assert (frozen / ".tmp" / ("0" * 32)).exists()


def test_a_folder_that_can_be_entered_but_not_listed(frozen: Path) -> None:
    for path in (frozen, *frozen.rglob("*")):
        if path.is_dir():
            path.chmod(stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
    with _unprivileged():
        found = state(0)
        dcp.load(found, storage_reader=ShardReader(f"{frozen}/step-000000020"))
        assert found["n"] == 20
        with pytest.raises(Forbidden, match="without permission to list it"):
            restored(str(frozen))


def loaded(url: str) -> int:
    found = state(0)
    dcp.load(found, storage_reader=ShardReader(url))
    return int(found["n"])


@pytest.mark.parametrize("kind", ["ours", "ShardWriter", "stock"])
def test_a_step_is_read_by_gets_alone(
    kind: str, run: str, proxy: FaultProxy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step = layout.join_url(run, "step-000000010")
    if kind == "ours":
        save(run, 10)
    elif kind == "ShardWriter":
        dcp.save(state(10), storage_writer=ShardWriter(step), no_dist=True)
    else:
        dcp.save(state(10), checkpoint_id=tmp_path / "step-000000010", no_dist=True)
        for path in (tmp_path / "step-000000010").iterdir():
            open_store(run).put(f"step-000000010/{path.name}", [path.read_bytes()])
    proxy.denies, proxy.hides_missing = may_only_get, True
    url = through(proxy, run, "step-000000010")
    assert loaded(url) == 10
    for action in ("ls", "show", "verify"):
        assert main(["ckpt", action, url]) == 0, capsys.readouterr()
    assert main(["ckpt", "pull", "--quiet", url, f"{tmp_path}/pulled/step-000000010"]) == 0, capsys.readouterr()
    assert loaded(f"{tmp_path}/pulled/step-000000010") == 10


def test_a_manifest_at_the_top_that_is_not_the_commits_is_passed_over(run: str, proxy: FaultProxy) -> None:
    """Whoever lost the race for `.metadata` may have left it there; the right one is found without a listing."""
    save(run, 10, 20)
    store = open_store(run)
    store.put("step-000000010/manifest.json", [store.read("step-000000020/manifest.json")])
    store.delete("step-000000020/manifest.json")
    proxy.denies, proxy.hides_missing = may_only_get, True
    assert loaded(through(proxy, run, "step-000000010")) == 10
    assert loaded(through(proxy, run, "step-000000020")) == 20


def test_what_is_missing_or_set_aside_is_seen_without_a_listing(run: str, proxy: FaultProxy) -> None:
    save(run, 10, 20)
    store = open_store(run)
    (key, *_) = [info.key for info in store.list("step-000000010/") if info.key.endswith(".distcp")]
    store.delete(key)
    metadata = store.read("step-000000020/.metadata")
    store.put("step-000000020/" + layout.quarantined_name(metadata), [metadata])
    proxy.denies, proxy.hides_missing = may_only_get, True
    reader = open_store(through(proxy, run))
    with pytest.raises(Forbidden, match=r"\.distcp: refused"):
        catalog.open_checkpoint(reader, "step-000000010/")
    assert not catalog.is_checkpoint(reader, "step-000000020/")


def test_a_run_that_cannot_be_listed_is_told_in_one_line(
    run: str, proxy: FaultProxy, capsys: pytest.CaptureFixture[str]
) -> None:
    save(run, 10)
    proxy.denies, proxy.hides_missing = may_only_get, True
    url = through(proxy, run)
    with pytest.raises(Forbidden, match=r"give ShardReader or .* the URL of one step") as caught:
        ShardReader(url).read_metadata()
    assert "step-000000120" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(Forbidden, match="without permission to list"):
        restored(url)
    assert main(["ckpt", "ls", url]) == 2
    error = capsys.readouterr().err
    assert "without permission to list" in error and error.count("\n") == 1
