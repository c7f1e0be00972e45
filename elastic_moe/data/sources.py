"""The files of a corpus, and the documents in them as they come: no more of a file is in memory than a part."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import fsspec
import numpy as np
from fsspec.compression import compr

from elastic_moe.data.config import DataConfig
from elastic_moe.data.formats import SNIFFED_BYTES, DataFormat, FileKind, recognise, refuse_binary
from elastic_moe.data.progress import ReadProgress
from elastic_moe.data.zstd import ZstdFile
from elastic_moe.errors import UserError

log = logging.getLogger(__name__)

# Of the standard library: what distributions strip or move, so that machines with one Python version agree.
_STDLIB_EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "ensurepip", "turtledemo"}
# What file systems say of a file that another version of it would not have.
_VERSION_KEYS = (
    "etag",
    "md5hash",
    "content-md5",
    "generation",
    "mtime",
    "lastmodified",
    "last_modified",
    "created",
    "crc",
)
_PART_BYTES = 1 << 20
_MAX_LINE_BYTES = 256 << 20
_SILENCE_S = 60.0  # of a web server's
_ROWS = 512


@dataclass(frozen=True)
class SourceFile:
    """A file of a corpus.

    Attributes:
        fs: its fsspec file system.
        num_bytes: as it lies there, compressed or not.
        identity: changes with its content, as far as the file system tells.
        has_ranges: whether parts of it can be asked for; of a web server's that does not say so it is read in one go.
    """

    fs: Any
    path: str
    kind: FileKind
    num_bytes: int
    identity: str
    has_ranges: bool = True

    def open(self) -> Any:
        """The file, to be read from its beginning to its end."""
        return self.fs.open(self.path, "rb", **({} if self.has_ranges else {"block_size": 0}))

    @property
    def is_local(self) -> bool:
        """Whether `path` is one that the system knows."""
        return "file" in np.atleast_1d(self.fs.protocol)


class Piece(NamedTuple):
    """Text of a document, all of it or what a part of it holds up to the end of a line."""

    text: bytes
    is_last: bool


def find_sources(config: DataConfig) -> list[SourceFile]:
    """The files of `data.url`, in the order of their names.

    Raises:
        UserError: there are none, or they are not of one kind that is read.
        OSError, ValueError: the file system's.
    """
    if config.url == "stdlib":
        fs = fsspec.filesystem("file")
        found = {str(path): fs.info(str(path)) for path in stdlib_files()}
        return [_source(fs, path, info, FileKind(DataFormat.TEXT)) for path, info in found.items()]
    fs, path = fsspec.core.url_to_fs(config.url, **_patience(config.url))
    found = _expand(fs, path)
    kinds = {path: recognise(path, config.format) for path in found}
    of_format = {kind.format: path for path, kind in kinds.items()}
    if len(of_format) > 1:
        named = " and ".join(f"{name} ({PurePosixPath(of_format[name]).name})" for name in sorted(of_format))
        raise UserError(
            f"data.url {config.url!r} mixes {named} files: name one kind of them, as by a pattern (*.jsonl)"
        )
    # A listing of the web is names alone, of files that may have changed.
    infos = {path: info if info.get("size") is not None else fs.info(path) for path, info in found.items()}
    return [_source(fs, path, infos[path], kinds[path]) for path in sorted(found)]


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


def pieces(source: SourceFile, config: DataConfig, progress: ReadProgress) -> Iterator[Piece]:
    """Yield the documents of a file of text, JSON lines, or parquet.

    Raises:
        UserError: it is not what it goes for.
        OSError, EOFError, ImportError, zlib.error, lzma.LZMAError: it cannot be read.
    """
    if source.kind.format is DataFormat.PARQUET:
        yield from _rows(source, config.text_field, progress)
        return
    with source.open() as raw:
        file = _unpacked(raw, source)
        counted = 0
        read = _lines(file, source.path, config.text_field) if source.kind.format is DataFormat.JSONL else _text(file)
        for number, piece in enumerate(read):
            if not number and source.kind.format is DataFormat.TEXT and config.format == "auto":
                refuse_binary(source.path, piece.text[:SNIFFED_BYTES])
            yield piece
            progress.add(raw.tell() - counted)
            counted = raw.tell()


def text_of_line(line: bytes, path: str, number: int, field: str) -> bytes | None:
    """The text in one line of JSON; None of an empty line.

    Raises:
        UserError: it is no object with that field, or the field is no string.
    """
    if not line.strip():
        return None
    try:
        text = json.loads(line)[field]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        raise UserError(f"{path}, line {number}: not a JSON object with a field {field!r}") from None
    return _encoded(text, f"{path}, line {number}: field {field!r}")


def token_header(file: Any, path: str) -> tuple[np.dtype[Any], int]:
    """Type and length of the array in a `.npy` file that is read from its beginning; what follows are its bytes.

    Raises:
        UserError: it is not a row of token ids.
    """
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    except ValueError as error:
        raise UserError(f"token shard {path} is not a .npy array: {error}") from error
    check_tokens(dtype, shape, path)
    return dtype, shape[0]


def check_tokens(dtype: np.dtype[Any], shape: tuple[int, ...], path: str) -> None:
    """Raises UserError where an array is not a row of token ids."""
    if len(shape) != 1 or shape[0] < 0 or dtype not in (np.uint8, np.uint16, np.uint32):
        raise UserError(
            f"token shard {path} is {dtype} of shape {shape}: it must be a 1-D array of uint8, uint16 or uint32"
        )


def _patience(url: str) -> dict[str, Any]:
    """Options of fsspec's for the web: aiohttp gives a file five minutes in all, also one that is read in one go.

    What fsspec's own configuration says (headers, by `FSSPEC_HTTPS` say) stays.
    """
    if not url.startswith(("http://", "https://")):
        return {}
    from aiohttp import ClientTimeout

    known = {name: value for scheme in ("http", "https") for name, value in _client_options(scheme).items()}
    timeout = ClientTimeout(total=None, sock_connect=_SILENCE_S, sock_read=_SILENCE_S)
    return {"client_kwargs": {"timeout": timeout, **known}}


def _client_options(scheme: str) -> dict[str, Any]:
    found = fsspec.config.conf.get(scheme, {}).get("client_kwargs")
    return found if isinstance(found, dict) else {}


def _expand(fs: Any, path: str) -> dict[str, Any]:
    is_pattern = any(sign in path for sign in "*?[") and not fs.exists(path)  # names may have such signs
    if is_pattern:
        found = {path: info for path, info in fs.glob(path, detail=True).items() if info["type"] != "directory"}
    elif fs.isdir(path):
        found = fs.find(path, detail=True)
        hidden = {each for each in found if _is_hidden(each, path)}
        if hidden:
            log.info(
                "data: %d files whose names begin with '.' or '_' are left out, such as %s", len(hidden), min(hidden)
            )
        found = {each: info for each, info in found.items() if each not in hidden}
    else:
        found = {path: fs.info(path)}
    if not found:
        raise UserError(f"data.url: no file {'is named like' if is_pattern else 'to read is in'} {path}")
    return found


def _is_hidden(path: str, folder: str) -> bool:
    """What a folder holds beside its data, by the rule of those who write such folders (Hive, Spark, Arrow)."""
    within = PurePosixPath(path.removeprefix(folder.rstrip("/"))).parts
    return any(part[0] in "._" for part in within if part != "/")


def _source(fs: Any, path: str, info: dict[str, Any], kind: FileKind) -> SourceFile:
    told = {key.lower(): value for key, value in info.items()}
    versions = [f"{key}={told[key]}" for key in _VERSION_KEYS if told.get(key) is not None]
    if info.get("islink") and not os.path.exists(path):
        raise UserError(
            f"data.url: {path} is a link to {info.get('destination')!r}, which is not there: remove the link"
        )
    if info.get("type") == "other":  # a pipe would be waited for
        raise UserError(
            f"data.url: {path} is neither a file nor a folder; a link to a folder within a folder is not followed"
        )
    if not versions:
        log.info("data: %s does not say when it was changed: it counts as the same while its size is", path)
    content = "\n".join([f"{np.atleast_1d(fs.protocol)[0]}://{path}", str(info.get("size")), *versions])
    has_ranges = "https" not in np.atleast_1d(fs.protocol) or info.get("partial") is True
    identity = hashlib.sha256(content.encode()).hexdigest()
    return SourceFile(fs, path, kind, int(info.get("size") or 0), identity, has_ranges)


def _unpacked(raw: Any, source: SourceFile) -> Any:
    if not source.kind.compression:
        return raw
    if source.kind.compression == "zstd":
        return ZstdFile(raw, source.path)
    return compr[source.kind.compression](raw, mode="rb")


def _text(file: Any) -> Iterator[Piece]:
    """A text in parts that end with a line, as far as there are lines."""
    kept = b""
    while part := file.read(_PART_BYTES):
        text = kept + part
        cut = text.rfind(b"\n") + 1 or (_whole_characters(text) if len(text) >= _PART_BYTES * 4 else 0)
        kept = text[cut:]
        if cut:
            yield Piece(text[:cut], is_last=False)
    yield Piece(kept, is_last=True)


def _whole_characters(text: bytes) -> int:
    """How many bytes of UTF-8 end with a whole character."""
    for back in range(1, 5):
        if text[-back] & 0xC0 != 0x80:  # where the last character begins
            return len(text) - back
    return len(text)


def _lines(file: Any, path: str, field: str) -> Iterator[Piece]:
    for number, line in enumerate(_split_lines(file, path), start=1):
        if (text := text_of_line(line, path, number, field)) is not None:
            yield Piece(text, is_last=True)


def _split_lines(file: Any, path: str) -> Iterator[bytes]:
    """Lines of bounded length, which remote files' own `readline` does not bound."""
    kept: list[bytes] = []
    num_kept = 0
    while part := file.read(_PART_BYTES):
        *ended, rest = part.split(b"\n")
        for line in ended:
            yield b"".join((*kept, line))
            kept, num_kept = [], 0
        kept.append(rest)
        num_kept += len(rest)
        if num_kept > _MAX_LINE_BYTES:
            raise UserError(f"data.url: {path} has a line of more than {_MAX_LINE_BYTES >> 20} MiB: is it JSON lines?")
    yield b"".join(kept)


