"""What the store needs of the objects that it is made of, and how its steps ask for them."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from launcher.errors import KVUnavailable

T = TypeVar("T")


class Register(Protocol):
    """Objects with names, read and written whole. Methods may be called from any thread, and answer within seconds.

    Each raises KVUnavailable where there is no answer; a write may have happened then, or may happen later.
    """

    @property
    def is_remote(self) -> bool:
        """Whether requests cost money or time, so that few should be made."""
        ...

    @property
    def name_size_bytes_max(self) -> int:
        """How long a name may be in UTF-8, if it may tell something: whoever lists names would read fewer objects. Else
        0, and names are short."""
        ...

    def read(self, name: str) -> bytes | None:
        """Return the content of an object, None where there is none. A write that has returned is seen."""
        ...

    def create(self, name: str, content: bytes) -> bool:
        """Write an object if there is none of its name; of several at once one succeeds. Returns whether it did."""
        ...

    def write(self, name: str, content: bytes) -> None:
        """Write an object, whatever is there."""
        ...

    def names(self, prefix: str) -> list[str]:
        """Return the names that begin with `prefix`. May be of a moment ago."""
        ...

    def remove(self, name: str) -> None:
        """Remove an object, if it is there."""
        ...

    def close(self) -> None:
        """Let go of connections."""
        ...


@dataclass(frozen=True)
class Read:
    """Answered by the object's content, or None."""

    name: str


@dataclass(frozen=True)
class Create:
    """Answered by whether the object was made."""

    name: str
    content: bytes


@dataclass(frozen=True)
class Overwrite:
    """Answered by None once the object has this content."""

    name: str
    content: bytes


@dataclass(frozen=True)
class Names:
    """Answered by the names that begin with `prefix`."""

    prefix: str


@dataclass(frozen=True)
class Pause:
    """Answered by None, after a while of the order of `seconds`, or of what so many requests take, if longer."""

    seconds: float
    num_requests: float = 2.0


@dataclass(frozen=True)
class Together:
    """Requests that need not wait for one another; answered by a list of their answers.

    In the place of one that was not answered is its KVUnavailable: none is thrown.
    """

    requests: tuple[Read | Create | Overwrite | Names, ...]


Request = Read | Create | Overwrite | Names | Pause | Together
Steps = Generator[Request, Any, T]
"""A sequence of requests, each of which is sent its answer, or thrown KVUnavailable; it returns a T.

So what is done with objects is pure: threads carry it out on a `Register`, the simulator under a clock of its own.
"""


def answer(register: Register, request: Request) -> Any:
    """Carry one request out: no pause, nor several together.

    Raises:
        KVUnavailable: the register does not answer.
    """
    match request:
        case Read(name):
            return register.read(name)
        case Create(name, content):
            return register.create(name, content)
        case Overwrite(name, content):
            return register.write(name, content)
        case Names(prefix):
            return register.names(prefix)
    raise KVUnavailable(f"not a request: {request}")
