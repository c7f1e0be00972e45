"""What the nodes of a job write into the store: a record each, and the current round. Plain data and its JSON."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple, TypeVar

from launcher.rounds.failures import FailureClass
from launcher.rounds.history import History
from launcher.rounds.mesh import MeshPlan
from launcher.text import describe_end

R = TypeVar("R")

SUCCEEDED = "succeeded"
"""The outcome of a job whose every worker finished; any other outcome starts with "failed: "."""


class Verdict(StrEnum):
    """How a job ended, for programs: `exit_code` is what every node of the job answers with."""

    NONE = ""  # it has not
    SUCCEEDED = "succeeded"
    BUDGET_USED = "budget_used"  # failed, and --max-restarts allows no further restart
    USAGE = "usage"  # the program refused what it was given
    FAILS_AGAIN = "fails_again"  # an error at start, or the same failure twice
    CRASH_LOOP = "crash_loop"  # many failures in a row without progress
    NODES_FAIL = "nodes_fail"  # the same, by devices and connections: other nodes may do better
    NO_QUORUM = "no_quorum"  # too few nodes for too long

    @property
    def exit_code(self) -> int:
        """What `elastic-moe run` exits with on every node; 70 and 75 are EX_SOFTWARE and EX_TEMPFAIL of sysexits(3)."""
        return _EXIT_CODES[self]


_EXIT_CODES = {
    Verdict.NONE: 1,
    Verdict.SUCCEEDED: 0,
    Verdict.BUDGET_USED: 1,
    Verdict.USAGE: 2,
    Verdict.FAILS_AGAIN: 70,
    Verdict.CRASH_LOOP: 70,
    Verdict.NODES_FAIL: 75,
    Verdict.NO_QUORUM: 75,
}

LEFT = "left"
"""The reason on the record of a node that goes of its own accord, and how it is said to have departed."""
LEFT_AT_ONCE = "left at once"
"""How it is said to have departed if its workers had not stopped at a step boundary before."""


HANG = "hang: "
"""How the reason on the record of a node begins whose workers made no progress for too long."""


class Status(StrEnum):
    """What a node does."""

    READY = "ready"  # waits for a round later than its generation
    RUNNING = "running"  # has joined its generation; its workers run once all have
    STOPPING = "stopping"  # its workers are being stopped
    DONE = "done"  # its workers finished their work in its generation
    EXCLUDED = "excluded"  # alive, but may not take part


def parsed(data: bytes) -> dict[str, Any]:
    """Read a JSON object. Raises ValueError, and nothing else, for whatever else it is."""
    try:
        fields = json.loads(data)
    except RecursionError:
        raise ValueError("JSON that nests too deeply") from None
    if not isinstance(fields, dict):
        raise ValueError("not a JSON object")
    return fields


_PLAIN: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "bool": (bool,), "float": (float, int)}


def checked(record: R) -> R:
    """Return the record if its plain fields are of the types that they say. Raises ValueError.

    JSON may have anything in their place, which would be found out where it is used: in the agent's main loop.
    """
    of: Any = type(record)
    for name, kinds in _plain_fields(of):
        value = getattr(record, name)
        if not isinstance(value, kinds) or (type(value) is bool and bool not in kinds):
            raise ValueError(f"{type(record).__name__}.{name} is a {type(value).__name__}")
    return record


@functools.cache
def _plain_fields(kind: Any) -> tuple[tuple[str, tuple[type, ...]], ...]:
    if dataclasses.is_dataclass(kind):
        named = [(field.name, str(field.type)) for field in dataclasses.fields(kind)]
    else:
        named = [(name, getattr(of, "__forward_arg__", str(of))) for name, of in kind.__annotations__.items()]
    return tuple((name, _PLAIN[of]) for name, of in named if of in _PLAIN)


def _texts(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError("no list of names")
    return tuple(values)


@contextlib.contextmanager
def odd_record() -> Iterator[None]:
    """Raise ValueError, and nothing else, in the place of what a record of another shape raises."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class Failure:
    """A worker's failure as its agent reports it; `ts` is epoch seconds and orders failures of one host only."""

    rank: int
    exit_code: int
    message: str
    ts: float
    restartable: bool = True
    kind: FailureClass = FailureClass.PROGRAM
    step: int = -1
    """The last step that the worker completed, -1 if it told of none."""
    place: str = ""
    """Equal for two failures that have the same cause (`failures.place_of`)."""
    traceback: str = ""
    """At most `failures.TRACEBACK_MAX_CHARS`."""
    pid: int = 0
    victims: tuple[Failure, ...] = ()
    """The node's other workers that failed, without tracebacks."""

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Failure:
        """Read what `dataclasses.asdict` made of one."""
        victims = tuple(cls.from_fields(victim) for victim in fields["victims"])
        return checked(cls(**{**fields, "kind": FailureClass(fields["kind"]), "victims": victims}))


