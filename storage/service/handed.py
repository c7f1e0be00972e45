"""What a rank has handed over to the service, and what is the same in all of its saves."""

from __future__ import annotations

from dataclasses import dataclass

from storage.arena.slot import Slot
from storage.run.job import Origin
from storage.saving.committer import Running
from storage.saving.uploads import SaveJob, SaveRules, Tried
from storage.saving.writing import Payload
from storage.service.messages import Stage


@dataclass(frozen=True)
class Saves:
    """What is the same in all saves of one rank: where to, whose, and by which rules."""

    url: str
    rank: int
    origin: Origin
    rules: SaveRules
    holds: bool = False
    """Whether the service holds states in memory."""


@dataclass
class Handed:
    """A job that is the service's. `is_sent`: it may have begun; `is_released`: its slot may hold something else."""

    running: Running
    stage: Stage
    table: Slot
    slot: Slot | None
    is_sent: bool = False
    is_released: bool = False

    @property
    def tried(self) -> Tried:
        """What the service may have done of it."""
        return Tried.STORED if self.is_released else Tried.BEGUN if self.is_sent else Tried.NOT_YET


def whole(job: SaveJob) -> tuple[list[Payload], Slot | None, str | None]:
    """The payloads once they stand, and where they lie; or why there are none."""
    if job.staging_error is not None or job.staged is None:
        return job.payloads, None, job.staging_error
    try:
        job.staged.wait()
    except Exception as error:  # noqa: BLE001 - told by the receipt, as what fails while staging is
        return [], None, f"{type(error).__name__}: {error}"
    return job.payloads, job.staged.slot, None
