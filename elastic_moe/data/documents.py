"""Rows of tokens that lie in pieces or in files: local text and ids that are read by ranges, and arrays end to end.

All have what numpy's arrays have of a row: `len`, `dtype` and slices.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from elastic_moe.data.tokenizer import Ids
from elastic_moe.errors import UserError

log = logging.getLogger(__name__)

Bytes = npt.NDArray[np.uint8]

_NUM_OPEN_FILES = 64
_told_of: set[str] = set()
"""The files that were written meanwhile, as was told. Where there are many, each is opened again and again."""


class TextFiles:
    """Local files where they lie, a document each, as byte tokens with a zero byte behind each document."""

    dtype = np.dtype(np.uint8)
    itemsize = 1

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = paths
        found = np.array([_size_and_time(path) for path in paths], dtype=np.int64).reshape(-1, 2)
        self._ends = np.cumsum(found[:, 0] + 1, dtype=np.int64)  # of each document with its zero byte
        self._written_ns = found[:, 1].copy()

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
            upto = min(stop, end - 1)  # the zero byte is there already
            if at < upto:
                file = _opened(self._paths[document], int(self._written_ns[document]))
                text = file.read(at - begin, upto - begin)
                out[at - start : upto - start] = np.frombuffer(text, dtype=np.uint8)
            at, document = end, document + 1
        return out


class TokenFile:
    """Token ids in a local file where they lie."""

    def __init__(self, path: str, dtype: np.dtype[Any], begin: int, count: int) -> None:
        """Args:
        begin: the byte at which they begin.
        count: how many they are.
        """
        self._path = path
        self._begin = begin
        self._count = count
        self._written_ns = _size_and_time(path)[1]
        self.dtype = dtype
        self.itemsize = dtype.itemsize

    def __len__(self) -> int:
        return self._count

    @property
    def nbytes(self) -> int:
        return self._count * self.itemsize

    def __getitem__(self, which: slice) -> Ids:
        start, stop, _ = which.indices(self._count)
        if stop <= start:
            return np.empty(0, self.dtype)
        at = (self._begin + index * self.itemsize for index in (start, stop))
        return np.frombuffer(_opened(self._path, self._written_ns).read(*at), dtype=self.dtype)


class JoinedArrays:
    """Arrays of one type end to end."""

    def __init__(self, parts: Sequence[Ids]) -> None:
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        self.dtype: np.dtype[Any] = parts[0].dtype
        self.itemsize = self.dtype.itemsize

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def nbytes(self) -> int:
        return len(self) * self.itemsize

    def __getitem__(self, which: slice) -> Ids:
        start, stop, _ = which.indices(len(self))
        found = []
        part = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            begin = int(self._ends[part - 1]) if part else 0
            found.append(self._parts[part][start - begin : stop - begin])
            start, part = int(self._ends[part]), part + 1
        return np.concatenate(found) if found else np.empty(0, self.dtype)


class _OpenFile:
    """A local file that is read by ranges. Not mapped: a file that is cut meanwhile would end the process by SIGBUS."""

    def __init__(self, path: str, written_ns: int) -> None:
        """`written_ns`: when it was written last."""
        self._path = path
        self._written_ns = written_ns
        self._fd = -1
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise UserError(
                f"data.url: {path} is there no more: data must not change while a job trains on it"
            ) from None

    def read(self, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop`. Tells, once, of a file that was written meanwhile.

        Raises:
            UserError: the file is shorter than it was.
        """
        if self._path not in _told_of and os.fstat(self._fd).st_mtime_ns != self._written_ns:
            _told_of.add(self._path)
            log.warning(
                "data: %s was written while the job trains on it: its samples may be others now, and the next "
                "start refuses them without data.may_change",
                self._path,
            )
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
        if self._fd >= 0:
            os.close(self._fd)


def _size_and_time(path: str) -> tuple[int, int]:
    """How long a file is, and when it was written last, in nanoseconds."""
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns


_opened = functools.lru_cache(_NUM_OPEN_FILES)(_OpenFile)
