"""JSON documents that notice a flipped byte.

A sealed document is one line, ``{"crc32c":"1a2b3c4d","<kind>":BODY}``: plain JSON for any reader, and CRC32C over
the exact bytes of BODY, so every byte of the file is either checked by value or covered by the checksum.
"""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from storage.errors import Corrupt
from storage.format.checksum import crc32c


class Document(BaseModel):
    """Base of what is stored as a sealed document: frozen, without unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)


D = TypeVar("D", bound=Document)


def seal(kind: str, document: Document) -> bytes:
    """The bytes of the sealed document."""
    # bytes at once: `model_dump_json` would go through a str
    return seal_bytes(kind, TypeAdapter(type(document)).dump_json(document))


def seal_bytes(kind: str, body: bytes) -> bytes:
    """The bytes of a sealed document whose JSON is `body`."""
    return b"".join((_head(kind, crc32c(body)), body, b"}\n"))


def unseal(kind: str, model: type[D], data: bytes, name: str) -> D:
    """The document in `data`; `name` is for messages. Raises Corrupt."""
    body = check_seal(kind, data, name)
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "document"
        raise Corrupt(f"{name}: {where}: {first['msg']}") from None


def check_seal(kind: str, data: bytes, name: str) -> bytes:
    """The body of a sealed document whose checksum is right. Raises Corrupt."""
    head_length = len(_head(kind, 0))
    body = data[head_length:-2]
    if len(data) < head_length + 2 or data[-2:] != b"}\n" or data[:head_length] != _head(kind, crc32c(body)):
        raise Corrupt(f"{name} is damaged: its checksum does not match")
    return body


def _head(kind: str, crc: int) -> bytes:
    return f'{{"crc32c":"{crc:08x}","{kind}":'.encode()
