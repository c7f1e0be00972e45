"""Read a corpus into arrays of tokens.

A text is its UTF-8 bytes, and a zero byte ends each document. Local files stay on the disk but for what is trained on;
remote and compressed text is read into memory.
"""

from __future__ import annotations

import hashlib
import io
import lzma
import os
import sysconfig
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import numpy.typing as npt

from elastic_moe.data.config import DataConfig
from elastic_moe.data.documents import (
    Documents,
    JoinedDocuments,
    JsonLines,
    LoadedTexts,
    ParquetTexts,
    TextFiles,
    texts_of_lines,
)
from elastic_moe.data.formats import SNIFFED_BYTES, DataFormat, FileKind, recognise, refuse_binary
from elastic_moe.data.order import Int64s
from elastic_moe.errors import UserError

Tokens = npt.NDArray[np.unsignedinteger[Any]] | JoinedDocuments

_END_OF_DOCUMENT = b"\0"
_TOKEN_DTYPES = (np.uint8, np.uint16, np.uint32)
# Of the standard library: what distributions strip or move, so that machines with one Python version agree.
_STDLIB_EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "ensurepip", "turtledemo"}
# Shards larger than this are fingerprinted by pages spread over them: nobody reads terabytes at a start.
_WHOLE_FINGERPRINT_BYTES = 256 << 20
_CHUNK_TOKENS = 8 << 20
_PAGE_BYTES = 64 << 10
_NUM_PAGES = 64


