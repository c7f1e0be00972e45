"""Tensors that are restored into tensors of another dtype: which changes lose nothing, or no more than is usual. Pure.

Dtypes are torch's names without prefix. Allowed unasked are changes that keep every value, and those between float32
and bfloat16, which mixed precision is made of; all others are up to the user.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from storage.errors import WrongModel

NUM_SHOWN = 5


@dataclass(frozen=True)
class _Float:
    """Binary floating point: bits of the significand, exponent of the largest number and of the smallest one."""

    num_bits: int
    exponent_max: int
    exponent_min: int

    def holds(self, other: _Float) -> bool:
        """Whether every number of the other is one of these."""
        return (
            self.num_bits >= other.num_bits
            and self.exponent_max >= other.exponent_max
            and self.exponent_min <= other.exponent_min
        )

    @property
    def largest(self) -> float:
        """About the largest number."""
        return (2 - 2.0 ** (1 - self.num_bits)) * 2.0**self.exponent_max


_FLOATS = {
    "float64": _Float(53, 1023, -1074),
    "float32": _Float(24, 127, -149),
    "float16": _Float(11, 15, -24),
    "bfloat16": _Float(8, 127, -133),
    "float8_e5m2": _Float(3, 15, -16),
    "float8_e5m2fnuz": _Float(3, 15, -17),
    "float8_e4m3fn": _Float(4, 8, -9),
    "float8_e4m3fnuz": _Float(4, 7, -10),
    "float8_e8m0fnu": _Float(1, 127, -127),
}
_PARTS = {"complex128": "float64", "complex64": "float32", "complex32": "float16"}
_INTEGERS: dict[str, tuple[int, int]] = {
    "bool": (0, 1),
    **{f"uint{bits}": (0, 2**bits - 1) for bits in (8, 16, 32, 64)},
    **{f"int{bits}": (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) for bits in (8, 16, 32, 64)},
}
_USUAL = {("float32", "bfloat16"), ("bfloat16", "float32")}


def is_allowed(stored: str, wanted: str) -> bool:
    """Whether a tensor may be restored into one of another dtype without being asked for."""
    return stored == wanted or (stored, wanted) in _USUAL or _keeps_all(stored, wanted)


def _keeps_all(stored: str, wanted: str) -> bool:
    if wanted in _PARTS:  # a real number is a complex one
        return _keeps_all(_PARTS.get(stored, stored), _PARTS[wanted])
    if stored in _INTEGERS and wanted in _INTEGERS:
        low, high = _INTEGERS[wanted]
        return bool(low <= _INTEGERS[stored][0] and _INTEGERS[stored][1] <= high)
    if wanted not in _FLOATS:
        return False
    if stored in _INTEGERS:
        num_bits = _INTEGERS[stored][1].bit_length()
        return num_bits <= _FLOATS[wanted].num_bits and num_bits <= _FLOATS[wanted].exponent_max
    return stored in _FLOATS and _FLOATS[wanted].holds(_FLOATS[stored])


def may_overflow(stored: str, wanted: str) -> bool:
    """Whether a finite number may become none."""
    of, to = _FLOATS.get(_PARTS.get(stored, stored)), _FLOATS.get(_PARTS.get(wanted, wanted))
    return to is not None and of is not None and to.largest < of.largest


@dataclass
class Casts:
    """The changes of dtype in one restore of one rank; `are_allowed`: all of them, whatever they lose.

    `keys_of`: by dtype before and after. `num_overflowed`: by key, of finite numbers that have become infinite or nan.
    """

    are_allowed: bool = False
    keys_of: dict[tuple[str, str], dict[str, None]] = field(default_factory=lambda: defaultdict(dict))
    num_overflowed: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def note(self, key: str, stored: str, wanted: str) -> None:
        """Note a tensor that is to be restored, with its dtype in the checkpoint and in the state."""
        if stored != wanted:
            self.keys_of[stored, wanted][key] = None

    def overflowed(self, key: str, number: int) -> None:
        """Count numbers of the tensor `key` that were finite, and are no more."""
        if number:
            self.num_overflowed[key] += number

    def check(self) -> None:
        """Raise WrongModel if a noted change of dtype is not allowed; to be called before anything is read."""
        refused = [
            f"{key!r} is {stored} in the checkpoint and {wanted} in the state"
            for (stored, wanted), keys in self.keys_of.items()
            if not self.are_allowed and not is_allowed(stored, wanted)
            for key in keys
        ]
        if refused:
            more = f"; and {len(refused) - NUM_SHOWN} more" if len(refused) > NUM_SHOWN else ""
            raise WrongModel(
                f"tensors would lose by a change of their dtype: {'; '.join(refused[:NUM_SHOWN])}{more}. Give the state"
                " the checkpoint's dtypes, or allow it with allow_casts=True"
            )

    def told(self) -> dict[str, object]:
        """The fields of an event about the changes; empty if all tensors have kept their dtype."""
        if not self.keys_of:
            return {}
        found: dict[str, object] = {
            "casts": {f"{stored} -> {wanted}": len(keys) for (stored, wanted), keys in self.keys_of.items()},
            "keys": [key for keys in self.keys_of.values() for key in keys][:NUM_SHOWN],
        }
        return found | ({"overflowed": dict(self.num_overflowed)} if self.num_overflowed else {})
