"""A folder as a store: private files, links, locks, and what killed processes left."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from pathlib import Path

import pytest

from storage.errors import AlreadyExists, BadURL, Denied
from storage.stores.registry import open_store
from tests.storage.refused_calls import refuse


def test_local_files_are_private(tmp_path: Path) -> None:
    umask = os.umask(0)
    try:
        store = open_store(str(tmp_path / "run"))
        store.put("a/b", [b"x"])
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "run/a/b").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "run/a").stat().st_mode) == 0o700
    assert list((tmp_path / "run/.tmp").iterdir()) == []


def test_local_links_do_not_lead_out(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    store = open_store(str(tmp_path / "run"))
    store.put("a", [b"x"])
    (tmp_path / "run/link").symlink_to(tmp_path)
    with pytest.raises(Denied):
        store.read("link/secret")


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK])
def test_local_does_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(os, "link", refuse(number))
    url = str(tmp_path / "run")
    open_store(url).put("k", [b"first"], if_absent=True)
    with pytest.raises(AlreadyExists):
        open_store(url).put("k", [b"second"], if_absent=True)
    assert open_store(url).read("k") == b"first"
    assert [info.key for info in open_store(url).list("")] == ["k"]
    assert [path.name for path in (tmp_path / "run/.tmp").iterdir()] == [".lock"]
    os.utime(tmp_path / "run/.tmp/.lock", (0, 0))
    open_store(url).put("other", [b"x"])  # sweeps
    assert (tmp_path / "run/.tmp/.lock").exists()


def test_local_without_links_and_locks_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", refuse(errno.EPERM))
    monkeypatch.setattr(fcntl, "flock", refuse(errno.ENOLCK))
    with pytest.raises(BadURL, match="neither hard links nor file locks") as caught:
        open_store(str(tmp_path)).put("k", [b"x"], if_absent=True)
    assert "\n" not in str(caught.value)
    assert open_store(str(tmp_path)).list("") == []


def test_local_sweeps_what_killed_processes_left(tmp_path: Path) -> None:
    (tmp_path / ".tmp").mkdir()
    for name, age_s in (("old", 2 * 24 * 3600), ("new", 60)):
        (tmp_path / ".tmp" / name).write_bytes(b"half a file")
        os.utime(tmp_path / ".tmp" / name, (time.time() - age_s,) * 2)
    store = open_store(str(tmp_path))
    assert store.list("") == []
    assert {path.name for path in (tmp_path / ".tmp").iterdir()} == {"old", "new"}  # who reads removes nothing
    store.put("a", [b"x"])
    assert [path.name for path in (tmp_path / ".tmp").iterdir()] == ["new"]


def test_local_empty_folders_do_not_exist(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    (tmp_path / "step/attempt").mkdir(parents=True)
    assert store.folders("") == []
    store.put("step/attempt/x", [b""])
    assert store.folders("") == ["step"]


def test_local_failed_put_leaves_nothing(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "run"))
    with pytest.raises(TypeError, match="contiguous"):
        store.put("a", [b"x", memoryview(b"abcdef")[::2]])
    assert store.list("") == []
    assert list((tmp_path / "run/.tmp").iterdir()) == []
