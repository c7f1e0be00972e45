"""Ranks that succeed or fail together: one answer, or one error, on all of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from storage import errors
from storage.errors import StorageError
from storage.ranks.group import Group

T = TypeVar("T")
_LAST = {"Corrupt": 1, "PeerFailed": 2}  # what is heard only if nothing else has happened


class Dumpable(Protocol):
    """What can tell itself in bytes."""

    def dump(self) -> bytes:
        """Everything that another process needs to have the same."""


S = TypeVar("S", bound=Dumpable)


class AgreeingGroup(Group):
    """A group whose members never go different ways after an error. Every method is a collective."""

    def on_coordinator(self, call: Callable[[], Any]) -> Any:
        """The coordinator's answer (what JSON can carry) on every rank; its error is raised on every rank."""
        if not self.is_coordinator:
            message = json.loads(self.broadcast(None))
            if message["error"] is not None:
                raise _to_error(message)
            return message["answer"]
        try:
            answer = call()
        except Exception as error:
            self.broadcast(json.dumps(to_message(error)).encode())
            raise
        self.broadcast(json.dumps({"error": None, "answer": answer}).encode())
        return answer

    def share(self, call: Callable[[], S | None], load: Callable[[bytes], S]) -> S | None:
        """The coordinator's answer on every rank, or None; its error is raised on every rank.

        On the way it is the bytes of its method `dump`, of which `load` makes the others'.
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
        """This rank's answer, if every rank has one; else the first rank's error on every rank.

        An error other than Corrupt goes first: with a store that fails, nobody can tell what is corrupt.
        """
        result: T | None = None
        failure: Exception | None = None
        try:
            result = call()
        except Exception as error:  # noqa: BLE001 - raised below, on every rank
            failure = error
        outcomes = [json.loads(data) for data in self.all_gather(json.dumps(to_message(failure)).encode())]
        failed = [outcome for outcome in outcomes if outcome["error"] is not None]
        failed.sort(key=lambda outcome: _LAST.get(outcome["error"], 0))
        if failed:
            if failure is not None and (failed[0] == to_message(failure) or not isinstance(failure, StorageError)):
                raise failure
            raise _to_error(failed[0])
        return result  # type: ignore[return-value]


class PeerFailed(StorageError):
    """This rank gave something up that it did together with others, because one of them has failed and says why."""


def to_message(error: Exception | None) -> dict[str, Any]:
    """What the other ranks hear of an error, or of none: `error`, the name of its class, and `text`."""
    if error is None:
        return {"error": None}
    text = str(error) if isinstance(error, StorageError) else f"{type(error).__name__}: {error}"
    return {"error": type(error).__name__, "text": text}


def error_class(name: str) -> type[StorageError]:
    """The error class of that name; StorageError for errors of other packages."""
    kind = getattr(errors, name, None)
    return kind if isinstance(kind, type) and issubclass(kind, StorageError) else StorageError


def _to_error(message: dict[str, Any]) -> StorageError:
    return error_class(message["error"])(message["text"])
