"""Corpora that are not what their names say, or whose names say what they are not."""

from __future__ import annotations

import functools
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from elastic_moe.data import DataConfig, sources
from elastic_moe.data.corpus import Corpus, open_corpus
from elastic_moe.data.formats import DataFormat, recognise
from elastic_moe.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))


def tokens_of(corpus: Corpus) -> bytes:
    return b"".join(shard[0 : len(shard)].tobytes() for shard in corpus.shards)


def refusal(url: Path | str, vocab_size: int | None = None, **config: Any) -> str:
    with pytest.raises(UserError) as caught:
        open_corpus(DataConfig(url=str(url), **config), seq_len=4, vocab_size=vocab_size)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("häuser und mehr".encode("utf-16"), "it is UTF-16: convert it (iconv -f utf-16 -t utf-8)"),
        (b"\xfe\xff" + "\u4e2d\u6587".encode("utf-16-be"), "it is UTF-16"),
        (b"\x1f\x8b\x08" + b"packed" * 9, "compressed by gzip: give it the ending .gz"),
        (b"BZh91AY&SY" + b"packed" * 9, "compressed by bzip2"),
        (b"\x28\xb5\x2f\xfd" + b"packed" * 9, "compressed by zstd"),
        (b"PAR1" + b"columns" * 9, "parquet: give it the ending .parquet"),
        (b"%PDF-1.7 and more", "a PDF"),
    ],
)
def test_what_is_no_text_by_its_first_bytes(tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "corpus.txt").write_bytes(content)
    assert told in refusal(tmp_path / "corpus.txt")
    assert open_corpus(DataConfig(url=str(tmp_path / "corpus.txt"), format="text"), seq_len=1).num_tokens > 1


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("https://host/a.jsonl?download=true", DataFormat.JSONL),
        ("http://host/a.parquet#part", DataFormat.PARQUET),
        ("https://host/a.txt.gz?x=a.jsonl", DataFormat.TEXT),
        ("/data/what?.jsonl", DataFormat.JSONL),
        ("a.jsonlines", DataFormat.JSONL),
        ("a.pq", DataFormat.PARQUET),
    ],
)
def test_formats_by_name(path: str, found: DataFormat) -> None:
    assert recognise(path).format is found


@pytest.mark.parametrize("name", ["a.json?b.gz", "a.tgz", "a.txt.lz4", "a.feather", "a.pth", "a.7z", "a.tfrecord"])
def test_names_of_other_kinds(name: str) -> None:
    path = f"https://host/{name}" if "?" in name else name
    with pytest.raises(UserError, match=r"one value|archive|not read|not data"):
        recognise(path)


def test_names_may_hold_the_signs_of_patterns(tmp_path: Path) -> None:
    for name in ("a[1].txt", "what?.txt", "all*.txt"):
        (tmp_path / name).write_text(f"in {name} there are some words")
        assert tokens_of(open_corpus(DataConfig(url=str(tmp_path / name)), seq_len=4)).startswith(
            f"in {name} ".encode()
        )


def test_what_is_empty_is_said_to_be(tmp_path: Path) -> None:
    assert "no file to read is in" in refusal(tmp_path)
    assert "no file is named like" in refusal(tmp_path / "*.txt")
    (tmp_path / ".hidden").write_text("some words that nobody sees")
    assert "no file to read is in" in refusal(tmp_path)
    assert "there is no such file" in refusal(tmp_path / "none.txt")