@dataclass(frozen=True)
class Node:
    """A node's record. `seniority` is the revision at which the record was created: lower is older."""

    node_id: str
    host: str
    address: str
    port: int
    slots: int
    zone: str = ""
    status: Status = Status.READY
    generation: int = 0
    draining: bool = False
    reason: str = ""
    failure: Failure | None = None
    yielded: bool = False  # its workers stopped at a step boundary that all ranks agreed on
    worker_store: str = ""  # "ADDRESS PORT" of the store that it hosts for the workers of its generation
    cannot_reach: tuple[str, ...] = ()  # participants of its generation that do not answer it (`partitions`)
    lease_ttl_s: float = 0.0  # of the lease that the record goes with; 0 if it is not written yet
    seniority: int = field(default=0, compare=False)

    def to_json(self) -> bytes:
        """Return the record as it is stored; `seniority` is the store's to say."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # `asdict` copies, for 10x as long
        del fields["seniority"]
        fields["failure"] = self.failure and dataclasses.asdict(self.failure)
        return json.dumps(fields).encode()

    @classmethod
    def from_json(cls, data: bytes, seniority: int) -> Node:
        """Read a record.

        Raises:
            ValueError: it is not one of this version.
        """
        with odd_record():
            fields = parsed(data)
            failure = fields.pop("failure")
            fields["status"] = Status(fields["status"])
            fields["cannot_reach"] = _texts(fields["cannot_reach"])
            read = Failure.from_fields(failure) if failure else None
            return checked(cls(**fields, failure=read, seniority=seniority))


class Participant(NamedTuple):
    """A node's place in a round: how many workers it runs (at most its slots), and where its liveness listener is.

    A tuple, as every node makes one of every participant of a round.
    """

    node_id: str
    slots: int
    address: str = ""
    port: int = 0


@dataclass(frozen=True)
class FailedWorker:
    """A failed worker and where it ran."""

    node_id: str
    host: str
    failure: Failure

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> FailedWorker:
        """Read what `dataclasses.asdict` made of one."""
        return checked(cls(fields["node_id"], fields["host"], Failure.from_fields(fields["failure"])))


@dataclass(frozen=True)
class Breakage:
    """Why a round cannot go on.

    `graceful`: every node that stopped did so at a step boundary, so the others' workers come to it too. `lost`: the
    participants whose record is gone. `all_stopped`: no node's workers need another's any more. `hung`: workers made no
    progress; every node has the stacks of its own written before it ends them.
    """

    reason: str
    graceful: bool
    lost: tuple[str, ...] = ()
    all_stopped: bool = False
    hung: bool = False


@dataclass(frozen=True)
class Round:
    """One generation of the job. `participants` are in rank order; rank 0 is the first one's first worker.

    `complete`: every participant has joined; no worker of the generation is started before. `worker_store`: then also
    "ADDRESS PORT" where its workers meet. `causes`: the workers that failed, root cause first: of the generation
    before, or, with an outcome, of this one.
    """

    generation: int
    lineage: str
    participants: tuple[Participant, ...]
    mesh: MeshPlan | None
    spares: tuple[str, ...]
    reason: str
    restarts: int = 0
    complete: bool = False
    worker_store: str = ""
    stop: str = ""
    broken: Breakage | None = None
    outcome: str = ""
    verdict: Verdict = Verdict.NONE
    causes: tuple[FailedWorker, ...] = ()
    history: History = field(default_factory=History)
    formed_ts: float = 0.0
    """Epoch seconds by the leader's clock, for people; 0 is not known."""

    @property
    def world_size(self) -> int:
        """How many workers all participants have."""
        return sum(p.slots for p in self.participants)

    def place_of(self, node_id: str) -> int | None:
        """Return the position of a node among the participants, None where it takes no part."""
        return next((i for i, p in enumerate(self.participants) if p.node_id == node_id), None)

    def to_json(self) -> bytes:
        """Return the round as it is stored: small, because every node reads every version of it."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in ("mesh", "broken"):
            fields[name] = fields[name] and dataclasses.asdict(fields[name])
        fields["causes"] = [dataclasses.asdict(cause) for cause in self.causes]
        fields["history"] = self.history.to_fields()
        return json.dumps(fields, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, data: bytes, before: Round | None = None) -> Round:
        """Read a round.

        `before`: one read earlier. Every version of a generation has the same participants, and making them anew is
        most of what reading a large round takes.

        Raises:
            ValueError: it is not one of this version.
        """
        with odd_record():
            return cls._read(parsed(data), before)

    @classmethod
    def _read(cls, fields: dict[str, Any], before: Round | None) -> Round:
        if before and (before.lineage, before.generation) == (fields["lineage"], fields["generation"]):
            fields["participants"] = before.participants
        else:
            fields["participants"] = tuple(checked(Participant(*row)) for row in fields["participants"])
        fields["spares"] = _texts(fields["spares"])
        fields["mesh"] = MeshPlan(**fields["mesh"]) if fields["mesh"] else None
        if broken := fields["broken"]:
            fields["broken"] = checked(Breakage(**{**broken, "lost": _texts(broken["lost"])}))
        fields["verdict"] = Verdict(fields["verdict"])
        fields["causes"] = tuple(FailedWorker.from_fields(cause) for cause in fields["causes"])
        fields["history"] = _checked_history(History.from_fields(fields["history"]))
        return checked(cls(**fields))


def _checked_history(history: History) -> History:
    for part in (history, *history.marks, *history.exclusions):
        checked(part)
    return history


def describe(failure: Failure) -> str:
    """Describe a failure in one line."""
    message = f": {failure.message}" if failure.message else ""
    if failure.kind is FailureClass.HANG:
        return f"worker of rank {failure.rank} hung{message}"
    return f"worker of rank {failure.rank} {describe_end(failure.exit_code)}{message}"


def identity_of(node_id: str) -> str:
    """Return what stays the same when a node's agent is started anew: its name, by default its host's."""
    return re.sub(r"-[0-9a-f]{8}$", "", node_id)
