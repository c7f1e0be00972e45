"""The cache of token ids that the processes of a node share."""

from __future__ import annotations

import contextlib
import errno
import gzip
import io
import json
import logging
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow
import pytest
import torch.distributed as dist
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractBufferedFile
from pyarrow import parquet

from elastic_moe.data import DataConfig, corpus, sources
from elastic_moe.data.cache import TokenCache, TokenSink, default_folder
from elastic_moe.data.corpus import fingerprint, open_corpus
from elastic_moe.data.progress import ReadProgress
from elastic_moe.errors import UserError
from tests.moe.test_corpus import as_bytes
from tests.ranks import Ranks

GIB = 1 << 30
TEXTS = [f"document {i}, {'long ' * i}" for i in range(9)]


def some(values: list[int], seen: list[str], name: str = "made") -> Callable[[TokenSink], None]:
    def make(sink: TokenSink) -> None:
        seen.append(name)
        sink.append(np.array(values, dtype=np.uint16))

    return make


def test_an_array_is_made_once_and_is_its_owners_alone(tmp_path: Path) -> None:
    seen: list[str] = []
    for _ in range(2):
        found = TokenCache(tmp_path / "c", GIB).arrays({"ab" * 20: some([1, 2, 300], seen)})
        assert found["ab" * 20].tolist() == [1, 2, 300]
        assert isinstance(found["ab" * 20], np.memmap)
    assert seen == ["made"]
    assert stat.S_IMODE((tmp_path / "c").stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "c").iterdir()} == {0o600}


def test_an_empty_array(tmp_path: Path) -> None:
    for _ in range(2):
        found = TokenCache(tmp_path, GIB).arrays({"ab" * 20: some([], [])})["ab" * 20]
        assert (len(found), found.dtype) == (0, np.uint16)


@pytest.mark.parametrize("harm", ["cut", "longer", "byte", "header", "empty"])
def test_a_torn_file_is_made_again(tmp_path: Path, harm: str, caplog: pytest.LogCaptureFixture) -> None:
    seen: list[str] = []
    key = "cd" * 20
    TokenCache(tmp_path, GIB).arrays({key: some([7, 8, 9], seen)})
    path = tmp_path / f"{key}.tokens"
    content = path.read_bytes()
    new = {
        "cut": content[:-1],
        "longer": content + b"x",
        "byte": content[:4097] + bytes([content[4097] ^ 1]) + content[4098:],
        "header": b"nothing" + content[7:],
        "empty": b"",
    }
    path.write_bytes(new[harm])
    assert TokenCache(tmp_path, GIB).arrays({key: some([7, 8, 9], seen)})[key].tolist() == [7, 8, 9]
    assert seen == ["made", "made"]
    assert "is damaged and is made again" in caplog.text


def test_one_that_could_not_be_made_leaves_nothing(tmp_path: Path) -> None:
    def fail(sink: TokenSink) -> None:
        sink.append(np.array([1], dtype=np.uint16))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TokenCache(tmp_path, GIB).arrays({"ab" * 20: fail})
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith("lock")] == []


def test_what_was_used_longest_ago_makes_room(tmp_path: Path) -> None:
    seen: list[str] = []
    keys = [f"{i}" * 40 for i in range(4)]
    size = 4096 + 2 * 1000
    for i, key in enumerate(keys[:3]):
        TokenCache(tmp_path, GIB).arrays({key: some([i] * 1000, seen)})
        os.utime(tmp_path / f"{key}.tokens", (i, i))
    held = TokenCache(tmp_path, GIB).arrays({keys[0]: some([0], seen)})[keys[0]]  # used now
    TokenCache(tmp_path, 3 * size).arrays({keys[3]: some([3] * 1000, seen)})
    left = {path.stem for path in tmp_path.glob("*.tokens")}
    assert left == {keys[0], keys[2], keys[3]}
    assert held.tolist() == [0] * 1000
    with pytest.raises(UserError, match=r"take more than data\.cache_gib = .* raise it"):
        TokenCache(tmp_path, size).arrays({keys[1]: some([1] * 3000, seen)})
    assert not list(tmp_path.glob("*.partial"))


