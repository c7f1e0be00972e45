"""The ids of a claim's attempts to save: each says whose it is, and how many that claim had made before. Pure.

Whoever cleans up after one of them so knows without asking which others of its own may still be under way: a
worker begins the next save while its service commits this one.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Collection
from dataclasses import dataclass

_NUM_TOKEN_DIGITS = 16
_ID = re.compile(r"([0-9a-f]{16})-([0-9a-f]{8})-[0-9a-f]{16}(?:-[0-9a-f]{1,3})?")
_NUMBER_LIMIT = 1 << 32


@dataclass(frozen=True, order=True)
class AttemptNumber:
    """Which attempt of which claim an id stands for."""

    claim: str
    number: int

    @classmethod
    def parse(cls, attempt: str) -> AttemptNumber | None:
        """What an id says; None for one that no claim has made (of `ShardWriter`, or of an older version)."""
        match = _ID.fullmatch(attempt)
        return cls(match[1], int(match[2], 16)) if match else None


def new_id(token: str, number: int, unique: Callable[[], uuid.UUID] = uuid.uuid4) -> str:
    """The id of attempt `number` (from 0) of the claim with that `token`."""
    return f"{token[:_NUM_TOKEN_DIGITS]}-{number % _NUMBER_LIMIT:08x}-{unique().hex[:16]}"


def live_beside(attempt: str, seen: Collection[str], adopted: Collection[str] = ()) -> set[str]:
    """Which of the attempts `seen` may be under way while `attempt` is being cleaned up after.

    Those are it and what its claim has begun since (a claim's saves end in the order in which they began), and
    those `adopted` by its claim. Pure.
    """
    mine = AttemptNumber.parse(attempt)
    live = {attempt, *(set(adopted) & set(seen))}
    for other in seen:
        found = AttemptNumber.parse(other)
        if mine is not None and found is not None and found.claim == mine.claim and found.number >= mine.number:
            live.add(other)
    return live