def _rows(source: SourceFile, field: str, progress: ReadProgress) -> Iterator[Piece]:
    path = source.path
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(
            f"data.url: {path} is a parquet file, for which pyarrow is missing: pip install pyarrow, "
            "or install elastic-moe with its extra parquet"
        ) from None
    with source.fs.open(path, "rb") as raw:
        try:
            file = ParquetFile(raw)
            if field not in file.schema_arrow.names:
                known = ", ".join(file.schema_arrow.names)
                raise UserError(f"data.url: {path} has no column {field!r}, but {known}: set data.text_field")
            row, per_row = 0, source.num_bytes / max(1, file.metadata.num_rows)
            for batch in file.iter_batches(batch_size=_ROWS, columns=[field]):
                for text in batch.column(0).to_pylist():
                    yield Piece(_encoded(text, f"data.url: {path}, row {row}: {field!r}"), is_last=True)
                    row += 1
                progress.add(round(batch.num_rows * per_row))
        except ArrowException as error:
            why = " ".join(str(error).split())
            raise UserError(f"data.url: {path} is not a parquet file: {why}") from None


def _encoded(text: Any, origin: str) -> bytes:
    if not isinstance(text, str):
        raise UserError(f"{origin} is {type(text).__name__}, not a string")
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{origin} has half of a character (a lone surrogate): mend the text") from None