def test_a_mixture_is_told_by_its_files(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("what this is")
    (tmp_path / "a.jsonl").write_text('{"text": "abc"}\n')
    assert "mixes jsonl (a.jsonl) and text (README.md) files" in refusal(tmp_path)


def test_token_shards_that_lie(tmp_path: Path) -> None:
    """`np.load` takes for a pickle what is no array, and advises to load it."""
    path = tmp_path / "ids.npy"
    np.arange(99, dtype=np.uint16).tofile(path)
    assert "is not a .npy array: the magic string is not correct" in refusal(path)
    np.save(path, np.arange(99, dtype=np.uint16))
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    assert "it is 3 bytes shorter than it says" in refusal(path)
    path.write_bytes(whole[:40])
    assert "is not a .npy array" in refusal(path)
    path.write_bytes(b"")
    assert "is not a .npy array" in refusal(path)
    np.savez(tmp_path / "a.npz", np.arange(9))
    (tmp_path / "a.npz").rename(path)
    assert "is not a .npy array" in refusal(path)
    np.save(path, np.arange(99, dtype=">u2"))
    assert ">u2" in refusal(path)
    np.save(path, np.empty(0, dtype=np.uint16))
    assert "holds 0 tokens" in refusal(path)


def test_a_vocabulary_too_small_is_found_before_a_step(tmp_path: Path) -> None:
    """By the step that finds it all since the last checkpoint is lost."""
    ids = np.zeros(1000, dtype=np.uint16)
    ids[-1] = 300
    np.save(tmp_path / "ids.npy", ids)
    assert "the data holds token 300 but model.vocab_size is 300" in refusal(tmp_path / "ids.npy", vocab_size=300)
    open_corpus(DataConfig(url=str(tmp_path / "ids.npy")), seq_len=4, vocab_size=301)
    (tmp_path / "a.txt").write_text("words, and an ü")
    assert "the data holds token 195" in refusal(tmp_path / "a.txt", vocab_size=128)
    (tmp_path / "b.txt").write_text("words without one")
    open_corpus(DataConfig(url=str(tmp_path / "b.txt")), seq_len=4, vocab_size=128)


def test_what_ends_documents_of_bytes_is_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some words")
    told = refusal(tmp_path / "a.txt", end_of_document=10)
    assert "data.end_of_document = 10, and text that is read as bytes ends its documents by 0" in told
    open_corpus(DataConfig(url=str(tmp_path / "a.txt"), end_of_document=0), seq_len=4)


class StoreError(Exception):
    """As a store's library has one: no OSError."""


@pytest.mark.parametrize("field", ["url", "tokenizer"])
def test_what_a_stores_library_raises_is_told(monkeypatch: pytest.MonkeyPatch, field: str) -> None:
    """S3 without credentials, say: botocore's own errors are no OSError."""

    def fail(url: str) -> None:
        raise StoreError("Unable to locate\ncredentials")

    def read() -> None:
        open_corpus(DataConfig.model_validate({"url": "stdlib", field: "s3://bucket/x"}), seq_len=4)

    monkeypatch.setattr("fsspec.core.url_to_fs", fail)
    for module in ("botocore.exceptions", "http.client", "zipfile"):
        monkeypatch.setattr(StoreError, "__module__", module)
        with pytest.raises(UserError, match=rf"data\.{field} 's3://bucket/x'.*Unable to locate credentials"):
            read()
    for module in ("elastic_moe.data.sources", "struct", "queue", "torch"):
        monkeypatch.setattr(StoreError, "__module__", module)
        with pytest.raises(StoreError):
            read()


class Plain(http.server.SimpleHTTPRequestHandler):
    """Python's own server, which knows no ranges."""

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Quiet(http.server.ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A reader that has seen enough of a file hangs up."""


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and its address."""
    folder = tmp_path / "web"
    folder.mkdir()
    server = Quiet(("127.0.0.1", 0), functools.partial(Plain, directory=str(folder)))
    serving = threading.Thread(target=server.serve_forever, daemon=True)
    serving.start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    serving.join(30)


def test_a_web_server_without_ranges_is_read_in_one_go(web: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """fsspec asks for parts, of 5 MiB, and gives up on the second of a server that sends all."""
    folder, address = web
    monkeypatch.setattr(sources, "_PART_BYTES", 1 << 16)
    documents = [f"document {number} " * 70_000 for number in range(9)]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    assert (folder / "a.jsonl").stat().st_size > 6 << 20
    corpus = open_corpus(DataConfig(url=f"{address}/a.jsonl?download=true"), seq_len=4)
    assert tokens_of(corpus) == b"".join(text.encode() + b"\0" for text in documents)
    assert "there is no such file" in refusal(f"{address}/none.jsonl")


def test_what_a_web_server_lists_may_change(web: tuple[Path, str]) -> None:
    """A listing says neither how large a file is nor how old, by which the cache goes."""
    folder, address = web
    for text in ("some words", "other words than before"):
        (folder / "a.txt").write_text(text)
        fsspec.filesystem("http").clear_instance_cache()
        assert tokens_of(open_corpus(DataConfig(url=f"{address}/*.txt"), seq_len=4)) == text.encode() + b"\0"