@dataclass(frozen=True)
class Corpus:
    """Tokens in one or more shards; a sample never reaches over the end of its shard.

    Attributes:
        shards: 1-D arrays of uint8, uint16 or uint32 token ids.
        fingerprint: hex digest of the contents; equal corpora have equal fingerprints.
        seq_len: tokens in a sample. A sample's window holds one more: the target of its last token.
    """

    shards: tuple[Tokens, ...]
    fingerprint: str
    seq_len: int

    @property
    def num_tokens(self) -> int:
        return sum(len(shard) for shard in self.shards)

    @property
    def samples_per_shard(self) -> list[int]:
        return [max(0, (len(shard) - 1) // self.seq_len) for shard in self.shards]

    @property
    def num_samples(self) -> int:
        """Samples in an epoch."""
        return sum(self.samples_per_shard)

    def windows(self, sample_ids: Int64s) -> Int64s:
        """Tokens of each sample with its last target, int64 (len(sample_ids), seq_len + 1)."""
        ends = np.cumsum(self.samples_per_shard)
        out = np.empty((len(sample_ids), self.seq_len + 1), dtype=np.int64)
        for row, sample in enumerate(sample_ids):
            shard = int(np.searchsorted(ends, sample, side="right"))
            start = (int(sample) - (int(ends[shard - 1]) if shard else 0)) * self.seq_len
            out[row] = self.shards[shard][start : start + self.seq_len + 1]
        return out


def open_corpus(config: DataConfig, seq_len: int) -> Corpus:
    """Read, or map, the corpus that `config` names.

    Raises:
        UserError: there is nothing to read, it is not what `format` says, or it is shorter than one sample.
    """
    shards: list[Tokens]
    if config.url == "stdlib":
        shards = [as_bytes(path.read_bytes() for path in stdlib_files())]
    else:
        shards = _read_url(config)
    corpus = Corpus(tuple(shards), fingerprint(shards), seq_len)
    if corpus.num_samples == 0:
        raise UserError(
            f"data.url {config.url!r} holds {corpus.num_tokens} tokens, less than one sample of "
            f"train.seq_len {seq_len} and its last target: use more data or shorter sequences"
        )
    return corpus


def stdlib_files() -> list[Path]:
    """Source files of the running Python's standard library, in the order of their names."""
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _STDLIB_EXCLUDED]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    if not files:
        raise UserError(f"data.url is 'stdlib' but {root} holds no Python sources: name a text in data.url")
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def as_bytes(documents: Iterable[bytes]) -> npt.NDArray[np.uint8]:
    """Documents as one array of byte tokens, uint8."""
    return np.frombuffer(b"".join(part for text in documents for part in (text, _END_OF_DOCUMENT)), dtype=np.uint8)


def fingerprint(shards: Sequence[Tokens]) -> str:
    """SHA-256 over types, lengths and contents; of the contents of very large shards, pages spread over them."""
    digest = hashlib.sha256()
    for shard in shards:
        digest.update(f"{shard.dtype.str} {len(shard)}\n".encode())
        if shard.nbytes <= _WHOLE_FINGERPRINT_BYTES:
            for start in range(0, len(shard), _CHUNK_TOKENS):
                digest.update(np.ascontiguousarray(shard[start : start + _CHUNK_TOKENS]).data)
            continue
        page = _PAGE_BYTES // shard.itemsize
        for start in np.linspace(0, len(shard) - page, _NUM_PAGES, dtype=np.int64):
            digest.update(np.ascontiguousarray(shard[start : start + page]).data)
    return digest.hexdigest()


def _read_url(config: DataConfig) -> list[Tokens]:
    try:
        fs, path = fsspec.core.url_to_fs(config.url)
        paths = _expand(fs, path)
        kinds = [recognise(path, config.format) for path in paths]
        if len(formats := {kind.format for kind in kinds}) > 1:
            raise UserError(
                f"data.url {config.url!r} mixes {' and '.join(sorted(formats))} files: name one kind of them"
            )
        if formats == {DataFormat.TOKENS}:
            return [_token_shard(fs, path) for path in paths]
        sniff = config.format == "auto"
        files = list(zip(paths, kinds, strict=True))
        if formats == {DataFormat.TEXT} and _is_local(fs) and not any(kind.compression for kind in kinds):
            return [JoinedDocuments([_text_files(paths, sniff=sniff)])]
        return [JoinedDocuments([_documents(fs, path, kind, config, sniff=sniff) for path, kind in files])]
    except (OSError, EOFError, ImportError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"data.url {config.url!r} cannot be read: {error}") from error
    except ValueError as error:
        # fsspec's answer to a protocol that it does not know.
        raise UserError(f"data.url {config.url!r}: {error}") from error


def _expand(fs: Any, path: str) -> list[str]:
    if any(sign in path for sign in "*?["):
        paths = [found for found in fs.glob(path) if not fs.isdir(found)]
    elif fs.isdir(path):
        paths = fs.find(path)
    else:
        paths = [path]
    if not paths:
        raise FileNotFoundError("no file of that name")
    return sorted(paths)


def _is_local(fs: Any) -> bool:
    return "file" in np.atleast_1d(fs.protocol)


def _text_files(paths: list[str], *, sniff: bool) -> TextFiles:
    for path in paths if sniff else ():
        with open(path, "rb") as file:
            refuse_binary(path, file.read(SNIFFED_BYTES))
    return TextFiles(paths)


def _documents(fs: Any, path: str, kind: FileKind, config: DataConfig, *, sniff: bool) -> Documents:
    """The documents of one file; in memory where they are compressed or remote."""
    if kind.format is DataFormat.PARQUET:
        return ParquetTexts(lambda: fs.open(path, "rb"), path, config.text_field)
    if kind.format is DataFormat.JSONL and _is_local(fs) and not kind.compression:
        return JsonLines(path, config.text_field)
    with fs.open(path, "rb", compression=kind.compression or None) as file:
        if kind.format is DataFormat.JSONL:
            return LoadedTexts(list(texts_of_lines(file, path, config.text_field)))
        text = file.read()
    if sniff:
        refuse_binary(path, text[:SNIFFED_BYTES])
    return LoadedTexts([text])


def _token_shard(fs: Any, path: str) -> Tokens:
    shard: npt.NDArray[np.unsignedinteger[Any]]
    try:
        if _is_local(fs):
            shard = np.load(path, mmap_mode="r", allow_pickle=False)
        else:
            shard = np.load(io.BytesIO(fs.cat_file(path)), allow_pickle=False)
    except ValueError as error:
        raise UserError(f"token shard {path} is not a .npy array: {error}") from error
    if shard.ndim != 1 or shard.dtype not in _TOKEN_DTYPES:
        raise UserError(
            f"token shard {path} is {shard.dtype} of shape {shard.shape}: it must be a 1-D array of uint8, uint16 "
            "or uint32"
        )
    return shard
