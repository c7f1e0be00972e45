"""A worker's side of the service: hands over what was staged, and hears what becomes of it.

Where there is no service, or it is lost and does not come back in time, what it has not brought to its end is done by
this process: the way of a save is the same, and whoever goes it takes what is there already.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
from concurrent.futures import wait
from dataclasses import replace

from storage.errors import Corrupt, Fenced, StorageError
from storage.events import CheckpointEvent, Reporter
from storage.parallel import Pool
from storage.priority import wait_for_turn
from storage.saving.committer import InProcess, Running
from storage.saving.ownership import Ownership
from storage.saving.uploads import SaveJob, StagedMemory, Tried
from storage.service import address, table
from storage.service.channel import Channel, close_all
from storage.service.custody import Custody
from storage.service.handed import Handed, Saves, stage_of, whole, write_down
from storage.service.listening import listen
from storage.service.messages import (
    CopySettled,
    Ended,
    GoOn,
    Heard,
    Hello,
    KeptHere,
    ProtocolError,
    Rejected,
    Released,
    ServiceMessage,
    Stage,
    Stored,
    TakenBack,
    Told,
    name_of,
)
from storage.service.notes import Notes
from storage.service.processes import space
from storage.service.surroundings import digest, why_not
from storage.service.ways import Connector

log = logging.getLogger(__name__)

RESTART_S = 20.0
"""For so long a service that is lost is waited for, which may be starting again."""
_ENDS = (CheckpointEvent.COMMITTED, CheckpointEvent.FAILED)
_END_S = 5.0


class ServiceBackend:
    """A `storage.saving.committer.Backend` that hands jobs to the service. `start` begins to look for it."""

    def __init__(
        self, connector: Connector, direct: InProcess, ownership: Ownership, saves: Saves, report: Reporter
    ) -> None:
        self._connector = connector
        self._direct = direct
        self._ownership = ownership
        self._saves = saves
        self._report = report
        self._notes = Notes(address.kept(connector.path))
        self._state = threading.Condition()
        self._custody = Custody()
        self._told: set[tuple[CheckpointEvent, object]] = set()  # of saves that have not ended
        self._directly: list[Running] = []
        self._pool = Pool(1, "storage-hand-over", wait_for_turn)
        self._late: list[tuple[StagedMemory, threading.Event]] = []  # copies, and when each is handed over
        self._tables = table.TableWriter()
        self._channel: Channel | None = None
        self._never: str | None = None  # why the service will not do for this process
        self._is_away = False
        self._is_closed = False
        self._thread: threading.Thread | None = None

    @property
    def session(self) -> str:
        """What the service knows this rank by."""
        return f"{self._ownership.claim.token}-{self._saves.rank}"

    @property
    def holds(self) -> bool:
        """See `Backend.holds`."""
        return self._saves.holds and self._never is None

    @property
    def is_copying(self) -> bool:
        """See `Backend.is_copying`."""
        return self._custody.copying is not None

    def start(self) -> None:
        """Look for the service, on a thread that also listens to it; harmless where that is done."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="storage-service", daemon=True)
            self._thread.start()

    def submit(self, running: Running) -> None:
        """See `Backend.submit`. When it returns, the save is the service's, if there is one."""
        self.start()
        if self._goes_directly():
            self._submit_directly(running, Tried.NOT_YET)
        else:
            self._begin(running)

    def park(self, running: Running) -> bool:
        """See `Backend.park`."""
        self.start()
        if self._goes_directly():
            return False
        with self._state:
            self._custody.park(running.job.attempt.id)
        self._begin(running)
        return True

    def go_on(self, running: Running) -> None:
        """See `Backend.go_on`."""
        attempt = running.job.attempt.id
        with self._state:
            back = self._custody.go_on(attempt)
            if attempt in self._custody.handed and self._channel is not None:
                self._say(self._channel, GoOn(attempt=attempt))
        if isinstance(back, Running):
            self._submit_directly(back, Tried.NOT_YET)
        elif back is not None:
            self._take_back(back, is_shared=back.is_sent)

    def give_way(self, running: Running) -> None:
        """See `Backend.give_way`. The service hears of it by the next job."""
        with self._state:
            self._custody.give_way(running, is_connected=self._channel is not None)
        self._notes.drop(name_of(self.session, running.job.attempt.id))

    def _begin(self, running: Running) -> None:
        stage = stage_of(running.job, self.session, self._ownership.claim.owner, self._saves)
        write_down(self._notes, stage, running)
        if running.job.copies and self.holds:
            with self._state:
                self._custody.copying = stage.attempt.id
        staged = running.job.staged
        if staged is not None and staged.is_pending:
            self._late = [(other, end) for other, end in self._late if not end.is_set()]
            self._late.append((staged, handed := threading.Event()))
            hand_over = functools.partial(self._pool.submit, self._hand_over, running, stage)
            staged.then(lambda: hand_over().add_done_callback(lambda _: handed.set()))
        else:
            self._hand_over(running, stage)

    def _hand_over(self, running: Running, stage: Stage) -> None:
        """Hand a job over that is staged, or about to be."""
        try:
            payloads, slot, error = whole(running.job)
            handed = Handed(running, stage, self._tables.write(payloads, slot, running.job.contents, error), slot)
        except (MemoryError, OSError, StorageError) as why:
            self._report(CheckpointEvent.DIRECT, url=self._saves.url, reason=f"no table of it can be made: {why}")
            with self._state:
                is_for_later = self._custody.keep_back(running)
            if not is_for_later:
                self._submit_directly(running, Tried.NOT_YET)
            return
        with self._state:
            if not self._custody.hand(handed):
                return
            if is_nobodys := self._never is not None:  # by now: nobody would ever take it up
                self._custody.refuse(stage.attempt.id)
            self._state.notify_all()
            if not self._is_away:
                self._state.wait_for(lambda: self._channel is not None or self._is_away, self._connector.patience_s)
            is_still_its = self._custody.handed.get(stage.attempt.id) is handed  # nobody else has it by now
            if self._channel is not None and is_still_its and not handed.is_sent:  # as it is by who has just connected
                self._send(self._channel, handed)
        if is_nobodys and not handed.waits:
            self._take_back(handed, is_shared=False)
        elif handed.slot is None:  # the table has a copy of all of it
            running.free()

    def close(self, *, abandon: bool) -> None:
        """See `Backend.close`. What is abandoned goes on without this process, if the service has it."""
        for staged, is_handed in self._late:
            staged.drain()
            is_handed.wait()
        with self._state:
            if not abandon:
                self._state.wait_for(lambda: not self._custody.handed)
        self._direct.close(abandon=abandon)
        with self._state:
            self._is_closed = True
            self._state.notify_all()
            channel, left = self._channel, list(self._custody.handed.values())
        if channel is not None:
            channel.close()
        if self._thread is not None:
            self._thread.join(_END_S)
        for handed in left:
            if not handed.is_sent:
                self._fail(handed.running, "this process ends before a checkpoint service has taken it over")
                continue
            handed.running.free()
            handed.running.committed.cancel()
        self._let_go_of_kept()
        self._pool.shutdown()

    # --- handing over

    def _goes_directly(self) -> bool:
        """Saves of a rank end in the order in which they began, so none overtakes one that this process carries out."""
        with self._state:
            self._directly = [running for running in self._directly if not running.committed.done()]
            return bool(self._directly) or self._never is not None or self._is_closed

    def _submit_directly(self, running: Running, tried: Tried) -> None:
        with self._state:
            self._directly.append(running)
        self._direct.submit(running, tried)

    def _send(self, channel: Channel, handed: Handed) -> None:
        """Send it; where that fails, whoever listens finds the connection ended, and sends it again."""
        stage, fds = handed.message()
        handed.is_sent = True
        try:
            channel.send(stage, fds)
        except OSError as error:
            log.warning("step %d was not taken by the service: %s", stage.attempt.step, error)
            channel.close()

    def _say(self, channel: Channel, message: ServiceMessage) -> bool:
        """Send what is said anew with the next connection, should this one have ended; whether it was sent."""
        try:
            channel.send(message)
        except OSError as error:
            log.info("the service cannot be told %s: %s", type(message).__name__, error)
            return False
        return True

    # --- listening

    def _run(self) -> None:
        wait_for_turn()
        patience_s = RESTART_S
        while True:
            with self._state:
                before: list[Running] = []
                if self._is_away:  # it is looked for again when there is something for it to do
                    self._state.wait_for(lambda: self._is_closed or bool(self._custody.handed))
                    before = list(self._directly)
                if self._is_closed:
                    return
            wait([running.committed for running in before])  # nothing overtakes what this process carries out
            try:
                channel, welcome = self._connector.connect(self._hello(), patience_s)
            except (OSError, ProtocolError) as error:
                self._lose(str(error), forever=isinstance(error, ProtocolError))
                patience_s = 0.0
                continue
            if (why := why_not(self._saves.url, digest(os.environ), welcome.environment)) is not None:
                channel.close()
                self._lose(why, forever=True)
                return
            patience_s = RESTART_S
            self._take_up(channel)
            silent = functools.partial(self._report, CheckpointEvent.SERVICE_SILENT, url=self._saves.url)
            listen(channel, self._hear, lambda: bool(self._custody.handed), lambda: self._is_closed, silent)
            channel.close()
            with self._state:
                self._channel = None
            self._let_go_of_kept()  # a service that has started anew holds nothing any more

    def _hello(self) -> Hello:
        return Hello(pid=os.getpid(), pid_space=space(), session=self.session, environment=digest(os.environ))

    def _take_up(self, channel: Channel) -> None:
        with self._state:
            if self._is_closed:  # what nobody had by then was said to be lost
                return
            was_away, self._is_away = self._is_away, False
            if (unheard := self._custody.come_back()) and not self._say(channel, TakenBack(attempts=tuple(unheard))):
                self._custody.repeat(unheard)
            for handed in self._custody.handed.values():
                self._send(channel, handed)
            self._channel = channel
            self._state.notify_all()
        if was_away:
            self._report(CheckpointEvent.SERVICE_BACK, url=self._saves.url)

    def _hear(self, channel: Channel, message: ServiceMessage, fds: list[int]) -> None:
        close_all(fds)
        match message:
            case KeptHere() | Stored() | CopySettled():
                self._note(message)
            case Released(attempt=attempt):
                self._release(attempt)
            case Told(number=number, event=event, fields=fields):
                self._tell(event, fields)
                channel.send(Heard(number=number))
            case Ended(number=number, attempt=attempt):
                self._end(message)
                channel.send(Heard(number=number))
            case Rejected(attempt=attempt, reason=reason) if attempt:
                self._refuse(attempt, reason)

    def _tell(self, event: str, fields: dict[str, object]) -> None:
        try:
            known = CheckpointEvent(event)
        except ValueError:
            log.warning("the service tells of %s, which is not known here: %s", event, fields)
            return
        if known in _ENDS:
            outcome = (known, fields.get("step"))
            if outcome in self._told:  # by a service that was killed before it could say that the save has ended
                return
            with self._state:
                is_its = any(one.stage.attempt.step == fields.get("step") for one in self._custody.handed.values())
            if not is_its:  # this process has taken it back, and tells what becomes of it
                log.info("the service tells of %s, which is not its own: %s", event, fields)
                return
            self._told.add(outcome)
        self._report(known, **fields)

    def _note(self, told: KeptHere | Stored | CopySettled) -> None:
        """Its part is kept, or stored; the slot may still be held in memory, until a newer state is."""
        with self._state:
            if isinstance(told, CopySettled):
                self._custody.settled(told.attempt)
            elif (handed := self._custody.handed.get(told.attempt)) is not None:
                handed.running.keep() if isinstance(told, KeptHere) else handed.running.stored.set()

    def _release(self, attempt: str) -> None:
        with self._state:
            running = self._custody.release(attempt)
        if running is not None:
            running.free()

    def _let_go_of_kept(self) -> None:
        with self._state:
            kept = self._custody.let_go_of_kept()
        for running in kept:
            running.free()

    def _end(self, ended: Ended) -> None:
        if ended.fenced is not None:
            self._ownership.note(Fenced(ended.fenced))
        with self._state:
            handed = self._custody.end(ended.attempt, holds=self._saves.holds)
            if handed is not None:
                self._told = {(event, step) for event, step in self._told if step != handed.stage.attempt.step}
                handed.running.stored.set()
                handed.running.committed.set_result(ended.committed)
            self._state.notify_all()

    def _refuse(self, attempt: str, reason: str) -> None:
        with self._state:
            handed = self._custody.refuse(attempt)
        if handed is not None:
            self._report(CheckpointEvent.DIRECT, url=self._saves.url, reason=reason)
            if not handed.waits:
                self._take_back(handed, is_shared=False)

    # --- without the service

    def _lose(self, reason: str, *, forever: bool) -> None:
        """Go on in this process with all that the service has not brought to its end."""
        with self._state:
            was_away, self._is_away = self._is_away, True
            if forever:
                self._never = reason
            handed = self._custody.lose()
            self._state.notify_all()
            is_closed = self._is_closed
        if not was_away and not is_closed:
            self._report(CheckpointEvent.DIRECT, url=self._saves.url, reason=reason)
        for one in handed:
            # a service that is frozen has not gone: when it goes on, it stores what it finds in the slot
            self._take_back(one, is_shared=one.is_sent)

    def _take_back(self, handed: Handed, *, is_shared: bool) -> None:
        """Carry out here what was the service's, from the memory in which it was handed over."""
        before = handed.running
        try:
            staged = table.read(handed.table, handed.slot)
        except Corrupt as error:
            handed.table.close()
            self._fail(replace(before, is_shared=is_shared), str(error))
            return
        job = SaveJob(**vars(before.job) | {"payloads": staged.payloads, "staging_error": staged.staging_error})
        before.kept.clear()  # the memory is not for others any more
        running = replace(before, job=job, is_shared=is_shared)
        before.committed.add_done_callback(lambda _: handed.table.close())
        self._submit_directly(running, handed.tried)

    def _fail(self, running: Running, reason: str) -> None:
        self._report(CheckpointEvent.FAILED, step=running.job.attempt.step, seconds=0.0, bytes=0, reason=reason)
        running.free()
        running.committed.set_result(False)
