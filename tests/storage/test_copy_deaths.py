"""A copy that is killed anywhere is never half there, goes on where it was, and minds no other copy."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from elastic_moe.cli.main import main
from storage import inspection, open_store
from storage.run import catalog
from storage.stores.memory import MemoryStore
from storage.stores.objects import ObjectInfo
from storage.transfer import copying
from tests.s3 import S3Server
from tests.storage import copy_cases
from tests.storage.copied_runs import contents, run
from tests.storage.small_runs import opened
from tests.template import child_environment, template


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


def kill_copy(number: int, source: Path, url: str, environment: Mapping[str, str], folder: Path) -> str:
    """Run a copy that dies before its write number `number`; before which, or "" if it did not come so far."""
    command = (copy_cases.__file__, str(number), "ckpt", "push", str(source), url, "--step", "20", "--quiet")
    done = template().run("python", *command, folder=folder, env=child_environment(**environment))
    assert done.returncode in (0, -9), done.stderr
    return done.stdout.partition("killed before ")[2].strip() if done.returncode else ""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["local", "juicefs"])
def test_a_copy_that_is_killed_anywhere_is_never_half_there_and_goes_on(
    kind: str,
    source: Path,
    make_url: Callable[[str], str],
    tmp_path: Path,
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
    # uploads of the dead are given up by then; files that are being written are as new to the store as they are
    later = SimpleNamespace(time=lambda: later_unix_s, monotonic=time.monotonic)
    monkeypatch.setattr("elastic_moe.cli.transfer.time", later)
    # locally 5 objects, 2 manifests, .metadata; on S3 one of the objects is 3 parts and their completion
    for number in (0, 3, 5, 7) if server is None else (5, 7, 9, 10):
        path, mark, query = base.partition("?")
        url = f"{path}-{number}{mark}{query}" + ("&part_size_mib=5" if server else "")
        with Watcher(url) as watcher:
            killed.append(kill_copy(number, source, url, environment, tmp_path))
        assert watcher.problems == []
        store = open_store(url)
        assert catalog.committed_steps(store) == []
        there = {info.key: info.size_bytes for info in store.list("") if info.key in data}
        assert all(data[key] == size for key, size in there.items())
        result = run(capsys, "push", str(source), url, "--step", "20")
        assert (result["num_objects_present"], result["present_bytes"]) == (len(there), sum(there.values()))
        assert result["sent_bytes"] == sum(data.values()) - sum(there.values())
        assert contents(url) == original
        assert store.uploads() == []
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
    store = Racing(done, before)
    result = run(capsys, "push", str(source), opened(store), "--step", "20")
    assert result["steps"][0]["state"] == "copied"
    assert not inspection.verify(store, "step-000000020/").problems