def test_a_cache_that_cannot_be_written_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a file that another process has removed a moment ago is as good as it was."""
    seen: list[str] = []
    key = "ab" * 20
    TokenCache(tmp_path, GIB).arrays({key: some([1, 2], seen)})

    def refuse(path: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(os, "utime", refuse)
    assert TokenCache(tmp_path, GIB).arrays({key: some([1, 2], seen)})[key].tolist() == [1, 2]
    assert seen == ["made"]


def test_what_a_killed_process_left_makes_room(tmp_path: Path) -> None:
    """And not what one that is alive is at: it holds the lock of its key."""
    size = 4096 + 2 * 1000
    dead, alive, wanted = (f"{i}" * 40 for i in range(3))
    for key in (dead, alive):
        (tmp_path / f"{key}.partial").write_bytes(bytes(size))
    cache = TokenCache(tmp_path, 2 * size)
    with cache._lock(alive, waits=False):
        assert len(cache.arrays({wanted: some([2] * 1000, [])})[wanted]) == 1000
    assert {path.name for path in tmp_path.iterdir() if not path.name.startswith("lock")} == {
        f"{alive}.partial",
        f"{wanted}.tokens",
    }


def test_a_full_disk_and_a_folder_that_cannot_be_written_are_told(tmp_path: Path) -> None:
    def fill(sink: TokenSink) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match=r"data\.cache: .* is on a full disk"):
        TokenCache(tmp_path / "c", GIB).arrays({"ab" * 20: fill})
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data\.cache: .* cannot be written .*: set data\.cache to a folder"):
        TokenCache(tmp_path / "file" / "c", GIB)


def test_the_default_folder() -> None:
    assert default_folder({"XDG_CACHE_HOME": "/x"}) == Path("/x/elastic-moe")
    assert default_folder({}).parts[-2:] == (".cache", "elastic-moe")


# --- a corpus by way of it


def remote(name: str, content: bytes) -> str:
    with fsspec.open(f"memory://{name}", "wb") as file:
        file.write(content)
    return f"memory://{name}"


def opened(url: str, folder: Path, **config: Any) -> corpus.Corpus:
    return open_corpus(DataConfig.model_validate({"url": url, "cache": str(folder), **config}), seq_len=5)


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def test_remote_files_are_fetched_once_a_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text, JSON lines and arrays; another start, or another rank, opens no remote file."""
    joined = as_bytes(text.encode() for text in TEXTS)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    ids = np.arange(100, 900, dtype=np.uint16)
    for i, text in enumerate(TEXTS):
        remote(f"texts/{i}.txt", text.encode())
    cases: list[tuple[str, list[Any]]] = [
        ("memory://texts", [joined]),
        (remote("a.jsonl", lines), [joined]),
        (remote("a.jsonl.gz", gzip.compress(lines)), [joined]),
        (remote("ids.npy", npy(ids)), [ids]),
    ]
    for url, expected in cases:
        assert opened(url, tmp_path).fingerprint == fingerprint(expected), url
    with monkeypatch.context() as patch:
        patch.setattr(corpus, "_write_group", lambda *args: pytest.fail("a remote file is read again"))
        for url, expected in cases:
            assert opened(url, tmp_path).fingerprint == fingerprint(expected), url
    remote("ids.npy", npy(ids + 1))  # the file has changed, and says so by when it was made
    assert opened("memory://ids.npy", tmp_path).fingerprint == fingerprint([ids + 1])


def test_how_a_file_is_read_is_a_part_of_its_key(tmp_path: Path) -> None:
    url = remote("b.jsonl", b'{"text": "some text", "other": "another text"}\n')
    prints = {
        opened(url, tmp_path).fingerprint,
        opened(url, tmp_path, text_field="other").fingerprint,
        opened(url, tmp_path, format="text").fingerprint,
    }
    assert len(prints) == 3


class RangedFile(AbstractBufferedFile):
    """As the files of S3, GCS and HTTP are: read by ranges, and with their methods alone."""

    def _fetch_range(self, start: int, end: int) -> bytes:
        return bytes(self.fs.store[self.path].getvalue()[start:end])


class RangedFileSystem(MemoryFileSystem):
    protocol = "ranged"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(MemoryFileSystem._strip_protocol(path.replace("ranged://", "memory://")))

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        return RangedFile(self, path, mode, block_size=100, cache_type="readahead", size=self.info(path)["size"])


def test_files_that_are_read_by_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.register_implementation("ranged", RangedFileSystem, clobber=True)
    monkeypatch.setattr(sources, "_PART_BYTES", 70)
    joined = as_bytes(text.encode() for text in TEXTS)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    table = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": TEXTS}), table)
    ids = np.arange(100, 900, dtype=np.uint32)
    cases: list[tuple[str, bytes, Any]] = [
        ("a.jsonl", lines, joined),
        ("b.jsonl", lines.rstrip(b"\n"), joined),
        ("a.jsonl.gz", gzip.compress(lines), joined),
        ("a.parquet", table.getvalue(), joined),
        ("a.txt", "\n".join(TEXTS).encode(), as_bytes(["\n".join(TEXTS).encode()])),
        ("a.npy", npy(ids), ids),
    ]
    for name, content, expected in cases:
        remote(name, content)
        assert opened(f"ranged://{name}", tmp_path).fingerprint == fingerprint([expected]), name


