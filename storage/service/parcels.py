"""What a rank has staged, as the service has it: from the descriptors that came to a save that can be stored."""

from __future__ import annotations

import contextlib
import os
import threading
from contextlib import ExitStack
from dataclasses import dataclass, field

from storage.arena.slot import Slot
from storage.run.attempt import Attempt
from storage.saving.uploads import SaveJob
from storage.saving.writing import MadeObjects
from storage.service import table
from storage.service.channel import close_all
from storage.service.messages import Stage
from storage.service.table import HandedOver


@dataclass(frozen=True)
class TakenOver:
    """What was taken over, by this process or one before it: a `Stage`, and the descriptors that came with it.

    `is_intact`: nothing else has come into the memory behind them.
    """

    safe: str
    stage: Stage
    fds: list[int]
    num_crashes: int = 0
    is_intact: bool = False


@dataclass(eq=False)
class Parcel:
    """One rank's part of a save, from when it was staged until its slots are let go.

    It is opened by whoever works at it, behind the training, and until then no more than descriptors.
    """

    record: TakenOver
    held: int = field(default=1, init=False)
    """By how many the slots are read; they are let go when it comes to 0."""
    stop: threading.Event = field(default_factory=threading.Event, init=False)
    """Set where nobody is to be waited for any more."""
    made: MadeObjects | None = field(default=None, init=False)
    """The objects as which it is held in memory; known once it is `ready` to be stored."""
    ready: threading.Event = field(default_factory=threading.Event, init=False)
    waits: bool = field(init=False)
    """Whether it is not to begin yet."""
    num_handed: int = field(default=1, init=False)
    """How often its worker has handed it over: by each connection once."""
    has_ended: bool = field(default=False, init=False)
    """Whether its end is told by now, and nobody need take it up."""
    has_given_way: bool = field(default=False, init=False)
    is_refused: bool = field(default=False, init=False)
    """Whether it turned out not to be one, and nothing is left of it."""
    _staged: HandedOver | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.waits = self.stage.waits

    @property
    def stage(self) -> Stage:
        """What the worker has said of it."""
        return self.record.stage

    @property
    def safe(self) -> str:
        """What the keeper knows it by."""
        return self.record.safe

    @property
    def is_coordinators(self) -> bool:
        """Whether the save is committed by whoever has it, as is known once it is opened."""
        return self._staged is not None and self._staged.contents is not None

    @property
    def staged(self) -> HandedOver:
        """What is in it, once it is opened."""
        assert self._staged is not None, "nobody has opened it"
        return self._staged

    @property
    def size_bytes(self) -> int:
        """The memory of its slots."""
        if self._staged is not None:
            return self._staged.size_bytes
        with contextlib.suppress(OSError):  # it is being opened, or let go of
            return sum(os.fstat(fd).st_size for fd in list(self.record.fds))
        return 0

    def open(self) -> None:
        """Make what can be stored of the descriptors, which are its slots' from here on.

        Raises:
            Corrupt, ValueError: what came is no table, or does not fit together; nothing is left of it.
        """
        fds, self.record.fds[:] = list(self.record.fds), []
        self._staged = unpack_slots(fds)

    def job(self) -> SaveJob:
        """The save as who uploads it takes it."""
        stage, attempt = self.stage, self.stage.attempt
        return SaveJob(
            attempt=Attempt(attempt.prefix, attempt.step, attempt.id, attempt.world_size),
            rank=attempt.rank,
            payloads=self.staged.payloads,
            contents=self.staged.contents,
            started_s=stage.started_s,
            staging_error=self.staged.staging_error,
            healthy=stage.healthy,
            tier=stage.tier,
            made=self.made,
            created_unix_s=stage.created_unix_s,
        )

    def let_go(self) -> None:
        """Close the slots, which nobody reads any more."""
        close_all(self.record.fds)
        self.record.fds.clear()
        if self._staged is not None:
            self._staged.payloads.clear()
            for slot in self._staged.slots:
                slot.close()


def unpack(record: TakenOver) -> Parcel:
    """The parcel of what was staged, opened. Raises as `Parcel.open`."""
    parcel = Parcel(record)
    parcel.open()
    return parcel


def unpack_slots(fds: list[int]) -> HandedOver:
    """What was staged in the slots behind the descriptors, which belong to it from here on. Raises as `Parcel.open`."""
    with ExitStack() as on_failure:
        left, slots = list(fds), list[Slot]()
        on_failure.callback(lambda: close_all(left))
        while left:
            slots.append(Slot.from_fd(left.pop(0)))
            on_failure.callback(slots[-1].close)
        if not slots:
            raise ValueError("what was staged came without descriptors")
        staged = table.read(slots[0], slots[1] if len(slots) > 1 else None)
        on_failure.pop_all()
    return staged
