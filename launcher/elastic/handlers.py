"""`torchrun --rdzv-backend=etcd3`: our membership under torch's own agent, with the user's script as it is.

What a stock agent gets: it restarts its workers when a node is lost (killed, frozen or cut off, by the lease), leaves
or joins, because `num_nodes_waiting` tells of all of these; a node is not counted by its slots (torch hands them to
no handler; its agents exchange them through the round's store), and there is no mesh.

What it does not get, because torch's agent does it its own way: a worker that fails costs one of `--max-restarts`
also where a lost node was the cause; restarts are not at a step boundary; workers outlive an agent that is killed
alone; a node that is cut off stops its workers with torch's grace, which may be longer than its lease; an agent whose
peer dies in the very moment in which they exchange slots dies a minute later, and is restarted by whoever runs it.

Ends of a job:

* Its workers are done: the agent enters its exit barrier, which here means that this node says DONE and waits for the
  others to say so. A node that finishes earlier neither leaves nor restarts the others, and none joins any more.
* Its workers failed for good (`--max-restarts` used): the job is closed for all, with the failure as the reason.
* A signal: torch does not call `shutdown` then; an exit handler leaves, and the others go on.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import (
    RendezvousClosedError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
)

from launcher.coordination.member import Member
from launcher.elastic.joining import Meeting, arrive, join, plan_no_mesh
from launcher.elastic.rdzv_conf import RendezvousConf
from launcher.elastic.rendezvous import MemberRendezvous, open_store
from launcher.environment import Environment
from launcher.errors import UsageError
from launcher.events import EventLog
from launcher.rounds.records import SUCCEEDED, Failure, Round, Status
from launcher.torch_private import is_of_exit_barrier

log = logging.getLogger(__name__)

_CLOSE_TIMEOUT_S = 5.0
_POLL_S = 0.5


def create_handler(params: RendezvousParameters) -> RendezvousHandler:
    """Join the job, and return the handler of this node.

    Raises:
        SystemExit: with code 2, after one line on stderr, for the user's mistakes: torchrun would print a traceback
            of any other exception.
    """
    try:
        return _join(params)
    except UsageError as error:
        sys.stderr.write(f"torchrun: error: {error}\n")
        raise SystemExit(error.exit_code) from error


def _join(params: RendezvousParameters) -> TorchrunRendezvous:
    conf = RendezvousConf.parse(params.config)
    meeting = Meeting(params.backend, params.endpoint, params.run_id, conf, params.local_addr)
    with contextlib.ExitStack() as stack:
        arrival = stack.enter_context(arrive(meeting, slots=1))
        emit = EventLog(None, run_id=params.run_id, node=arrival.node.node_id)
        rules = conf.rules(params.min_nodes, params.max_nodes)
        member = stack.enter_context(join(arrival, rules, plan_no_mesh, emit))
        return TorchrunRendezvous(member, meeting, arrival.node.address, stack.pop_all())


class TorchrunRendezvous(MemberRendezvous):
    """The handler of one node under torch's `LocalElasticAgent`; for its main thread."""

    def __init__(self, member: Member, meeting: Meeting, address: str, joined: contextlib.ExitStack) -> None:
        """`joined`: closed when this node leaves."""
        super().__init__(
            member,
            backend=meeting.backend,
            run_id=meeting.run_id,
            address=address,
            timeout_s=meeting.conf.timeout,
        )
        self._joined = joined
        self._left = False
        self._told_generation = 0
        atexit.register(self._leave)

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait for a round that all its nodes have joined.

        Raises:
            SystemExit: with code 0: the job succeeded without this node, a spare. (torch knows no other way for an
                agent without workers to end well.)
            RendezvousClosedError: the job failed.
            RendezvousTimeoutError: no round was formed in the time given.
        """
        try:
            info = super().next_rendezvous()
        except RendezvousClosedError:
            if self._member.outcome() == SUCCEEDED:
                self._end_as_spare()
            raise
        assert self.round is not None
        os.environ.update(self._worker_environment(self.round))
        store = _RoundStore(info.store, self._wait_for_the_others, self._announce_done)
        return RendezvousInfo(store, info.rank, info.world_size, info.bootstrap_store_info)  # type: ignore[arg-type]

    def _open(self, address: str, port: int) -> Any:
        return open_store(address, port)  # at once: torch's agents meet there before they start their workers

    def num_nodes_waiting(self) -> int:
        """As `MemberRendezvous`; also log once why the workers are restarted, which torch's agent does not know."""
        waiting = super().num_nodes_waiting()
        if waiting and self._told_generation != self.generation:
            self._told_generation = self.generation
            broken = self._member.broken(self.generation)
            reason = broken.reason if broken else self._member.stop_requested(self.generation)
            log.warning("[%s] generation %d ends: %s", self._member.node_id, self.generation, reason)
        return waiting

    def _end_as_spare(self) -> NoReturn:
        log.warning("job %s has succeeded, this node is not needed; another --rdzv-id runs it again", self._run_id)
        raise SystemExit(0)

    def _worker_environment(self, current: Round) -> dict[str, str]:
        """Return what workers inherit from the agent's environment; a checkpointer in them fences by the generation."""
        return Environment(
            generation=current.generation, lineage=current.lineage, run_id=self._run_id, node=self._member.node_id
        ).to_env()

    # --- the end

    def _announce_done(self) -> None:
        self._member.announce(Status.DONE)

    def _wait_for_the_others(self) -> None:
        """Wait until all workers of the round are done, or the round goes on without this node."""
        while not self._member.outcome():
            if broken := self._member.broken(self.generation):
                log.warning("this node's workers are done, but the others start anew: %s", broken.reason)
                return
            self._member.wait(_POLL_S)

    def set_closed(self) -> None:
        """End the job for all nodes, as failed."""
        self._close_job(Failure(rank=-1, exit_code=1, message="its agent closed the job", ts=time.time()))

    def _close_job(self, failure: Failure) -> None:
        """Tell the leader of a failure that no restart mends, and wait for it to close the job."""
        final = Failure(failure.rank, failure.exit_code, failure.message, failure.ts, restartable=False)
        self._member.announce(Status.STOPPING, reason="its workers failed for good", failure=final)
        ends_s = time.monotonic() + _CLOSE_TIMEOUT_S
        while not self._member.outcome():
            if time.monotonic() >= ends_s:
                log.warning("the job could not be closed within %g s; the other nodes may go on", _CLOSE_TIMEOUT_S)
                return
            self._member.wait(_POLL_S)

    def shutdown(self) -> bool:
        """Leave. torch calls this as an agent ends, except for a signal; a failure for good closes the job."""
        error = sys.exc_info()[1]  # `launch_agent` calls this in a `finally`: the exception on its way tells the end
        if isinstance(error, ChildFailedError) and not self._left:
            rank, first = error.get_first_failure()
            # Without an error file, `message` is torch's advice on how to get one.
            lines = str(first.message).strip().splitlines() if first.error_file_data else []
            self._close_job(Failure(rank, first.exitcode, lines[0][:500] if lines else "", float(first.timestamp)))
        self._leave()
        return True

    def _leave(self) -> None:
        self._left = True
        atexit.unregister(self._leave)
        self._joined.close()


class _RoundStore:
    """The round's store as torch's agent uses it, with its exit barrier taken out.

    torch's barrier waits in the store of rank 0's agent, for five minutes at most, and does not know that a node is
    lost. The membership knows: entering the barrier is saying that this node is done.
    """

    def __init__(self, store: Any, wait_for_the_others: Callable[[], None], announce_done: Callable[[], None]) -> None:
        self._store = store
        self._wait_for_the_others = wait_for_the_others
        self._announce_done = announce_done

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def add(self, key: str, amount: int) -> int:
        if is_of_exit_barrier([key]):
            self._announce_done()
            return 0  # never the last one, who would tell the others through the store
        return int(self._store.add(key, amount))

    def wait(self, keys: Sequence[str], *timeout: Any) -> None:
        if is_of_exit_barrier(keys):
            self._wait_for_the_others()
        else:
            self._store.wait(keys, *timeout)