def test_a_line_without_an_end_is_not_read_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_MAX_LINE_BYTES", 1000)
    monkeypatch.setattr(sources, "_PART_BYTES", 400)
    with pytest.raises(UserError, match="has a line of more than 0 MiB: is it JSON lines"):
        opened(remote("long.jsonl", b"x" * 5000), tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy(np.arange(99, dtype=np.uint16))[:-7], "it is 7 bytes shorter than it says"),
        (npy(np.zeros((3, 4), dtype=np.uint16)), r"uint16 of shape \(3, 4\)"),
        (npy(np.zeros(30, dtype=np.int64)), "int64 of shape"),
        (npy(np.zeros(30, dtype=">u2")), ">u2 of shape"),
        (npy(np.arange(99, dtype=np.uint16)).replace(b"(99,)", b"(-9,)"), r"shape \(-9,\)"),
        (b"no array", "is not a .npy array"),
        (b"", "is not a .npy array"),
    ],
)
def test_mistakes_in_remote_arrays_are_told(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        opened(remote("bad.npy", content), tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*.tokens"))


def test_small_files_share_one_of_the_cache_and_large_ones_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So what was done before a crash is not done again, and ranks can share the work."""
    for i, text in enumerate(TEXTS):
        remote(f"many/{i}.txt", text.encode())
    joined = fingerprint([as_bytes(text.encode() for text in TEXTS)])
    assert opened("memory://many", tmp_path / "one").fingerprint == joined
    assert len(list((tmp_path / "one").glob("*.tokens"))) == 1
    monkeypatch.setattr(corpus, "_FILE_BYTES", 60)
    assert opened("memory://many", tmp_path / "some").fingerprint == joined
    assert len(list((tmp_path / "some").glob("*.tokens"))) > 3


def read_as_a_rank(url: str, folder: str) -> tuple[str, list[str]]:
    """A fingerprint, and which files this rank has read; no rank begins before all are there."""
    write, made = corpus._write_group, []

    def recorded(group: Any, *args: Any) -> None:
        made.extend(source.path for source in group)
        write(group, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "_write_group", recorded)
        patch.setattr(corpus, "_FILE_BYTES", 60)
        dist.barrier()
        return opened(url, Path(folder)).fingerprint, made


def test_ranks_of_a_node_share_the_work(ranks: Ranks, tmp_path: Path) -> None:
    """Three processes at once: each file is read by one of them, and all see the same tokens."""
    (tmp_path / "data").mkdir()
    for i, text in enumerate(TEXTS):
        (tmp_path / "data" / f"{i}.txt.gz").write_bytes(gzip.compress(text.encode()))
    found = ranks.run(read_as_a_rank, str(tmp_path / "data"), str(tmp_path / "cache"), world_size=3)
    assert {print_ for print_, _ in found} == {fingerprint([as_bytes(text.encode() for text in TEXTS)])}
    read = sorted(path for _, made in found for path in made)
    assert read == sorted(str(path) for path in (tmp_path / "data").iterdir())


def test_what_another_process_is_at_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, waits = "ab" * 20, list[float]()
    ours, theirs = TokenCache(tmp_path, GIB), TokenCache(tmp_path, GIB)
    with contextlib.ExitStack() as stack:
        assert stack.enter_context(theirs._lock(key, waits=False))

        def finish(seconds: float) -> None:
            waits.append(seconds)
            theirs._made(key, some([4, 5], []), frozenset())
            stack.close()

        monkeypatch.setattr(time, "sleep", finish)
        assert ours.arrays({key: some([], [])})[key].tolist() == [4, 5]
    assert len(waits) == 1


def test_progress_is_told_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    now_s = 0.0
    progress = ReadProgress("s3://bucket/x", 4 << 20, clock=lambda: now_s)
    progress.add(1 << 20)
    assert caplog.text == ""
    now_s = 8.0
    progress.add(1 << 20)
    assert "this process has read 2.0 of 4.0 MiB of s3://bucket/x (0.2 MiB/s)" in caplog.text
    ReadProgress("nothing", 0).close()
    assert "nothing" not in caplog.text
