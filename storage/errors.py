"""What can go wrong in `storage`. `exit_code` is what a command line ends with.

StorageError
├── NotFound           no object of that name
├── AlreadyExists      a conditional put met an object; a step that is committed already
├── Corrupt            bytes are not what was written: checksum, size, format
├── Disputed           damage that one rank reads and another does not
├── Transient          may work when tried again; its `cause` says why: throttled, reset, stalled, ...
│   ├── Interrupted        a read that broke off: so many bytes have arrived
│   └── Unconfirmed        a commit was sent, but the store could not be asked whether it stands
├── Denied             the store, or our own rules, refuse the access
│   └── Forbidden          these credentials may not do this, or (where they may not list) there is no such object
├── PeerFailed         another of the ranks that work together has failed, and says why
├── ReplicasDiffer     ranks hold differently what must be the same, and no majority says who is right
├── Fenced             a newer owner has taken this run over; this process may no longer commit
└── UsageError         the caller's mistake; the message is one line that says what to do
    ├── BadURL             no store by that URL
    ├── InUse              another job, which is alive, saves to that URL
    ├── NoCheckpoint       nothing committed at that URL
    ├── OnlyUnhealthy      there are checkpoints, but each was saved as unhealthy
    ├── WrongModel         the checkpoint belongs to another model
    ├── UnsupportedValue   a value that no safe loader could read back
    └── UnloadableValue    intact, but it cannot be loaded safely, or not by this torch
"""

from __future__ import annotations

import enum
import re

from storage.text import hide_secrets

__all__ = [
    "AlreadyExists",
    "BadURL",
    "Cause",
    "Corrupt",
    "Denied",
    "Disputed",
    "Fenced",
    "Forbidden",
    "InUse",
    "Interrupted",
    "NoCheckpoint",
    "NotFound",
    "OnlyUnhealthy",
    "PeerFailed",
    "ReplicasDiffer",
    "StorageError",
    "Transient",
    "Unconfirmed",
    "UnloadableValue",
    "UnsupportedValue",
    "UsageError",
    "WrongModel",
]

_BREAKS = re.compile(r"\s*[\t\n\v\f\r\x85\u2028\u2029]\s*")
_CONTROLS = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class Cause(enum.StrEnum):
    """Why an operation has failed for now; `storage.stores.retry_policy` says what is done about each."""

    THROTTLED = "throttled"
    SERVER_ERROR = "server_error"
    RESET = "reset"
    STALE = "stale"
    """The server had closed an idle connection; nothing is wrong with it."""
    STALLED = "stalled"
    """No byte for as long as the stall time-out."""
    TRUNCATED = "truncated"
    DAMAGED = "damaged"
    """The store has refused a body because its checksum did not fit."""
    UNREACHABLE = "unreachable"
    """The name does not resolve, or nobody listens."""
    CONFLICT = "conflict"
    """Another request for the same object was under way."""
    OTHER = "other"


def one_line(text: str) -> str:
    """The text without line breaks and terminal control codes, both of which torch has in its messages."""
    return _CONTROLS.sub("", _BREAKS.sub(" ", text)).strip()


class StorageError(Exception):
    """Base of every error that this package raises on purpose. `str(error)` is one line, without secrets of URLs."""

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        super().__init__(hide_secrets(one_line(message)))


class NotFound(StorageError):
    """The object does not exist."""


class AlreadyExists(StorageError):
    """The object exists and must not be overwritten."""


class Corrupt(StorageError):
    """What was read is not what was written; `key` is the data object in which, where it is one."""

    def __init__(self, message: str, key: str | None = None) -> None:
        super().__init__(message)
        self.key = key


class Disputed(StorageError):
    """A rank read damage, but a second look at the same data found it whole."""


class Transient(StorageError):
    """The operation may succeed when tried again.

    `retry_after_s` is what the store asked for, where it did; `given_up` is set once a retrier has tried often enough,
    so that nobody multiplies its tries.
    """

    def __init__(self, message: str, cause: Cause = Cause.OTHER, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.cause = cause
        self.retry_after_s = retry_after_s
        self.given_up = False


class Interrupted(Transient):
    """A read that broke off after `received_bytes`; `etag` is of the object that they came from."""

    def __init__(self, message: str, cause: Cause = Cause.OTHER, received_bytes: int = 0, etag: str = "") -> None:
        super().__init__(message, cause)
        self.received_bytes = received_bytes
        self.etag = etag


class Unconfirmed(Transient):
    """A checkpoint is probably committed, but the store did not answer when asked for it."""


class Denied(StorageError):
    """Access refused, by the store or by a rule of this package.

    It is raised where a store is first used (during a training a save fails, and is told), and is the user's to mend:
    credentials, a bucket's name, its region, a clock.
    """

    exit_code = 2


class Forbidden(Denied):
    """These credentials may not do what was asked. Who may not list is told the same of what is not there."""


class PeerFailed(StorageError):
    """This rank gave up what it did together with others, since one of them has failed; that one raises the reason."""


class ReplicasDiffer(StorageError):
    """Copies of one piece of the state differ between ranks, which nobody can set right: go back to a checkpoint."""


class Fenced(StorageError):
    """A newer owner has claimed the run."""


class UsageError(StorageError):
    """A mistake of the caller; `str(error)` is one line that names the value and the mend."""

    exit_code = 2


class BadURL(UsageError):
    """The URL names no store that can be opened."""


class InUse(UsageError):
    """Another job saves to the URL, and it is alive."""


class NoCheckpoint(UsageError):
    """There is no committed checkpoint at the URL."""


class OnlyUnhealthy(UsageError):
    """Every checkpoint at the URL was saved with `healthy=False`."""


class WrongModel(UsageError):
    """Keys or shapes of the state differ from the checkpoint's."""


class UnsupportedValue(UsageError):
    """A value of the state cannot be stored so that it can be loaded without executing code."""


class UnloadableValue(UsageError):
    """What is stored is intact, but this process cannot, or for safety will not, make a value of it.

    No damage: nothing is set aside for it, and no older checkpoint taken.
    """
