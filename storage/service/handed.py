"""What a rank has handed over to the service, and what is the same in all of its saves."""

from __future__ import annotations

import functools
import os
from concurrent.futures import Future
from dataclasses import dataclass, replace

from storage.agent import AgentEnvironment
from storage.arena.slot import Slot
from storage.run.job import Origin
from storage.run.owner import Owner
from storage.saving.committer import Running
from storage.saving.uploads import SaveJob, SaveRules, Tried
from storage.saving.writing import Payload
from storage.service.messages import Identity, Stage, StagedAttempt
from storage.service.notes import Notes
from storage.service.processes import began_at, space


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
    """A job that is the service's. `is_sent`: it may have begun, unless it `waits`; `is_released`: its slot may hold
    something else.
    """

    running: Running
    stage: Stage
    table: Slot
    slot: Slot | None
    waits: bool = False
    is_sent: bool = False
    is_released: bool = False

    @property
    def tried(self) -> Tried:
        """What the service may have done of it."""
        return Tried.STORED if self.is_released else Tried.BEGUN if self.is_sent else Tried.NOT_YET

    def message(self) -> tuple[Stage, list[int]]:
        """What tells the service of it, and the descriptors that go with it."""
        fds = [self.table.fd] if self.slot is None else [self.table.fd, self.slot.fd]
        return self.stage.model_copy(update={"tried": self.tried, "waits": self.waits}), fds

    def close(self, *, is_shared: bool) -> None:
        """Let go of it unfinished; with `is_shared` another process may still read it."""
        self.table.close()
        replace(self.running, is_shared=is_shared).free()


_began_at = functools.lru_cache(1)(began_at)  # that of this process: it is asked for in each save


def stage_of(job: SaveJob, session: str, owner: Owner, saves: Saves) -> Stage:
    """What the service has to know of a job."""
    attempt = job.attempt
    told = AgentEnvironment.from_env(os.environ).variables() | {"RANK": os.environ.get("RANK", "")}
    return Stage(
        session=session,
        pid=os.getpid(),
        pid_began=_began_at(os.getpid()),
        pid_space=space(),
        url=saves.url,
        attempt=StagedAttempt(
            prefix=attempt.prefix, step=attempt.step, id=attempt.id, world_size=attempt.world_size, rank=job.rank
        ),
        owner=owner,
        origin=Identity(**vars(saves.origin)),
        keep=saves.rules.keep,
        timeout_s=saves.rules.timeout_s,
        started_s=job.started_s,
        created_unix_s=job.created_unix_s,
        healthy=job.healthy,
        tier=job.tier,
        yields=job.yields,
        copies=job.copies,
        told=told,
    )


def write_down(notes: Notes, stage: Stage, running: Running) -> None:
    """Note down that it was staged, so that somebody tells what has become of it, whoever is killed and when."""

    def drop(committed: Future[bool]) -> None:
        if not committed.cancelled():  # else it goes on without this process
            notes.drop(stage.name)

    notes.add(stage.name, stage.model_dump_json())
    running.committed.add_done_callback(drop)


def whole(job: SaveJob) -> tuple[list[Payload], Slot | None, str | None]:
    """The payloads once they stand, and where they lie; or why there are none."""
    if job.staging_error is not None or job.staged is None:
        return job.payloads, None, job.staging_error
    try:
        job.staged.wait()
    except Exception as error:  # noqa: BLE001 - told by the receipt, as what fails while staging is
        return [], None, f"{type(error).__name__}: {error}"
    return job.payloads, job.staged.slot, None
