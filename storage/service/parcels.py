"""What a rank has staged, as the service has it: from the descriptors that came to a save that can be stored."""

from __future__ import annotations

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


@dataclass
class Parcel:
    """One rank's part of a save, from when it was staged until its slots are let go.

    `safe` names it to the keeper.
    """

    stage: Stage
    staged: HandedOver
    safe: str
    num_crashes: int = 0
    held: int = field(default=1, init=False)
    """By how many the slots are read; they are let go when it comes to 0."""
    is_intact: bool = field(default=True, init=False)
    """Whether nothing else has come into the slots before this process had them."""
    stop: threading.Event = field(default_factory=threading.Event, init=False)
    """Set where nobody is to be waited for any more."""
    made: MadeObjects | None = field(default=None, init=False)
    """The objects as which it is held in memory; known once it is `ready` to be stored."""
    ready: threading.Event = field(default_factory=threading.Event, init=False)
    waits: bool = field(init=False)
    """Whether it is not to begin yet."""
    has_given_way: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.waits = self.stage.waits

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
        self.staged.payloads.clear()
        for slot in self.staged.slots:
            slot.close()


def unpack(record: TakenOver) -> Parcel:
    """The parcel of what was staged, whose descriptors are the parcel's from here on.

    Raises:
        Corrupt, ValueError: what came is no table, or does not fit together.
    """
    parcel = Parcel(record.stage, unpack_slots(record.fds), record.safe, record.num_crashes)
    parcel.is_intact = record.is_intact
    return parcel


def unpack_slots(fds: list[int]) -> HandedOver:
    """What was staged in the slots behind the descriptors, which belong to it from here on. Raises as `unpack`."""
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
