"""Corpora: what is read, from where, and what is refused."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import sys
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from elastic_moe.data import DataConfig, documents, sources, zstd
from elastic_moe.data.corpus import fingerprint, open_corpus
from elastic_moe.data.documents import JoinedArrays, TextFiles, TokenFile
from elastic_moe.data.sources import stdlib_files
from elastic_moe.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where token ids are kept between openings: a folder of each test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    return tmp_path / "caches" / "elastic-moe"


def as_bytes(documents: Iterable[bytes]) -> npt.NDArray[np.uint8]:
    """Documents as one array of byte tokens."""
    return np.frombuffer(b"".join(text + b"\0" for text in documents), dtype=np.uint8)


DOCUMENTS = ["one document", "", "a second, längere one", "third"]


def test_default_corpus_is_the_standard_library() -> None:
    names = [path.name for path in stdlib_files()]
    assert {"argparse.py", "dataclasses.py", "socket.py"} <= set(names)
    corpus = open_corpus(DataConfig(), seq_len=256)
    assert corpus.num_tokens > 5_000_000
    assert corpus.fingerprint == open_corpus(DataConfig(), seq_len=32).fingerprint


def folder_of_texts(folder: Path) -> str:
    folder.mkdir()
    for i, text in enumerate(DOCUMENTS):
        (folder / f"{i}.txt").write_text(text, encoding="utf-8")
    return str(folder)


def json_lines(path: Path, opened: Callable[..., Any] = open) -> str:
    with opened(path, "wt", encoding="utf-8") as file:
        file.write("\n".join(json.dumps({"text": text, "n": 1}) for text in DOCUMENTS) + "\n\n")
    return str(path)


def columns(path: Path) -> str:
    table = pyarrow.table({"text": DOCUMENTS, "n": list(range(len(DOCUMENTS)))})
    parquet.write_table(table, path, row_group_size=3)
    return str(path)


def test_every_kind_of_file_reads_alike(tmp_path: Path) -> None:
    """Text, JSON lines, parquet and token arrays, compressed or not, local or not: the same tokens and fingerprint."""
    tokens = as_bytes(text.encode() for text in DOCUMENTS)
    np.save(tmp_path / "texts.npy", tokens)
    folder = folder_of_texts(tmp_path / "texts")
    packed = tmp_path / "packed"
    packed.mkdir()
    for i, text in enumerate(DOCUMENTS):
        (packed / f"{i}.txt.gz").write_bytes(gzip.compress(text.encode()))
    lines = json_lines(tmp_path / "texts.jsonl")
    urls = [
        folder,
        f"{folder}/*.txt",
        str(packed),
        lines,
        f"file://{lines}",
        f"simplecache::file://{lines}",
        json_lines(tmp_path / "texts.jsonl.gz", gzip.open),
        json_lines(tmp_path / "texts.ndjson.bz2", bz2.open),
        json_lines(tmp_path / "texts.jsonl.xz", lzma.open),
        columns(tmp_path / "texts.parquet"),
        str(tmp_path / "texts.npy"),
    ]
    for url in urls:
        corpus = open_corpus(DataConfig(url=url), seq_len=5)
        assert corpus.fingerprint == fingerprint([tokens]), url
        every = corpus.windows(np.arange(corpus.num_samples))
        assert every.tolist() == [tokens[i * 5 : i * 5 + 6].tolist() for i in range(corpus.num_samples)], url


@settings(deadline=None)
@given(texts=st.lists(st.binary(max_size=5), max_size=6), data=st.data())
def test_any_range_of_texts(tmp_path_factory: pytest.TempPathFactory, texts: list[bytes], data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("texts")
    for i, text in enumerate(texts):
        (folder / str(i)).write_bytes(text)
    files = TextFiles([str(folder / str(i)) for i in range(len(texts))])
    expected = b"".join(text + b"\0" for text in texts)
    assert len(files) == files.nbytes == len(expected)
    start = data.draw(st.integers(0, len(expected)))
    stop = data.draw(st.integers(start, len(expected) + 2))
    assert files[start:stop].tobytes() == expected[start:stop]


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 2**16 - 1), max_size=9), data=st.data())
def test_any_range_of_a_token_file(
    tmp_path_factory: pytest.TempPathFactory, ids: list[int], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("ids") / "a"
    path.write_bytes(b"head!" + np.array(ids, dtype=np.uint16).tobytes() + b"more")
    file = TokenFile(str(path), np.dtype(np.uint16), 5, len(ids))
    assert (len(file), file.nbytes) == (len(ids), 2 * len(ids))
    start, stop = data.draw(st.integers(0, 11)), data.draw(st.integers(0, 11))
    assert file[start:stop].tolist() == ids[start:stop]


@settings(deadline=None)
@given(parts=st.lists(st.lists(st.integers(0, 999), max_size=4), min_size=1, max_size=4), data=st.data())
def test_any_range_of_joined_arrays(parts: list[list[int]], data: st.DataObject) -> None:
    joined = JoinedArrays([np.array(part, dtype=np.uint16) for part in parts])
    expected = [token for part in parts for token in part]
    assert len(joined) == len(expected)
    assert joined.nbytes == 2 * len(expected)
    start = data.draw(st.integers(0, len(expected)))
    stop = data.draw(st.integers(start, len(expected) + 2))
    assert joined[start:stop].tolist() == expected[start:stop]


def test_no_corpus_is_read_into_memory(tmp_path: Path, cache: Path) -> None:
    """A corpus larger than a rank's memory trains: text lies where it lay, all else is mapped."""
    (texts,) = open_corpus(DataConfig(url=folder_of_texts(tmp_path / "texts")), seq_len=5).shards
    assert isinstance(texts, TextFiles)
    assert not cache.exists()
    for url in (json_lines(tmp_path / "texts.jsonl"), columns(tmp_path / "a.parquet")):
        (shard,) = open_corpus(DataConfig(url=url), seq_len=5).shards
        assert isinstance(shard, np.memmap)
    assert len(list(cache.glob("*.tokens"))) == 2


