"""`LiveState`: a rank's state after its last complete step, ready to be staged whenever the training cannot go on."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from pydantic import TypeAdapter

from storage.arena.arena import Arena, Guard
from storage.arena.slot import Slot
from storage.errors import StorageError, UsageError
from storage.events import CheckpointEvent, Reporter
from storage.live.capture import NotCaptured, beside_training, room_for, stage
from storage.live.door import Door, Turn
from storage.live.lock import StepLock
from storage.live.notes import Note, NoteTaker
from storage.parallel import Pool
from storage.ranks.agreement import AgreeingGroup
from storage.saving.commit import Attempt, StateContents
from storage.saving.describe import contents_of
from storage.saving.saveplan import dump_share, load_share
from storage.saving.writing import Payload

log = logging.getLogger(__name__)

_APPLY_S = 1.0
"""How long an optimizer's step is waited for that is being applied."""
_RESCUE_S = 10.0
"""How long a process that an error ends takes at most to stage its state."""

_contents = TypeAdapter(StateContents)


@dataclass(frozen=True)
class LivePart:
    """All that a rank holds of the state, in a slot: a part of an attempt that is in memory only.

    `contents`: what all ranks hold, so that whoever has some of the parts knows whether they are all of the state.
    """

    attempt: Attempt
    rank: int
    slot: Slot
    payloads: list[Payload]
    contents: StateContents


@dataclass(frozen=True)
class _Agreed:
    """What the ranks agree on, valid while this rank's holdings keep their digest."""

    token: uuid.UUID
    contents: StateContents
    digest: str


