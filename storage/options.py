"""What a `Checkpointer` may be told by keyword beside its parameters."""

from __future__ import annotations

import enum
import numbers
import warnings
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, TypedDict, cast

from storage.errors import UsageError
from storage.run.job import JobIdentity
from storage.saving.options import SavingOptions, SavingPlan

_TIMEOUT_S_MAX = 1e9  # no clock of a thread's waits for ever


class Access(enum.Enum):
    """What a `Checkpointer` is to a run."""

    CLAIM = "claim"
    """Its owner, if no other job that is alive has claimed the run. Who claimed it before can no longer commit."""
    TAKE_OVER = "take over"
    """Its owner, without asking whether another job lives that has claimed the run."""
    READ = "read"
    """A reader, whoever owns the run and saves into it: nothing is claimed, and nothing written.

    A damaged checkpoint is passed over (an event, checkpoint_damaged) and stays where it is.
    """


class FormerOptions(TypedDict, total=False):
    """What options of `Checkpointer` were called before. They work for one release, with a DeprecationWarning."""

    generation: int | None
    lineage: str | None
    run_id: str | None
    mesh: Mapping[str, Any] | None
    take_over: bool
    read_only: bool
    compare_ranks: bool


class CheckpointerOptions(SavingOptions, FormerOptions, total=False):
    """All that `Checkpointer` takes by keyword beside its parameters."""


def limits(keep: object, timeout_s: object) -> tuple[int, float]:
    """The two of them, looked through. Raises UsageError."""
    num = int(keep) if not isinstance(keep, bool) and isinstance(keep, numbers.Integral) else 0
    if num < 1:
        raise UsageError(f"keep is {keep!r}; it must be a number of checkpoints, at least 1")
    seconds = float(timeout_s) if not isinstance(timeout_s, bool) and isinstance(timeout_s, numbers.Real) else 0.0
    if not 0 < seconds <= _TIMEOUT_S_MAX:
        raise UsageError(f"timeout_s is {timeout_s!r}; it must be a number of seconds, more than 0 and at most 1e9")
    return num, seconds


def divided(options: CheckpointerOptions) -> tuple[SavingPlan, FormerOptions]:
    """The options of today, looked through, and those of before. Raises UsageError."""
    plan = SavingPlan.of(**{name: options[name] for name in SavingOptions.__annotations__ if name in options})  # type: ignore[literal-required]
    former = {name: value for name, value in options.items() if name not in SavingOptions.__annotations__}
    return plan, cast(FormerOptions, former)


def translated(former: FormerOptions, access: Access, job: JobIdentity | None) -> tuple[Access, JobIdentity | None]:
    """What options by their former names ask for, in today's. Raises UsageError, TypeError."""
    if unknown := former.keys() - FormerOptions.__annotations__.keys():
        raise TypeError(f"Checkpointer got an unexpected keyword argument {min(unknown)!r}")
    warnings.warn(
        f"{', '.join(former)} of Checkpointer: say access=Access.READ or TAKE_OVER, job=JobIdentity(...), and"
        " save(..., compare_ranks=...)",
        DeprecationWarning,
        stacklevel=3,
    )
    if former.get("read_only") and former.get("take_over"):
        raise UsageError("take_over is for jobs that save; with read_only nothing is taken from another job")
    access = Access.READ if former.get("read_only") else Access.TAKE_OVER if former.get("take_over") else access
    said = {field.name: former[field.name] for field in fields(JobIdentity) if field.name in former}  # type: ignore[literal-required]
    return access, replace(job or JobIdentity(), **said)
