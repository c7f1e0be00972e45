"""Corpora: what is read, from where, and what is refused."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from elastic_moe.data import DataConfig, documents
from elastic_moe.data.corpus import as_bytes, fingerprint, open_corpus, stdlib_files
from elastic_moe.data.documents import JoinedDocuments, LoadedTexts
from elastic_moe.errors import UserError

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
@given(texts=st.lists(st.lists(st.binary(max_size=5), max_size=4), max_size=4), data=st.data())
def test_any_range_of_joined_documents(texts: list[list[bytes]], data: st.DataObject) -> None:
    joined = JoinedDocuments([LoadedTexts(part) for part in texts])
    expected = b"".join(text + b"\0" for part in texts for text in part)
    assert len(joined) == joined.nbytes == len(expected)
    start = data.draw(st.integers(0, len(expected)))
    stop = data.draw(st.integers(start, len(expected) + 2))
    assert joined[start:stop].tobytes() == expected[start:stop]


def test_local_text_is_not_read_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A corpus larger than a rank's memory trains: nothing keeps more of it than a few samples."""
    urls = [folder_of_texts(tmp_path / "texts"), json_lines(tmp_path / "texts.jsonl"), columns(tmp_path / "a.parquet")]

    def refuse(texts: object) -> None:
        raise AssertionError("all texts are in memory")

    monkeypatch.setattr(documents.LoadedTexts, "__init__", refuse)
    for url in urls:
        assert open_corpus(DataConfig(url=url), seq_len=5).num_tokens == sum(len(d.encode()) + 1 for d in DOCUMENTS)


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


def test_a_text_that_is_cut_while_it_is_trained_on_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("some text " * 100)
    corpus = open_corpus(DataConfig(url=str(path)), seq_len=8)
    path.write_text("some")
    with pytest.raises(UserError, match=r"a\.txt has become shorter"):
        corpus.windows(np.array([50]))


def test_mistakes_in_parquet_files_are_told(tmp_path: Path) -> None:
    (tmp_path / "bad.parquet").write_bytes(b"no parquet at all")
    parquet.write_table(pyarrow.table({"body": ["x"], "n": [1]}), tmp_path / "other.parquet")
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("bad.parquet", {}, "is not a parquet file"),
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
        ("bad.jsonl", b'{"text": 3}\n', {}, "line 1: field 'text' is not a string"),
        ("bad.npy", b"no array", {}, "is not a .npy array"),
        ("x.txt", b"abc", {"format": "tokens"}, "is not a .npy array"),
        ("bad.txt.gz", b"abc", {}, "cannot be read"),
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


def test_an_unknown_protocol_is_told() -> None:
    with pytest.raises(UserError, match="nowhere"):
        open_corpus(DataConfig(url="nowhere://bucket/x"), seq_len=8)


def test_arrays_of_objects_are_refused(tmp_path: Path) -> None:
    """Loading one would unpickle whatever the file holds."""
    np.save(tmp_path / "evil.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match=r"not a \.npy array"):
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