def test_what_a_folder_holds_beside_its_data_is_left_out(tmp_path: Path) -> None:
    folder = folder_of_texts(tmp_path / "texts")
    expected = open_corpus(DataConfig(url=folder), seq_len=5).fingerprint
    (tmp_path / "texts" / "_SUCCESS").touch()
    (tmp_path / "texts" / ".part.crc").write_bytes(b"\0\1")
    (tmp_path / "texts" / ".git").mkdir()
    (tmp_path / "texts" / ".git" / "index").write_bytes(b"\0\1")
    assert open_corpus(DataConfig(url=folder), seq_len=5).fingerprint == expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("c.json", "is one value, not one a line: write it as .jsonl"),
        ("tok.bin", r"may be token ids of any width: save them as \.npy"),
        ("x.csv", "is not read"),
        ("x.npz", "is an archive of arrays"),
        ("x.tar.gz", "is an archive: unpack it"),
        ("tokens.npy.gz", "is compressed as a whole"),
        ("model.safetensors", "is not data"),
    ],
)
def test_a_file_of_another_kind_is_not_trained_on_as_text(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / name).write_text("some text " * 100)
    with pytest.raises(UserError, match=message) as caught:
        open_corpus(DataConfig(url=str(tmp_path / name)), seq_len=8)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["movie", "movie.txt", "movie.txt.gz"])
def test_what_is_no_text_is_refused_unless_it_is_meant(tmp_path: Path, name: str) -> None:
    content = b"RIFF\0\0\1" + b"some more" * 10
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    url = str(tmp_path / name)
    with pytest.raises(UserError, match="is not text, it holds zero bytes"):
        open_corpus(DataConfig(url=url), seq_len=8)
    assert open_corpus(DataConfig(url=url, format="text"), seq_len=8).num_tokens == len(content) + 1


