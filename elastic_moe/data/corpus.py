"""Open a corpus as rows of tokens, of which only what is trained on is in memory.

Local text that is trained on as bytes, and local token ids, are read where they lie. Everything else becomes token ids
in a cache of the node first (`elastic_moe.data.cache`), once for all its processes and jobs.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import lzma
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from elastic_moe.data.cache import TokenCache, TokenSink, default_folder, parts_to_check
from elastic_moe.data.config import DataConfig
from elastic_moe.data.documents import JoinedArrays, TextFiles, TokenFile
from elastic_moe.data.formats import SNIFFED_BYTES, DataFormat, refuse_binary
from elastic_moe.data.order import Int64s
from elastic_moe.data.progress import ReadProgress
from elastic_moe.data.sources import (
    Piece,
    SourceFile,
    find_sources,
    pieces,
    stdlib_files,
    token_header,
)
from elastic_moe.data.stores import tells_of_a_store
from elastic_moe.data.tokenizer import FileTokenizer, Ids, TextTokenizer, TokenizerFiles, open_tokenizer
from elastic_moe.errors import UserError

log = logging.getLogger(__name__)

Tokens = npt.NDArray[np.unsignedinteger[Any]] | TextFiles | TokenFile | JoinedArrays


class TokenKind(StrEnum):
    """What the token ids of a corpus stand for."""

    BYTES = "bytes"
    TEXT = "text"  # made by the tokenizer of the job
    IDS = "ids"  # somebody has made them, by what is not known here


_FILE_BYTES = 64 << 20  # of sources that become one file of the cache, where they are smaller
_BATCH_BYTES = 4 << 20  # of text that is tokenized at once
_COPY_BYTES = 8 << 20


@dataclass(frozen=True)
class Corpus:
    """Tokens in one or more shards; a sample never reaches over the end of its shard.

    Attributes:
        shards: 1-D arrays of uint8, uint16 or uint32 token ids.
        fingerprint: hex digest of the contents; equal corpora have equal fingerprints. Another tokenizer or another
            way of packing makes it another.
        seq_len: tokens in a sample. A sample's window holds one more: the target of its last token.
        end_of_document: the token that ends documents, where attention ends with them; None where it does not.
        tokenizer: what it was tokenized by; None of bytes and of ids whose tokenizer is not known.
        tokenizer_digest: of that; "" for None.
        tokens: what its ids stand for.
    """

    shards: tuple[Tokens, ...]
    fingerprint: str
    seq_len: int
    end_of_document: int | None = None
    tokenizer: TokenizerFiles | None = None
    tokenizer_digest: str = ""
    tokens: TokenKind = TokenKind.IDS

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


def open_corpus(config: DataConfig, seq_len: int, vocab_size: int | None = None) -> Corpus:
    """Read, or map, the corpus that `config` names.

    Args:
        vocab_size: of the model, which must have every token; None leaves it open.

    Raises:
        UserError: there is nothing to read, it is not what `format` says, it is shorter than one sample, or its
            tokenizer has tokens that the model has not.
    """
    tokenizer = open_tokenizer(config)
    if vocab_size is not None and isinstance(tokenizer, FileTokenizer) and tokenizer.num_tokens > vocab_size:
        raise UserError(
            f"data.tokenizer {config.tokenizer} has {tokenizer.num_tokens} tokens and model.vocab_size is {vocab_size}:"
            f" set model.vocab_size to {tokenizer.num_tokens} or more"
        )
    try:
        shards, holds_ids = _shards(config, tokenizer)
    except FileNotFoundError as error:  # of a store it says the name alone
        raise UserError(f"data.url {config.url!r} cannot be read, there is no such file: {error}") from error
    except (OSError, EOFError, ImportError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"data.url {config.url!r} cannot be read: {' '.join(str(error).split())}") from error
    except Exception as error:
        # ValueError is fsspec's answer to a protocol that it does not know.
        if not isinstance(error, ValueError) and (isinstance(error, UserError) or not tells_of_a_store(error)):
            raise
        raise UserError(f"data.url {config.url!r}: {' '.join(str(error).split()) or type(error).__name__}") from error
    if not holds_ids and config.tokenizer is None and config.end_of_document:
        raise UserError(
            f"data.end_of_document = {config.end_of_document}, and text that is read as bytes ends its documents by 0:"
            " leave it out, or set data.tokenizer"
        )
    if vocab_size is not None and (holds_ids or not tokenizer.digest):
        _check_vocabulary(shards, vocab_size)
    end = None
    if config.document_mask:
        end = _end_of_document(config, tokenizer, holds_ids=holds_ids)
        _check_end(end, shards, vocab_size)
    digest = fingerprint(shards)
    if tokenizer.digest or end is not None:
        digest = hashlib.sha256(f"{digest} {tokenizer.digest} {end}".encode()).hexdigest()
    files = tokenizer.files if isinstance(tokenizer, FileTokenizer) else None
    kind = TokenKind.IDS if holds_ids else TokenKind.BYTES
    kind = TokenKind.TEXT if tokenizer.digest else kind
    corpus = Corpus(tuple(shards), digest, seq_len, end, files, tokenizer.digest, kind)
    if corpus.num_samples == 0:
        raise UserError(
            f"data.url {config.url!r} holds {corpus.num_tokens} tokens, less than one sample of "
            f"train.seq_len {seq_len} and its last target: use more data or shorter sequences"
        )
    return corpus


def fingerprint(shards: Sequence[Tokens]) -> str:
    """SHA-256 over types, lengths and contents; of the contents of very large shards, pages spread over them."""
    digest = hashlib.sha256()
    for shard in shards:
        digest.update(f"{shard.dtype.str} {len(shard)}\n".encode())
        for part in parts_to_check(shard):
            digest.update(part.data)
    return digest.hexdigest()


def _shards(config: DataConfig, tokenizer: TextTokenizer) -> tuple[list[Tokens], bool]:
    """The rows of a corpus, and whether its files hold token ids already."""
    if config.url == "stdlib" and not tokenizer.digest:
        return [TextFiles([str(path) for path in stdlib_files()])], False
    sources = find_sources(config)
    first = sources[0]
    if first.kind.format is DataFormat.TOKENS:
        if first.is_local:
            return [_local_tokens(source.path) for source in sources], True
        return list(_cached([[source] for source in sources], config, tokenizer)), True
    in_place = first.kind.format is DataFormat.TEXT and first.is_local and not tokenizer.digest
    if in_place and not any(source.kind.compression for source in sources):
        return [_text_files(sources, sniff=config.format == "auto")], False
    parts = _cached(_grouped(sources), config, tokenizer)
    return [parts[0] if len(parts) == 1 else JoinedArrays(parts)], False


def _end_of_document(config: DataConfig, tokenizer: TextTokenizer, *, holds_ids: bool) -> int:
    if not holds_ids or config.tokenizer is not None:
        return tokenizer.end_of_document
    if not isinstance(config.end_of_document, int):
        raise UserError(
            "data.document_mask = true needs to know which token ends a document: set data.end_of_document to its id, "
            "or data.tokenizer"
        )
    return config.end_of_document


def _check_vocabulary(shards: Sequence[Tokens], vocab_size: int) -> None:
    """Raises UserError where the model lacks a token of the data, as far as they are looked at: before a step is done,
    for the one that finds it later is lost with all since the last checkpoint.
    """
    for shard in shards:
        if vocab_size > np.iinfo(shard.dtype).max:
            continue
        highest = max((int(part.max()) for part in parts_to_check(shard) if len(part)), default=0)
        if highest >= vocab_size:
            raise UserError(
                f"the data holds token {highest} but model.vocab_size is {vocab_size}: raise it above the token"
            )


def _check_end(end: int, shards: Sequence[Tokens], vocab_size: int | None) -> None:
    """Raises UserError where the model has no token that ends documents; warns where the data seem to have none."""
    if vocab_size is not None and end >= vocab_size:
        raise UserError(
            f"data.end_of_document is {end} and model.vocab_size is {vocab_size}: it is no token of the model"
        )
    if not any((part == end).any() for shard in shards for part in parts_to_check(shard)):
        log.warning("data: no token %d, which ends documents, was found: data.document_mask keeps nothing apart", end)


def _text_files(sources: Sequence[SourceFile], *, sniff: bool) -> TextFiles:
    paths = [source.path for source in sources]
    for path in paths if sniff else ():
        with open(path, "rb") as file:
            refuse_binary(path, file.read(SNIFFED_BYTES))
    return TextFiles(paths)


def _local_tokens(path: str) -> Tokens:
    with open(path, "rb") as file:  # not `np.load`, which would advise to unpickle what is no array
        dtype, count = token_header(file, path)
        begin, size = file.tell(), os.fstat(file.fileno()).st_size
    if lacking := max(0, begin + count * dtype.itemsize - size):
        raise _too_short(path, lacking)
    return TokenFile(path, dtype, begin, count)


def _grouped(sources: Sequence[SourceFile]) -> list[list[SourceFile]]:
    """Consecutive small files together: a group is what a process of several makes at a time, and not again."""
    groups: list[list[SourceFile]] = []
    room = 0
    for source in sources:
        if not groups or source.num_bytes > room:
            groups.append([])
            room = _FILE_BYTES
        groups[-1].append(source)
        room -= source.num_bytes
    return groups


def _cached(groups: list[list[SourceFile]], config: DataConfig, tokenizer: TextTokenizer) -> list[Ids]:
    """Token ids of each group of files, by way of the node's cache."""
    progress = ReadProgress(config.url, sum(source.num_bytes for group in groups for source in group))
    folder = Path(config.cache) if config.cache is not None else default_folder(os.environ)
    cache = TokenCache(folder, round(config.cache_gib * (1 << 30)))
    keys = [_key(group, config, tokenizer) for group in groups]
    makes = [functools.partial(_write_group, group, config, tokenizer, progress) for group in groups]
    found = cache.arrays(dict(zip(keys, makes, strict=True)))
    progress.close()
    return [found[key] for key in keys]


