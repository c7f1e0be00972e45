"""What a file of training data is, by its name: pure, and what is not known is refused rather than read as text."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import PurePosixPath
from typing import NamedTuple

from elastic_moe.errors import UserError

SNIFFED_BYTES = 64 << 10


class DataFormat(StrEnum):
    """What a file of training data holds."""

    TEXT = "text"
    JSONL = "jsonl"
    PARQUET = "parquet"
    TOKENS = "tokens"


class FileKind(NamedTuple):
    """A file's format, and fsspec's name of its compression; "" for none."""

    format: DataFormat
    compression: str = ""


# What begins files that are no text, though they may hold no zero byte.
_MAGIC = {
    b"\xff\xfe": "UTF-16: convert it (iconv -f utf-16 -t utf-8)",
    b"\xfe\xff": "UTF-16: convert it (iconv -f utf-16 -t utf-8)",
    b"\x1f\x8b": "compressed by gzip: give it the ending .gz",
    b"BZh91AY&SY": "compressed by bzip2: give it the ending .bz2",
    b"\xfd7zXZ\0": "compressed by xz: give it the ending .xz",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: give it the ending .zst",
    b"PAR1": "parquet: give it the ending .parquet",
    b"\x93NUMPY": "an array of numpy's: give it the ending .npy",
    b"PK\x03\x04": "an archive: unpack it",
    b"%PDF-": "a PDF: take the text out of it",
}
_COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
_FORMATS = {
    ".jsonl": DataFormat.JSONL,
    ".jsonlines": DataFormat.JSONL,
    ".ndjson": DataFormat.JSONL,
    ".npy": DataFormat.TOKENS,
    ".parquet": DataFormat.PARQUET,
    ".parq": DataFormat.PARQUET,
    ".pq": DataFormat.PARQUET,
}
_FOREIGN = {
    ".json": "is one value, not one a line: write it as .jsonl, or set data.format to 'text' for its source",
    ".bin": "may be token ids of any width: save them as .npy (numpy.save), with dtype uint8, uint16 or uint32",
    ".npz": "is an archive of arrays: save one array as .npy",
    ".arrow": "is not read: save it as .parquet or .jsonl",
    ".avro": "is not read: save it as .parquet or .jsonl",
    ".feather": "is not read: save it as .parquet or .jsonl",
    ".orc": "is not read: save it as .parquet or .jsonl",
    ".tfrecord": "is not read: save it as .parquet or .jsonl",
    ".csv": "is not read: save it as .jsonl, or set data.format to 'text' for its source",
    ".tsv": "is not read: save it as .jsonl, or set data.format to 'text' for its source",
    ".zip": "is an archive: unpack it, or name the files in it by fsspec's zip://*::URL",
    ".tar": "is an archive: unpack it, or name the files in it by fsspec's tar://*::URL",
    ".tgz": "is an archive: unpack it, or name the files in it by fsspec's tar://*::URL",
    **dict.fromkeys((".7z", ".rar"), "is an archive: unpack it"),
    **dict.fromkeys((".br", ".lz4", ".lzma", ".z"), "is compressed in a way that is not read: unpack it, or use .zst"),
    **dict.fromkeys(
        (".pt", ".pth", ".pkl", ".pickle", ".h5", ".safetensors"),
        "is not data: name text, .jsonl, .parquet or .npy files",
    ),
}


def recognise(path: str, wanted: str = "auto") -> FileKind:
    """What the file at `path` is.

    Args:
        path: of any file system.
        wanted: `data.format`; anything but "auto" decides the format, and the name the compression.

    Raises:
        UserError: it is of a kind that is not read, or that goes by different rules in different places.
    """
    # What a web address asks its server for is not of the name: `a.jsonl?download=true`.
    name = PurePosixPath(re.split("[?#]", path)[0] if path.startswith(("http://", "https://")) else path)
    compression = _COMPRESSIONS.get(name.suffix.lower(), "")
    if compression:
        name = name.with_suffix("")
    if wanted != "auto":
        kind = FileKind(DataFormat(wanted), compression)
    else:
        suffix = name.suffix.lower()
        if suffix in _FOREIGN:
            raise UserError(f"data.url: {path} {_FOREIGN[suffix]}")
        kind = FileKind(_FORMATS.get(suffix, DataFormat.TEXT), compression)
    if compression and kind.format in (DataFormat.TOKENS, DataFormat.PARQUET):
        raise UserError(f"data.url: {path} is compressed as a whole: unpack it, so that parts of it can be read")
    return kind


def refuse_binary(path: str, head: bytes) -> None:
    """Raises UserError where what goes for text by its name is none: text holds no zero byte."""
    if found := next((what for magic, what in _MAGIC.items() if head.startswith(magic)), ""):
        raise UserError(f"data.url: {path} is not text in UTF-8, it is {found}")
    if b"\0" in head:
        raise UserError(
            f"data.url: {path} is not text, it holds zero bytes: name text, .jsonl, .parquet or .npy files, or set "
            "data.format to 'text' to train on its bytes as they are"
        )