class LiveState:
    """Of one rank. Notes come from the training's thread, requests to capture from any.

    Args:
        publish: hands a part to the service, which keeps it when this process is gone. Raises StorageError.
        guard: see `storage.arena.arena.Guard`.
    """

    def __init__(
        self,
        group: AgreeingGroup,
        publish: Callable[[LivePart], None],
        report: Reporter,
        guard: Guard | None = None,
    ) -> None:
        self._group = group
        self._publish = publish
        self._report = report
        self._lock: StepLock[Note] = StepLock()
        self._door = Door()
        self._taker = NoteTaker(group.rank, self._lock.optimizers)
        self._agreed: _Agreed | None = None
        self._why_off: str | None = None  # this rank's reason
        self._is_over = False  # for all ranks
        self._is_outdated = False  # what they have agreed on, by this rank's last note
        self._capturing = threading.Lock()
        self._arena = Arena(1, guard)  # made ahead
        self._captured: int | None = None
        self._pool = Pool(1, "storage-live")

    def start(self) -> Self:
        """Hear of optimizers' steps from here on."""
        self._lock.start()
        return self

    @property
    def is_agreed(self) -> bool:
        """Whether the ranks have agreed on what the state is, so that a note needs no collective."""
        return self._agreed is not None or self._is_over

    @property
    def asks(self) -> bool:
        """Whether this rank wants all to agree anew, in `saved`: they never have, or its last note does not fit."""
        return not self._is_over and (self._agreed is None or self._is_outdated)

    def note(self, step: int, state: Mapping[Any, Any], *, healthy: bool = True) -> None:
        """The step is complete, and this is the state after it. A collective the first time, and cheap after that.

        What goes wrong is told, and costs no more than the live state: the training goes on. A step that is noted is
        not noted again, and one that is not `healthy` is none to go on from.
        """
        if self._agreed is None:
            self.saved(step, state, healthy=healthy)
        elif not healthy:
            self._lock.clear(f"step {step} is not healthy")
        elif not self._lock.is_noted(lambda note: note.step == step):
            note = self._take(step, state)
            self._is_outdated = note is None or note.digest != self._agreed.digest
            if note is not None and not self._is_outdated:
                self._lock.note(note)
            elif note is not None:
                self._lock.clear("the state has other tensors than when the ranks agreed on it: the next save tells")

    def saved(self, step: int, state: Mapping[Any, Any], *, healthy: bool = True) -> None:
        """As `note`, after a save before which some rank has asked for it: a collective, in which they agree anew."""
        if self._is_over:
            return
        note = self._take(step, state)
        self._agree(note)
        self._is_outdated = False
        if not healthy:
            self._lock.clear(f"step {step} is not healthy")
        elif note is not None and not self._is_over:
            self._lock.note(note)

    def finish(self, step: int, state: Mapping[Any, Any], apply: Callable[[], object]) -> None:
        """Apply a step on all ranks, or on all that survive, and note it; see `door`. A collective.

        `apply` is called once: here, or by the thread that captures. It communicates with nobody.
        """
        if self._agreed is None or self._is_over:  # nothing could be captured
            apply()
            self.note(step, state)
            return

        def finish() -> None:
            apply()
            self.note(step, state)

        turn = Turn(step, finish)
        self._door.come(turn)
        self._group.any(False)  # nobody is through before all have come
        turn.take()
        self._door.leave()

    def forget(self, why: str) -> None:
        """The state is about to be changed, by a restore: there is no step to go back to until the next note.

        On all ranks: with that note, a collective, they agree anew, so that the same step of before is another attempt.
        """
        self._door.leave()
        self._lock.clear(why)
        self._agreed = None

    def ask(self, timeout_s: float, answer: Callable[[int | str], None]) -> None:
        """Have the state staged by a thread of its own; `answer` hears the step, or why there is none."""
        self._pool.submit(lambda: answer(self.capture(timeout_s)))

    def capture(self, timeout_s: float, *, patient: bool = True) -> int | str:
        """Stage the state after the last complete step, and hand it to the service: its step, or why there is none.

        The training begins no further step by `finish` then, as this process is to be ended; one that has come to its
        door is applied here, and staged as well. `patient`: a step that is being applied is waited for.
        """
        deadline_s = time.monotonic() + timeout_s
        with self._capturing:
            turn = self._door.shut()
            if self._why_off is not None:
                return self._why_off
            found = self._capture_noted(deadline_s, _APPLY_S if patient else 0.0)
            if turn is None or (isinstance(found, int) and found >= turn.step):
                return found
            try:
                with beside_training(turn.ready, deadline_s):
                    if not turn.take(deadline_s - time.monotonic()):
                        raise NotCaptured(f"step {turn.step} is still being applied")
            except Exception as error:  # noqa: BLE001 - the script's own
                self._report(CheckpointEvent.LIVE_MISSED, step=turn.step, reason=_told(error))
                return found
            later = self._capture_noted(deadline_s, _APPLY_S)
            return found if isinstance(later, str) else later

    def _capture_noted(self, deadline_s: float, patience_s: float) -> int | str:
        """Stage what is noted, if that was not done; its step, or why there is none."""
        began_s = time.monotonic()
        with self._lock.held(max(0.0, min(deadline_s - began_s, patience_s))) as note:
            if isinstance(note, str):
                return note
            if self._captured == note.step:
                return note.step
            try:
                self._stage(note, deadline_s)
            except (StorageError, MemoryError, RuntimeError) as error:  # torch's are RuntimeErrors
                self._report(CheckpointEvent.LIVE_MISSED, step=note.step, reason=_told(error))
                return _told(error)
            self._captured = note.step
            seconds = round(time.monotonic() - began_s, 4)
            self._report(CheckpointEvent.LIVE_STAGED, step=note.step, seconds=seconds, bytes=note.size_bytes)
            return note.step

    def close(self, *, rescue: bool) -> None:
        """End; with `rescue`, since an error ends the training, the state is staged first."""
        if rescue and self._agreed is not None and self._why_off is None:
            found = self.capture(_RESCUE_S, patient=False)  # it is this very thread that would note the step
            if isinstance(found, str):
                log.warning("the state in memory is lost: %s", found)
        self._door.open()
        self._lock.close()
        self._arena.close()
        self._pool.shutdown(wait=True)

    def refused(self, why: str) -> None:
        """Nobody will ever keep it, which is told. From any thread: so the optimizers' hooks stay."""
        self._why_off = why
        self._report(CheckpointEvent.LIVE_OFF, reason=why)

    def _stage(self, note: Note, deadline_s: float) -> None:
        """Raises NotCaptured, StorageError, MemoryError, RuntimeError."""
        agreed, size_bytes = self._agreed, room_for(note)
        assert agreed is not None, "there is a note, so the ranks have agreed"
        try:
            slot = self._arena.take(size_bytes)
        except ValueError:
            raise NotCaptured("the training has ended") from None
        assert slot is not None, "one capture at a time"
        try:
            payloads = stage(note, slot.memory, deadline_s)
            attempt = Attempt.of_step(note.step, str(uuid.uuid5(agreed.token, str(note.step))), self._group.world_size)
            self._publish(LivePart(attempt, self._group.rank, slot, payloads, agreed.contents))
        finally:
            self._arena.drop(slot)  # the service has it

    def _take(self, step: int, state: Mapping[Any, Any]) -> Note | None:
        """This rank's note; None if there can be none any more, which is told."""
        if self._why_off is not None:
            return None
        try:
            return self._taker.take(step, state)
        except Exception as error:  # noqa: BLE001 - a state_dict may fail in any way; a save will tell it
            self._turn_off(_told(error))
            return None

    def _agree(self, note: Note | None) -> None:
        """A collective: what all ranks hold."""
        if self._group.any(note is None):
            self._is_over = True
            if self._why_off is None:
                self._turn_off("another rank cannot note its state")
            return
        assert note is not None
        gathered = self._group.gather(dump_share(self._taker.share))
        contents: StateContents | None = None

        def join() -> str:
            nonlocal contents
            try:
                contents = contents_of([load_share(data) for data in gathered or []])
            except ValueError as error:
                raise UsageError(str(error)) from None
            return uuid.uuid4().hex

        try:
            token = self._group.on_coordinator(join)
        except StorageError as error:
            self._is_over = True
            self._turn_off(str(error))
            return
        data = self._group.broadcast(_contents.dump_json(contents) if contents is not None else None)
        self._agreed = _Agreed(uuid.UUID(token), contents or _contents.validate_json(data), note.digest)
        self._captured = None
        self._pool.submit(lambda: self._make_slot(room_for(note)))

    def _make_slot(self, size_bytes: int) -> None:
        """Have the memory ready: when it is needed there is no time."""
        try:
            self._arena.make_ahead(size_bytes)
        except MemoryError as error:
            self._report(CheckpointEvent.LIVE_OFF, reason=str(error))
        self.have_guarded()

    def have_guarded(self) -> None:
        """Tell the guard of the slot, as where it was told by a connection that has ended."""
        self._arena.have_guarded()

    def _turn_off(self, why: str) -> None:
        self._why_off = why
        self._lock.close()
        self._report(CheckpointEvent.LIVE_OFF, reason=why)


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, StorageError) else f"{type(error).__name__}: {error}"