def _key(group: Sequence[SourceFile], config: DataConfig, tokenizer: TextTokenizer) -> str:
    how = [tokenizer.digest, config.format, config.text_field]
    return hashlib.sha256("\n".join([*how, *(source.identity for source in group)]).encode()).hexdigest()[:40]


def _write_group(
    group: Sequence[SourceFile], config: DataConfig, tokenizer: TextTokenizer, progress: ReadProgress, sink: TokenSink
) -> None:
    number = 0  # of the piece, in the whole group
    for source in group:
        if source.kind.format is DataFormat.TOKENS:
            _copy_tokens(source, progress, sink)
            continue
        sink.append(np.empty(0, tokenizer.dtype))  # the type of a file without documents
        waiting: list[Piece] = []
        num_bytes = 0
        for piece in pieces(source, config, progress):
            number += 1
            if number <= sink.done:
                continue
            waiting.append(piece)
            num_bytes += len(piece.text)
            if num_bytes >= _BATCH_BYTES:
                _tokenize(waiting, f"data.url {source.path}", tokenizer, sink)
                sink.mark(number)
                waiting, num_bytes = [], 0
        _tokenize(waiting, f"data.url {source.path}", tokenizer, sink)
        sink.mark(number)


def _tokenize(batch: list[Piece], origin: str, tokenizer: TextTokenizer, sink: TokenSink) -> None:
    end = np.array([tokenizer.end_of_document], dtype=tokenizer.dtype)
    for piece, ids in zip(batch, tokenizer.encode([piece.text for piece in batch], origin), strict=True):
        sink.append(ids)
        if piece.is_last:
            sink.append(end)


def _copy_tokens(source: SourceFile, progress: ReadProgress, sink: TokenSink) -> None:
    with source.fs.open(source.path, "rb") as file:
        dtype, count = token_header(file, source.path)
        sink.append(np.empty(0, dtype))
        left = (count - sink.done) * dtype.itemsize
        if sink.done:
            file.seek(sink.done * dtype.itemsize, os.SEEK_CUR)
        rest = b""
        while left and (part := file.read(min(left, _COPY_BYTES))):
            left -= len(part)
            progress.add(len(part))
            part = rest + part
            whole = len(part) - len(part) % dtype.itemsize
            sink.append(np.frombuffer(part[:whole], dtype))
            rest = part[whole:]
            sink.mark(count - (left + len(rest)) // dtype.itemsize)
    if left:
        raise _too_short(source.path, left)


def _too_short(path: str, num_bytes: int) -> UserError:
    return UserError(f"token shard {path} is not a .npy array: it is {num_bytes} bytes shorter than it says")
