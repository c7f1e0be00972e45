"""The dicts and lists of a state, where the paths of what they hold do not say all about them. Pure, without torch.

DCP flattens a nested state into one dict of names, and its paths know dicts with string keys and lists only. What else
there is to know, to build the same state again, is a `Container`: the types of keys, their order, a Counter, an empty
dict.
"""

from __future__ import annotations

import json
from collections.abc import Hashable
from typing import Literal

from storage.errors import Corrupt, UnsupportedValue
from storage.format.sealed import Document

Path = tuple[str | int, ...]
"""From the state's root: a string for the key of a dict (see `Container.names`), a number for a place in a list."""

Kind = Literal["dict", "OrderedDict", "Counter", "defaultdict", "list", "per_rank"]
EncodedKey = str | tuple[str, str]
_KEY_BITS_MAX = 4096  # Python writes no number of more than 4300 digits


class Container(Document):
    """One dict or list.

    `keys` are those of a dict in their order, each encoded by `encode_key`, and `names` what stands for them in paths:
    `str(key)`, as in DCP, unless two keys of the dict had the same. A list has neither. `factory` is the name of a
    defaultdict's. "per_rank" is what each rank has of its own, under its number.
    """

    path: Path
    kind: Kind
    keys: tuple[EncodedKey, ...] = ()
    names: tuple[str, ...] = ()
    factory: str | None = None


def encode_key(key: Hashable) -> EncodedKey:
    """A dict's key as JSON can carry it, its type included.

    Raises:
        UnsupportedValue: a key of another type than str, int, float, bool, None, bytes, and tuples of these.
    """
    kind = type(key)
    if kind is str:
        return str(key)
    if kind is int or kind is bool or key is None:
        return kind.__name__, str(key)
    if isinstance(key, float) and kind is float:
        return "float", key.hex()
    if isinstance(key, bytes) and kind is bytes:
        return "bytes", key.hex()
    if isinstance(key, tuple) and kind is tuple:
        return "tuple", json.dumps([encode_key(part) for part in key])
    raise UnsupportedValue(f"a key of type {kind.__qualname__}")


def decode_key(encoded: EncodedKey) -> Hashable:
    """The key that `encode_key` encoded. Raises Corrupt."""
    if isinstance(encoded, str):
        return encoded
    kind, text = encoded
    try:
        match kind:
            case "int":
                return int(text)
            case "bool":
                return {"True": True, "False": False}[text]
            case "NoneType":
                return None
            case "float":
                return float.fromhex(text)
            case "bytes":
                return bytes.fromhex(text)
            case "tuple":
                return tuple(decode_key(part if isinstance(part, str) else tuple(part)) for part in json.loads(text))
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise Corrupt(f"not a dict's key: {text[:40]!r} ({error})") from None
    raise Corrupt(f"a dict's key of unknown type {kind[:40]!r}")


def check_key(key: Hashable) -> None:
    """Raise UnsupportedValue for what cannot be a key in a checkpoint."""
    if isinstance(key, int) and key.bit_length() > _KEY_BITS_MAX:
        raise UnsupportedValue(f"a number of more than {_KEY_BITS_MAX} bits as key")
    encoded = encode_key(key)
    try:
        str(encoded).encode()
    except UnicodeEncodeError:
        raise UnsupportedValue("a key that is no valid Unicode text") from None
