"""Files that are compressed by zstd, read to the end of their last frame."""

from __future__ import annotations

from typing import Any

from elastic_moe.errors import UserError

_PACKED_BYTES = 4096  # at a time: what they unfold to is not bounded otherwise, and at most 32,768 times as much


class ZstdFile:
    """A `.zst` file to read from. The reader of `zstandard` takes one that was cut off for a whole one."""

    def __init__(self, raw: Any, path: str) -> None:
        """Raises UserError where `zstandard` is missing."""
        try:
            import zstandard
        except ImportError:
            raise UserError(
                f"data.url: {path} is compressed by zstd, whose package is missing: install zstandard"
            ) from None
        self._library = zstandard
        self._raw = raw
        self._frame: Any = None
        self._packed = b""
        self._ready = bytearray()

    def read(self, size: int) -> bytes:
        """So many bytes, or what is left.

        Raises:
            OSError: it is no such file, or damaged.
            EOFError: it was cut off.
        """
        while len(self._ready) < size and self._unfold():
            pass
        found = bytes(self._ready[:size])
        del self._ready[:size]
        return found

    def _unfold(self) -> bool:
        """Unfold some more; False at the end."""
        packed, self._packed = self._packed or self._raw.read(_PACKED_BYTES), b""
        if not packed:
            if self._frame is not None:
                raise EOFError("Compressed file ended before the end of its frame was reached")
            return False
        if self._frame is None:
            self._frame = self._library.ZstdDecompressor().decompressobj()
        try:
            self._ready += self._frame.decompress(packed)
        except self._library.ZstdError as error:
            raise OSError(str(error)) from error
        if self._frame.eof:
            self._packed, self._frame = self._frame.unused_data, None
        return True
