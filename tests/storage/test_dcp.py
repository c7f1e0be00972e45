"""`ShardReader` and `ShardWriter`: what they are given, whom they read with, and saving over a checkpoint."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from elastic_moe import worker
from elastic_moe.config import JobConfig
from launcher.errors import UsageError as LauncherUsageError
from storage import Checkpointer, ShardReader, ShardWriter, errors, inspection, open_store
from storage.errors import BadURL, StorageError, Transient, UsageError
from storage.format import layout
from storage.run import catalog
from storage.stores.buffers import Buffer
from storage.stores.memory import MemoryStore
from storage.stores.objects import ObjectInfo
from storage.transfer import copy_jobs
from tests.ranks import Ranks
from tests.storage import dcp_cases as cases
from tests.storage.small_runs import opened, state

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


def save(number: int, url: str | Path, **options: Any) -> None:
    dcp.save(state(number), storage_writer=ShardWriter(url, **options), no_dist=True)


def load(url: str | Path) -> int:
    found = state(0)
    dcp.load(found, storage_reader=ShardReader(url), no_dist=True)
    assert (found["w"] == found["n"]).all()
    return int(found["n"])


# --- whom they read and write with


def test_a_reader_finds_out_which_ranks_take_part(ranks: Ranks, tmp_path: Path) -> None:
    found = ranks.run(cases.load_by_some, str(tmp_path / "c"), world_size=3)
    assert found == [[7, 7], [7, 7, 7, 7, 7], [7, 7, 7, 7]]


def test_a_writer_commits_what_those_that_take_part_have(ranks: Ranks, tmp_path: Path) -> None:
    for both, one, said in ranks.run(cases.save_by_some, str(tmp_path), world_size=3):
        assert (both, one) == (2, 1)
        assert "use_collectives=False would commit each rank's part" in said


def test_plans_that_dcp_keeps_go_to_an_attempt_of_their_own(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(cases.save_with_kept_plans, str(tmp_path), world_size=2)
    for name, number in (("first", 3), ("second", 2)):
        store = open_store(tmp_path / name)
        manifest = catalog.find_commit(store, "").manifest
        assert manifest is not None
        folder = layout.attempt_folder(manifest.attempt)
        assert {Path(entry.name).parent.name for entry in manifest.objects} == {folder}
        assert store.folders("") == [folder]
        found: dict[str, Any] = {"w0": torch.zeros(9), "w1": torch.zeros(9), "n": 0}
        dcp.load(found, storage_reader=ShardReader(tmp_path / name))
        assert (found["w0"].sum(), found["w1"].sum(), found["n"]) == (9 * number, 9 * number, number)


# --- saving over a checkpoint


class Breaking(MemoryStore):
    """Refuses every put from number `num_good` on."""

    num_good = 1 << 30

    def put(self, key: str, buffers: Sequence[Buffer], *, if_absent: bool = False) -> ObjectInfo:
        self.num_good -= 1
        if self.num_good < 0:
            raise Transient("the store is away")
        return super().put(key, buffers, if_absent=if_absent)


def save_stock(store: MemoryStore, prefix: str, folder: Path) -> None:
    dcp.save(state(1), checkpoint_id=folder, no_dist=True)
    for path in folder.iterdir():
        store.put(prefix + path.name, [path.read_bytes()])


@pytest.mark.parametrize("is_stock", [False, True])
@pytest.mark.parametrize("name", ["", "step-000000007/"])
def test_what_is_saved_over_is_whole_until_the_new_one_is(tmp_path: Path, name: str, is_stock: bool) -> None:
    store = Breaking("x")
    url = f"{opened(store)}/{name}"
    if is_stock:
        save_stock(store, name, tmp_path / "stock")
    else:
        save(1, url)
    old = {info.key for info in store.list("")}
    numbers = []
    for num_good in range(20):
        store.num_good = num_good
        try:
            save(2, url, overwrite=True)
            break
        except dcp.CheckpointException:
            numbers.append(load(url))
    assert set(numbers) == {1}
    assert len(numbers) >= 4  # data, two manifests, .metadata
    assert load(url) == 2
    kept = {key for key in old if key.rpartition("/")[2] in (".metadata", "manifest.json") and "attempt" not in key}
    assert {info.key for info in store.list("")} & old == kept


def test_without_being_asked_nothing_is_saved_over(tmp_path: Path) -> None:
    store = Breaking("x")
    url = f"{opened(store)}/step-000000007"
    save(1, url)
    before = store.list("")
    store.num_good = 0
    with pytest.raises(dcp.CheckpointException, match=r"Checkpoint already exists at .* overwrite=True"):
        save(2, url)
    assert store.list("") == before


def test_a_checkpoint_that_came_meanwhile_is_not_saved_over(tmp_path: Path) -> None:
    store = MemoryStore("x")
    url = opened(store)
    save(1, url)
    writer = ShardWriter(url, overwrite=True)
    put = store.put

    def meanwhile(key: str, buffers: Sequence[Buffer], *, if_absent: bool = False) -> ObjectInfo:
        if key == layout.MANIFEST:
            store.put = put  # type: ignore[method-assign]
            put(layout.METADATA, [b"another's"])
        return put(key, buffers, if_absent=if_absent)

    store.put = meanwhile  # type: ignore[method-assign]
    with pytest.raises(dcp.CheckpointException, match="is committed already"):
        dcp.save(state(2), storage_writer=writer, no_dist=True)
    assert store.read(layout.METADATA) == b"another's"


def test_an_attempt_beside_a_stock_checkpoint_does_not_damage_it(tmp_path: Path) -> None:
    store = MemoryStore("x")
    url = opened(store)
    save_stock(store, "step-000000001/", tmp_path / "stock")
    with Checkpointer(url) as ckpt:
        ckpt.save(1, state(2), wait=True)
        assert not ckpt.wait()  # it is there already
        assert any(key.key.startswith("step-000000001/attempt-") for key in store.list(""))
        found = state(0)
        assert ckpt.restore(found) == 1
    assert found["n"] == 1
    assert inspection.verify(store, "step-000000001/").problems == ()


def test_a_save_behind_the_script_that_fails_is_told_though_nobody_asks(caplog: pytest.LogCaptureFixture) -> None:
    store = Breaking("x")
    url = opened(store)
    save(1, url)
    dcp.async_save(state(2), storage_writer=ShardWriter(url)).exception(timeout=60)
    store.num_good = 1
    dcp.async_save(state(2), storage_writer=ShardWriter(url, overwrite=True)).exception(timeout=60)
    told = [
        record.message
        for record in caplog.records
        if record.levelname == "ERROR" and record.name == "storage.dcp.writer"
    ]
    assert [line.startswith(f"nothing is saved to {url}: ") for line in told] == [True, True]
    assert "AlreadyExists: Checkpoint already exists at" in told[0]
    assert "Transient: the store is away" in told[1]


# --- what they are given


def openers(url: Any) -> list[Callable[[], object]]:
    """Everything that takes a URL."""
    return [
        lambda: open_store(url),
        lambda: ShardReader(url),
        lambda: ShardWriter(url),
        lambda: ShardReader("memory://x").reset(url),
        lambda: dcp.save(state(1), storage_writer=ShardWriter("memory://x"), checkpoint_id=url, no_dist=True),
        lambda: Checkpointer(url),
        lambda: inspection.locate(url),
        lambda: copy_jobs.open_target(url),
    ]


def test_a_path_is_taken_wherever_a_url_is(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "step-000000003"
    save(3, folder)
    assert load(folder) == 3
    dcp.save(state(4), storage_writer=ShardWriter("memory://x"), checkpoint_id=tmp_path / "b", no_dist=True)
    found = state(0)
    dcp.load(found, storage_reader=ShardReader("memory://x"), checkpoint_id=tmp_path / "b", no_dist=True)
    assert found["n"] == 4
    with Checkpointer(tmp_path / "a") as ckpt:
        assert ckpt.restore(found) == 3
    assert inspection.locate(folder).prefix == "step-000000003/"
    assert copy_jobs.open_target(tmp_path / "a").store.url == str(tmp_path / "a")
    job = JobConfig.model_validate({"checkpoint": {"url": tmp_path}, "train": {"metrics": tmp_path / "m"}})
    assert (job.checkpoint.url, job.train.metrics) == (str(tmp_path), str(tmp_path / "m"))


@pytest.mark.parametrize(
    ("url", "said"),
    [
        (3, "the checkpoint URL is 3 (int); give a folder as str or Path"),
        (b"run", "(bytes)"),
        (None, "(NoneType)"),
        (True, "(bool)"),
        (["run"], "(list)"),
        ("", "the checkpoint URL is empty"),
        ("  ", "the checkpoint URL is empty"),
        ("run\0", "NUL"),
        (Path("s3://bucket/run"), "give 's3://bucket/run' as str"),
        ("gs:/bucket/run", "give 'gs://bucket/run' as str"),
        ("file:/data/run", "give 'file:///data/run' as str"),
    ],
    ids=repr,
)
def test_what_is_no_url_is_refused_in_one_line(
    url: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for opener in openers(url) if url is not None else openers(url)[:3]:  # to `reset`, None means the same again
        with pytest.raises(BadURL) as caught:
            opener()
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    assert not ShardReader.validate_checkpoint_id(url)


def test_a_url_is_told_from_one_that_nobody_answers_for(tmp_path: Path) -> None:
    for url in (
        tmp_path,
        "relative/folder",
        "s3://bucket/run",
        "gs://bucket/run",
        "memory://x",
        "fsspec+s3://bucket/run",
    ):
        assert ShardWriter.validate_checkpoint_id(url)
    assert not ShardWriter.validate_checkpoint_id("abc://abc.abc")


def test_a_reader_tells_which_save_it_reads(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "ours")
    noted = dcp.save(state(1), storage_writer=writer, no_dist=True).storage_meta
    assert noted is not None
    stock = dcp.FileSystemWriter(tmp_path / "stock")
    dcp.save(state(1), storage_writer=stock, no_dist=True)
    for folder, save_id in ((tmp_path / "ours", writer.save_id), (tmp_path / "stock", stock.save_id)):
        reader = ShardReader(folder)
        meta = reader.read_metadata().storage_meta
        assert meta is not None
        assert (meta.checkpoint_id, meta.save_id, meta.load_id) == (str(folder), save_id, reader.load_id)
        assert meta.save_id in (noted.save_id, stock.save_id)
    first = reader.load_id
    reader.reset()
    assert reader.load_id != first


@pytest.mark.parametrize(
    "step", [True, 1.0, "1", None, torch.tensor(1), np.array(1), np.True_, -1, 2**63, np.uint64(2**63)], ids=repr
)
def test_what_is_no_step_is_refused_at_once(step: Any) -> None:
    said = r"^step is .*; it must be a whole number from 0 to 2\*\*63 - 1$"
    with Checkpointer("memory://steps") as ckpt, pytest.raises(UsageError, match=said):
        ckpt.save(step, {})
    for call in (worker.heartbeat, worker.yielded):
        with pytest.raises(LauncherUsageError, match=said):
            call(step)


def test_numpy_integers_are_steps() -> None:
    with Checkpointer("memory://numpy-steps") as ckpt:
        ckpt.save(np.int64(4), {"w": torch.ones(2)}, wait=True)  # type: ignore[arg-type]
        assert ckpt.wait()
        assert ckpt.restore({"w": torch.ones(2)}) == 4
    worker.heartbeat(np.int32(4))  # type: ignore[arg-type]


def test_folders_of_no_step_are_none() -> None:
    assert layout.parse_step(f"step-{2**63 - 1}") == 2**63 - 1
    assert layout.parse_step(f"step-{2**63}") is None
    assert layout.parse_step("step-" + "9" * 5000) is None


def test_ranks_that_disagree_on_the_step_are_refused_together(ranks: Ranks, tmp_path: Path) -> None:
    for said in ranks.run(cases.save_unlike_steps, str(tmp_path), world_size=2):
        assert said == [
            "rank 1: step is True (bool); it must be a whole number from 0 to 2**63 - 1",
            "rank 0 saves step 3, and rank 1 step 4; give all ranks the same",
        ]


# --- in another process


def test_they_can_be_sent_to_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_DEFAULT_REGION": "eu"}.items():
        monkeypatch.setenv(name, value)
    bucket = "s3://bucket/run/step-000000004?endpoint_url=http://127.0.0.1:1&part_size_mib=5"
    for url in (f"{tmp_path}/step-000000004", bucket):
        for kind in (ShardReader, ShardWriter):
            for sent in (pickle.loads(pickle.dumps(kind(url))), copy.deepcopy(kind(url))):
                assert (sent.checkpoint_id, sent._prefix) == (url, "step-000000004/")
                assert sent._store.url == kind(url)._store.url
    writer = pickle.loads(pickle.dumps(ShardWriter(tmp_path, overwrite=True)))
    for number in (1, 2):
        dcp.save(state(number), storage_writer=writer, no_dist=True)
    assert load(tmp_path) == 2


def test_what_only_this_process_has_is_not_sent() -> None:
    with pytest.raises(UsageError, match="memory://x is the memory of this process"):
        pickle.dumps(ShardWriter("memory://x"))


def test_errors_reach_other_processes() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, StorageError)]
    for kind in kinds:
        sent = pickle.loads(pickle.dumps(kind("why")))
        assert (type(sent), str(sent)) == (kind, "why")


def test_a_writer_steps_back_in_the_process_of_async_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps_back: list[str] = []
    monkeypatch.setattr("storage.dcp.writer.step_back", lambda: steps_back.append("now"))
    sent = pickle.dumps(ShardWriter(tmp_path / "latest"))

    def _checkpointing_subprocess() -> None:
        with pickle.loads(sent):
            pass

    with pickle.loads(sent):
        assert not steps_back, "this process is the training's"
    _checkpointing_subprocess()
    assert steps_back == ["now"]
