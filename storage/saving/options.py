"""What a script may say of how its state is saved, and what that is once it was looked through."""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from typing import Literal, Self, TypedDict, Unpack

from storage.arena.staging import Staging
from storage.errors import UsageError
from storage.format.layout import PREFIX_SPREAD_MAX
from storage.pace.rules import Backlog, Every, Rule, parse_backlog, parse_every


class SavingOptions(TypedDict, total=False):
    """Options of `Checkpointer` for those who save. Each is the same on all ranks."""

    every: Every | None
    """Which calls of `save` do save: those that pass a multiple of so many steps, the first after so much time ("30s",
    or a timedelta), or "auto": the first after the last save has ended, but not more often than it pays, by what a save
    is measured to cost and how many failures the run has seen. None: every call saves."""
    ram_every: Every | None
    """The same for saves that stay in RAM, in between."""
    backlog: Backlog | str
    """What to do when a save is due while earlier ones take all the memory for copies: "wait" (up to `timeout_s`),
    "skip" it, or "replace" one that has not begun to be stored."""
    prefix_spread: int
    """Over how many prefixes, 256 at most, the data of one checkpoint is spread: S3 limits requests by prefix."""
    staging: Staging | Literal["sync", "overlapped"]
    """When `save` returns, see `Staging`: "sync", the default, once the state is copied; "overlapped" while parameters
    and the optimizers' state are still copied, beside the passes that follow."""
    service: bool | None
    """Whether the checkpoint service of this node, a process that outlives this one, carries saves out. None, the
    default: that of an agent does, where there is one. True: without an agent this Checkpointer starts one, at its
    first save. False: this process does. What no other process can open (`memory://`, stores of `register_scheme`) is
    always saved by this one, and an event `checkpoint_direct` says so."""
    check_replicas: int | None
    """After how many steps the ranks compare what they hold in common, bit by bit; also in each save. None: never."""


@dataclass(frozen=True)
class SavingPlan:
    """`SavingOptions`, complete and consistent."""

    every: Rule | None = None
    ram_every: Rule | None = None
    backlog: Backlog = Backlog.WAIT
    prefix_spread: int = 1
    check_replicas: int | None = None
    staging: Staging = Staging.SYNC
    service: bool | None = None

    @classmethod
    def of(cls, **options: Unpack[SavingOptions]) -> Self:
        """Look the options through. Raises UsageError."""
        every, ram_every = options.get("every"), options.get("ram_every")
        if ram_every is not None and every is None:
            raise UsageError(
                f"ram_every is {ram_every!r} without every, so that each save goes to the store: give every as well"
            )
        spread, check = options.get("prefix_spread", 1), options.get("check_replicas")
        _check_whole("prefix_spread", spread, "a number of prefixes from 1 to 256", PREFIX_SPREAD_MAX)
        if check is not None:
            _check_whole("check_replicas", check, "a number of steps, at least 1")
        return cls(
            every=None if every is None else parse_every(every),
            ram_every=None if ram_every is None else parse_every(ram_every, "ram_every", allows_auto=False),
            backlog=parse_backlog(options.get("backlog", Backlog.WAIT)),
            prefix_spread=int(spread),
            staging=_parse_staging(options.get("staging", Staging.SYNC)),
            service=_parse_service(options.get("service")),
            check_replicas=None if check is None else int(check),
        )


def _parse_staging(given: str) -> Staging:
    if given not in set(Staging):
        known = " or ".join(repr(staging.value) for staging in Staging)
        raise UsageError(f"staging is {given!r}; it must be {known}")
    return Staging(given)


def _parse_service(value: object) -> bool | None:
    if value is None or isinstance(value, bool):
        return value
    raise UsageError(f"service is {value!r}; it must be True, False or None")


def _check_whole(name: str, value: object, what: str, limit: int | None = None) -> None:
    number = int(value) if not isinstance(value, bool) and isinstance(value, numbers.Integral) else 0
    if number < 1 or (limit is not None and number > limit):
        raise UsageError(f"{name} is {value!r}; it must be {what}")
