"""Documents of a corpus where they lie: of text on a local disk, only what is trained on is read.

Documents end to end, a zero byte behind each, are one row of byte tokens, which is read by ranges as an array is.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from elastic_moe.data.order import Int64s
from elastic_moe.errors import UserError

Bytes = npt.NDArray[np.uint8]

_NUM_OPEN_FILES = 64
_NUM_ROW_GROUPS = 2


class Documents(Protocol):
    """Some documents in their order."""

    lengths: Int64s
    """Bytes of each document."""

    def read(self, index: int, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop` of one document."""


class JoinedDocuments:
    """Documents end to end as an array of tokens, uint8: `len`, `dtype` and slices, as numpy's arrays have them."""

    dtype = np.dtype(np.uint8)
    itemsize = 1

    def __init__(self, sources: Sequence[Documents]) -> None:
        self._sources = sources
        self._firsts = np.cumsum([0, *(len(source.lengths) for source in sources)])
        lengths = [source.lengths for source in sources] or [np.empty(0, np.int64)]
        self._ends = np.cumsum(np.concatenate(lengths) + 1, dtype=np.int64)  # of each document with its zero byte

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def nbytes(self) -> int:
        return len(self)

    def __getitem__(self, which: slice) -> Bytes:
        start, stop, _ = which.indices(len(self))
        out = np.zeros(max(0, stop - start), dtype=np.uint8)
        document = int(np.searchsorted(self._ends, start, side="right"))
        at = start
        while at < stop:
            end = int(self._ends[document])
            begin = int(self._ends[document - 1]) if document else 0
            source = int(np.searchsorted(self._firsts, document, side="right")) - 1
            upto = min(stop, end - 1)  # the zero byte is there already
            if at < upto:
                text = self._sources[source].read(document - int(self._firsts[source]), at - begin, upto - begin)
                out[at - start : upto - start] = np.frombuffer(text, dtype=np.uint8)
            at, document = end, document + 1
        return out


class LoadedTexts:
    """Documents in memory."""

    def __init__(self, texts: Sequence[bytes]) -> None:
        self._texts = texts
        self.lengths = np.array([len(text) for text in texts], dtype=np.int64)

    def read(self, index: int, start: int, stop: int) -> bytes:
        return self._texts[index][start:stop]


class TextFiles:
    """Local files, a document each."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = paths
        self.lengths = np.array([Path(path).stat().st_size for path in paths], dtype=np.int64)

    def read(self, index: int, start: int, stop: int) -> bytes:
        return _opened(self._paths[index]).read(start, stop)


class JsonLines:
    """The texts in a local file of JSON objects, a line each."""

    def __init__(self, path: str, field: str) -> None:
        self._path = path
        self._field = field
        starts, stops, lengths = [], [], []
        begin = 0
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if (text := text_of_line(line, path, number, field)) is not None:
                    starts.append(begin)
                    stops.append(begin + len(line))
                    lengths.append(len(text))
                begin += len(line)
        self._starts, self._stops = np.array(starts, dtype=np.int64), np.array(stops, dtype=np.int64)
        self.lengths = np.array(lengths, dtype=np.int64)

    def read(self, index: int, start: int, stop: int) -> bytes:
        line = _opened(self._path).read(int(self._starts[index]), int(self._stops[index]))
        return str(json.loads(line)[self._field]).encode()[start:stop]


class ParquetTexts:
    """The texts in one column of a parquet file; a few of its row groups are in memory at a time."""

    def __init__(self, opened: Callable[[], Any], path: str, field: str) -> None:
        """`opened` opens the file anew, of any file system."""
        try:
            from pyarrow import ArrowException
            from pyarrow.parquet import ParquetFile
        except ImportError:
            raise UserError(
                f"data.url: {path} is a parquet file, for which pyarrow is missing: pip install pyarrow, "
                "or install elastic-moe with its extra parquet"
            ) from None
        try:
            self._file = ParquetFile(opened())
        except ArrowException as error:
            raise UserError(f"data.url: {path} is not a parquet file: {error}") from None
        if field not in self._file.schema_arrow.names:
            known = ", ".join(self._file.schema_arrow.names)
            raise UserError(f"data.url: {path} has no column {field!r}, but {known}: set data.text_field")
        self._path, self._field = path, field
        self._group = functools.lru_cache(_NUM_ROW_GROUPS)(self._read_group)
        groups = range(self._file.num_row_groups)
        per_group = [np.array([len(text) for text in self._read_group(group)], dtype=np.int64) for group in groups]
        self._firsts = np.cumsum([0, *map(len, per_group)])
        self.lengths = np.concatenate(per_group) if per_group else np.empty(0, np.int64)

    def read(self, index: int, start: int, stop: int) -> bytes:
        group = int(np.searchsorted(self._firsts, index, side="right")) - 1
        return self._group(group)[index - int(self._firsts[group])][start:stop]

    def _read_group(self, group: int) -> list[bytes]:
        texts = self._file.read_row_group(group, columns=[self._field])[self._field].to_pylist()
        for row, text in enumerate(texts):
            if not isinstance(text, str):
                raise UserError(
                    f"data.url: {self._path}, row {row} of row group {group}: {self._field!r} is "
                    f"{type(text).__name__}, not a string"
                )
        return [text.encode() for text in texts]


def text_of_line(line: bytes, path: str, number: int, field: str) -> bytes | None:
    """The text in one line of JSON; None of an empty line.

    Raises:
        UserError: it is no object with that field, or the field is no string.
    """
    if not line.strip():
        return None
    try:
        text = json.loads(line)[field]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, IndexError):
        raise UserError(f"{path}, line {number}: not a JSON object with a field {field!r}") from None
    if not isinstance(text, str):
        raise UserError(f"{path}, line {number}: field {field!r} is not a string")
    return text.encode()


def texts_of_lines(lines: Iterator[bytes], path: str, field: str) -> Iterator[bytes]:
    """Yield the texts in lines of JSON, without those of empty lines."""
    for number, line in enumerate(lines, start=1):
        if (text := text_of_line(line, path, number, field)) is not None:
            yield text


class _OpenFile:
    """A local file that is read by ranges. Not mapped: a file that is cut meanwhile would end the process by SIGBUS."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop`.

        Raises:
            UserError: the file is shorter than it was.
        """
        parts = []
        while start < stop:
            part = os.pread(self._fd, stop - start, start)
            if not part:
                raise UserError(
                    f"data.url: {self._path} has become shorter: data must not change while a job trains on it"
                )
            parts.append(part)
            start += len(part)
        return b"".join(parts)

    def __del__(self) -> None:
        os.close(self._fd)


_opened = functools.lru_cache(_NUM_OPEN_FILES)(_OpenFile)