def test_the_source_of_a_json_file_is_trained_on_where_that_is_meant(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text('{"a": [1, 2, 3, 4, 5]}')
    assert open_corpus(DataConfig(url=str(tmp_path / "c.json"), format="text"), seq_len=8).num_tokens == 23


@pytest.mark.parametrize("name", ["a.txt", "a.npy"])
def test_what_is_cut_while_it_is_trained_on_is_told(tmp_path: Path, name: str) -> None:
    """A mapped file would end the process by SIGBUS, without a word."""
    path = tmp_path / name
    if name == "a.npy":
        np.save(path, np.zeros(1 << 20, dtype=np.uint16))
    else:
        path.write_text("some text " * (1 << 18))
    corpus = open_corpus(DataConfig(url=str(path)), seq_len=8)
    with path.open("r+b") as file:
        file.truncate(100)
    with pytest.raises(UserError, match=rf"{name} has become shorter"):
        corpus.windows(np.array([100_000]))


@pytest.mark.parametrize("name", ["a.txt", "a.npy"])
def test_what_is_written_or_removed_while_it_is_trained_on_is_told(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / name
    if name == "a.npy":
        np.save(path, np.zeros(1000, dtype=np.uint16))
    else:
        path.write_text("some text " * 100)
    corpus = open_corpus(DataConfig(url=str(path)), seq_len=8)
    corpus.windows(np.array([3]))
    assert not caplog.records
    with path.open("r+b") as file:
        file.seek(0, os.SEEK_END)
        file.write(b"more")
    os.utime(path, ns=(1, 1))  # later by the clock, which may be too coarse to tell
    for _ in range(2):
        corpus.windows(np.array([3]))
        documents._opened.cache_clear()  # as where there are many files
    (record,) = caplog.records
    assert f"{path} was written while the job trains on it" in record.getMessage()
    corpus = open_corpus(DataConfig(url=str(path)), seq_len=8)
    path.unlink()
    documents._opened.cache_clear()
    with pytest.raises(UserError, match=rf"{name} is there no more: data must not change"):
        corpus.windows(np.array([3]))


def test_mistakes_in_parquet_files_are_told(tmp_path: Path) -> None:
    (tmp_path / "bad.parquet").write_bytes(b"no parquet at all")
    (tmp_path / "empty.parquet").touch()
    parquet.write_table(pyarrow.table({"body": ["x"], "n": [1]}), tmp_path / "other.parquet")
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("bad.parquet", {}, "is not a parquet file"),
        ("empty.parquet", {}, "is not a parquet file"),
        ("other.parquet", {}, "has no column 'text', but body, n: set data.text_field"),
        ("other.parquet", {"text_field": "n"}, "'n' is int, not a string"),
    ]
    for name, config, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            open_corpus(DataConfig(url=str(tmp_path / name), **config), seq_len=8)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "config", "message"),
    [
        ("missing.txt", None, {}, "cannot be read"),
        ("short.txt", b"abc", {}, "less than one sample"),
        ("bad.jsonl", b'{"text": "x"}\n{"other": 1}\n', {}, "line 2: not a JSON object with a field 'text'"),
        ("bad.jsonl", b'{"text": 3}\n', {}, "line 1: field 'text' is int, not a string"),
        ("bad.npy", b"no array", {}, "is not a .npy array"),
        ("x.txt", b"abc", {"format": "tokens"}, "is not a .npy array"),
        ("bad.jsonl", b'{"text": "a\\ud800"}\n', {}, "field 'text' has half of a character"),
        ("bad.jsonl", b'{"text": "' + b"[" * 100_000 + b"\n", {}, "line 1: not a JSON object"),
        ("bad.jsonl", b"[" * 100_000 + b"\n", {}, "line 1: not a JSON object"),
        ("bad.txt.gz", b"abc", {}, "cannot be read"),
        ("cut.txt.gz", gzip.compress(b"some text" * 99, mtime=0)[:-20], {}, "cannot be read"),
        ("a.txt.zst", b"abc", {}, "zst|cannot be read"),
        ("bad.jsonl.xz", b"abc", {}, "cannot be read"),
    ],
)
def test_mistakes_are_told_in_one_line(
    tmp_path: Path, name: str, content: bytes | None, config: dict[str, str], message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        open_corpus(DataConfig(url=str(tmp_path / name), **config), seq_len=8)
    assert "\n" not in str(caught.value)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="is neither a file nor a folder"):
        open_corpus(DataConfig(url=str(tmp_path / "pipe")), seq_len=8)


def test_an_unknown_protocol_is_told() -> None:
    with pytest.raises(UserError, match="nowhere"):
        open_corpus(DataConfig(url="nowhere://bucket/x"), seq_len=8)


def test_arrays_of_objects_are_refused(tmp_path: Path) -> None:
    """Loading one would unpickle whatever the file holds."""
    np.save(tmp_path / "evil.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="is object of shape"):
        open_corpus(DataConfig(url=str(tmp_path / "evil.npy")), seq_len=8)


def test_token_shards_must_be_flat_and_unsigned(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((3, 4), dtype=np.uint16))
    with pytest.raises(UserError, match=r"uint16 of shape \(3, 4\)"):
        open_corpus(DataConfig(url=str(tmp_path / "a.npy")), seq_len=8)


def test_fingerprint_tells_corpora_apart() -> None:
    base = np.arange(1000, dtype=np.uint16)
    changed = base.copy()
    changed[500] += 1
    prints = [
        fingerprint(s) for s in ([base], [changed], [base.astype(np.uint32)], [base[:500], base[500:]], [base[:999]])
    ]
    assert len(set(prints)) == len(prints)


@pytest.fixture
def zstandard(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the library: zlib's streams have the same attributes."""
    module = ModuleType("zstandard")
    module.ZstdDecompressor = lambda: SimpleNamespace(decompressobj=zlib.decompressobj)  # type: ignore[attr-defined]
    module.ZstdError = zlib.error  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "zstandard", module)


def test_files_of_zstd_are_read_to_the_end_of_their_last_frame(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zstandard: None
) -> None:
    """One that was cut off is no shorter text: what is missing would be missed by nobody."""
    monkeypatch.setattr(zstd, "_PACKED_BYTES", 7)
    monkeypatch.setattr(sources, "_PART_BYTES", 50)
    text = "".join(f"line {i * i}\n" for i in range(200)).encode()
    whole = zlib.compress(text[:900]) + zlib.compress(text[900:])
    path = tmp_path / "a.txt.zst"
    config = DataConfig(url=str(path))
    path.write_bytes(whole)
    assert open_corpus(config, seq_len=5).fingerprint == fingerprint([as_bytes([text])])
    for spoilt in (whole[:-1], whole[: len(whole) // 2], whole + b"no frame", b"none"):
        path.write_bytes(spoilt)
        with pytest.raises(UserError, match="cannot be read"):
            open_corpus(config, seq_len=5)


def test_a_missing_zstandard_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "a.jsonl.zst").write_bytes(b"x")
    with pytest.raises(UserError, match="whose package is missing: install zstandard"):
        open_corpus(DataConfig(url=str(tmp_path / "a.jsonl.zst")), seq_len=5)
