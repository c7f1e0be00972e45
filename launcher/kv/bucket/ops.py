"""What clients want changed, as plain data: so another client can write it in the same version as its own. Pure."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from launcher.kv.base import Entry
from launcher.kv.state import State

WISH = "wish/"
TURN = "turn/"
_TELLS, _PART_SIZE_BYTES = "~", 200  # gateways whose objects are files take 255 a part


@dataclass(frozen=True)
class PutKey:
    """Write a key, as `KV.put`; under a lease unless `lease_id` is 0.

    `grant_ttl_s`: the lease is granted along with it, if it is written. 0: there is one, or there was.
    """

    key: str
    value: bytes
    if_revision: int | None = None
    lease_id: int = 0
    grant_ttl_s: float = 0.0


@dataclass(frozen=True)
class DeleteKey:
    """Delete a key, as `KV.delete`."""

    key: str
    if_revision: int | None = None


@dataclass(frozen=True)
class GrantLease:
    """Grant a lease, whose id nobody else has used."""

    lease_id: int
    ttl_s: float


@dataclass(frozen=True)
class EndLease:
    """End a lease, with every key under it."""

    lease_id: int


Op = PutKey | DeleteKey | GrantLease | EndLease
Result = tuple[int, int] | bool | None
"""Of a put the revision and the create revision, or None; of a deletion whether it was one."""


def carry_out(op: Op, state: State) -> Result:
    """Do it to `state`, or find that it must not be done."""
    match op:
        case PutKey(key, value, if_revision, lease_id, grant_ttl_s):
            current = state.get(key)
            if if_revision is not None and (current.revision if current else 0) != if_revision:
                return None
            if grant_ttl_s:
                state.adopt(lease_id, grant_ttl_s)
            written = state.put(key, value, if_revision, lease_id or None)
            return (written.revision, written.create_revision) if written else None
        case DeleteKey(key, if_revision):
            return state.delete(key, if_revision)
        case GrantLease(lease_id, ttl_s):
            state.adopt(lease_id, ttl_s)
        case EndLease(lease_id):
            state.revoke(lease_id)
    return None


def entry_of(op: PutKey, result: Result) -> Entry | None:
    """What `KV.put` returns."""
    return Entry(op.key, op.value, *result) if isinstance(result, tuple) else None


@dataclass(frozen=True)
class Wish:
    """Changes that a client wants, for whoever writes a version next.

    They may go into versions `base` + 1 to `base` + `WINDOW`, and into none later: so what was granted need be
    remembered for as long, and a wish that comes to light again after days is void.
    """

    name: str
    base: int
    ops: tuple[Op, ...]

    WINDOW = 32

    @property
    def until(self) -> int:
        """The last version that may have it."""
        return self.base + self.WINDOW

    def to_object(self, name_size_bytes_max: int) -> tuple[str, bytes]:
        """The name and the content of the object that holds it: a name that tells all, if one so long may, so that who
        lists the wishes need not read each."""
        packed = base64.urlsafe_b64encode(zlib.compress(self._told())).decode().rstrip("=")
        parts = [packed[at : at + _PART_SIZE_BYTES] for at in range(0, len(packed), _PART_SIZE_BYTES)]
        name = f"{self.name}{_TELLS}{'/'.join(parts)}"
        return (name, b"") if len(name.encode()) <= name_size_bytes_max else (self.name, self.to_bytes())

    @classmethod
    def from_name(cls, name: str) -> Wish | None:
        """Read a wish whose object's name tells it; None of one that does not.

        Raises:
            ValueError: it is none.
        """
        name, tells, packed = name.partition(_TELLS)
        if not tells:
            return None
        try:
            packed = packed.replace("/", "")
            body = zlib.decompress(base64.urlsafe_b64decode(packed + "=" * (-len(packed) % 4)))
        except (ValueError, zlib.error) as error:
            raise ValueError(f"{name} is no wish: {error!r}") from error
        return cls._read(name, body)

    def _told(self) -> bytes:
        return json.dumps([self.base, [_told(op) for op in self.ops]], separators=(",", ":")).encode()

    def to_bytes(self) -> bytes:
        """JSON in UTF-8 after its CRC32."""
        body = self._told()
        return b"%08x " % zlib.crc32(body) + body

    @classmethod
    def from_bytes(cls, name: str, content: bytes) -> Wish:
        """Read a wish.

        Raises:
            ValueError: it is none.
        """
        told_sum, _, body = content.partition(b" ")
        try:
            if int(told_sum, 16) != zlib.crc32(body):
                raise ValueError("its checksum does not match")
        except ValueError as error:
            raise ValueError(f"{name} is no wish: {error!r}") from error
        return cls._read(name, body)

    @classmethod
    def _read(cls, name: str, body: bytes) -> Wish:
        try:
            base, ops = json.loads(body)
            return cls(name, int(base), tuple(map(_op, ops)))
        except (ValueError, LookupError, TypeError, ArithmeticError, RecursionError) as error:
            raise ValueError(f"{name} is no wish: {error!r}") from error


def wish_name(nonce: str) -> str:
    """What a wish is called: its object's name, or the start of it."""
    return f"{WISH}{nonce}"


def turn_name(number: int, attempt: int = 0) -> str:
    """The object whose author writes version `number` for all who wish; the others wait for it, and not for long.

    `attempt`: how many are thought to have had this turn, and to be gone.
    """
    return f"{TURN}{number:016d}" + (f".{attempt}" if attempt else "")


def _told(op: Op) -> list[Any]:
    match op:
        case PutKey(key, value, if_revision, lease_id, grant_ttl_s):
            return ["put", key, _text(value), if_revision, lease_id, grant_ttl_s]
        case DeleteKey(key, if_revision):
            return ["delete", key, if_revision]
        case GrantLease(lease_id, ttl_s):
            return ["grant", lease_id, ttl_s]
        case EndLease(lease_id):
            return ["end", lease_id]


def _text(value: bytes) -> list[str]:
    """As text where it is some, which compresses well."""
    try:
        return [value.decode()]
    except UnicodeDecodeError:
        return ["", base64.b64encode(value).decode()]


def _value(told: Sequence[Any]) -> bytes:
    match told:
        case [str(text)]:
            return text.encode()
        case ["", str(text)]:
            return base64.b64decode(text, validate=True)
    raise ValueError(f"no value: {told!r}")


def _op(told: Sequence[Any]) -> Op:
    match told:
        case ["put", str(key), [*value], int() | None as if_revision, int(lease_id), int() | float() as ttl_s]:
            return PutKey(key, _value(value), if_revision, lease_id, ttl_s)
        case ["delete", str(key), int() | None as if_revision]:
            return DeleteKey(key, if_revision)
        case ["grant", int(lease_id), int() | float() as ttl_s]:
            return GrantLease(lease_id, ttl_s)
        case ["end", int(lease_id)]:
            return EndLease(lease_id)
    raise ValueError(f"no change: {told!r}")
