"""Ranks that succeed or fail together: one answer, or one error, on all of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TypeVar

from storage import errors
from storage.errors import Corrupt, PeerFailed, StorageError
from storage.ranks.group import Group

T = TypeVar("T")
_LAST = {Corrupt.__name__: 1, PeerFailed.__name__: 2}
"""The errors that are raised only if no rank has another, in this order."""


class Dumpable(Protocol):
    """An object that can be sent to other ranks."""

    def dump(self) -> bytes:
        """Everything that another process needs to have the same."""


S = TypeVar("S", bound=Dumpable)


@dataclass(frozen=True, slots=True)
class Failure:
    """What the other ranks hear of an error: the name of its class, and one line."""

    kind: str
    text: str

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """What to tell of `error`; the class of another package's error is part of the line."""
        kind = type(error).__name__
        return cls(kind, str(error) if isinstance(error, StorageError) else f"{kind}: {error}")

    def error(self, where: str = "") -> StorageError:
        """Make the error again on another rank, with `where` before its line; a StorageError for another package's."""
        found = getattr(errors, self.kind, None)
        kind = found if isinstance(found, type) and issubclass(found, StorageError) else StorageError
        return kind(where + self.text)


class AgreeingGroup(Group):
    """A group whose members never go different ways after an error. Every method is a collective."""

    def on_coordinator(self, call: Callable[[], Any]) -> Any:
        """The coordinator's answer (what JSON can carry) on every rank; its error is raised on every rank."""
        if not self.is_coordinator:
            message = json.loads(self.broadcast(None))
            if message["failure"] is not None:
                raise Failure(**message["failure"]).error()
            return message["answer"]
        try:
            answer = call()
        except Exception as error:
            self.broadcast(json.dumps({"failure": asdict(Failure.of(error))}).encode())
            raise
        self.broadcast(json.dumps({"failure": None, "answer": answer}).encode())
        return answer

    def share(self, call: Callable[[], S | None], load: Callable[[bytes], S]) -> S | None:
        """The coordinator's answer on every rank, or None; its error is raised on every rank.

        It travels as the bytes that its method `dump` makes, and `load` makes the other ranks' answer of those.
        """
        answer: S | None = None

        def found() -> bool:
            nonlocal answer
            answer = call()
            return answer is not None

        if not self.on_coordinator(found):
            return None
        data = self.broadcast(answer.dump() if answer is not None and self.world_size > 1 else b"")
        return load(data) if answer is None else answer

    def everywhere(self, call: Callable[[], T]) -> T:
        """This rank's answer, if every rank has one; else one rank's error on every rank.

        It is the first rank's, but Corrupt only if no rank has another one: with a store that fails, nobody can tell
        what is corrupt. A rank that failed with anything else than a StorageError raises that.
        """
        result: T | None = None
        error: Exception | None = None
        try:
            result = call()
        except Exception as raised:  # noqa: BLE001 - raised below, on every rank
            error = raised
        mine = None if error is None else Failure.of(error)
        told = [json.loads(data) for data in self.all_gather(json.dumps(mine and asdict(mine)).encode())]
        failures = [Failure(**failure) for failure in told if failure is not None]
        if failures:
            first = min(failures, key=lambda failure: _LAST.get(failure.kind, 0))
            if error is not None and (first == mine or not isinstance(error, StorageError)):
                raise error
            raise first.error()
        return result  # type: ignore[return-value]
