"""torch's `RendezvousHandler` on our membership.

What differs from torch's own handlers: nothing is pickled; the answer to `num_nodes_waiting` is a local read, fed by
a watch, that also tells of lost nodes; and every generation gets a fresh worker store, hosted by the node of rank 0,
so that the loss of a node never takes the store's address with it.
"""

from __future__ import annotations

import contextlib
import logging
import socket
from datetime import timedelta
from typing import Any

from torch.distributed import TCPStore
from torch.distributed.elastic.rendezvous.api import (
    RendezvousClosedError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousStoreInfo,
    RendezvousTimeoutError,
)

from launcher.coordination.member import Member
from launcher.errors import JobClosed, KVUnavailable
from launcher.health.liveness import connect
from launcher.health.preflight import PATIENCE_S, Preflight
from launcher.rounds.records import Round, Status

log = logging.getLogger(__name__)

_JOIN_MARGIN_S = 30.0  # the leader leaves out who does not join within the job's `stop_timeout`
_STORE_TIMEOUT_S = 60.0
_STORE_CONNECT_TIMEOUT_S = 5.0
_SILENT_S = 600  # until the kernel shows a connection that says nothing, tcp(7)
_FIRST_STAY_OUT_S = 5.0
_LONGEST_STAY_OUT_S = 300.0


class _Unreachable(Exception):
    """The worker store of a round cannot be reached from here, or not be hosted here."""


def stay_out_s(num_failures: int) -> float:
    """Return how long a node stays out after it could not reach the worker store so many times in a row."""
    return min(_LONGEST_STAY_OUT_S, _FIRST_STAY_OUT_S * 2.0 ** min(num_failures - 1, 16))


class MemberRendezvous(RendezvousHandler):
    """Rendezvous of one node: `next_rendezvous` blocks until the node takes part in a new round.

    Like every handler of torch's, for the agent's main thread only.
    """

    def __init__(
        self,
        member: Member,
        *,
        backend: str,
        run_id: str,
        address: str,
        timeout_s: float,
        preflight: Preflight | None = None,
    ) -> None:
        self.round: Round | None = None
        self._preflight = preflight
        self._member = member
        self._backend = backend
        self._run_id = run_id
        self._address = address
        self._timeout_s = timeout_s
        self._store: Any = None
        self._num_unreachable = 0

    @property
    def generation(self) -> int:
        """The generation that this node last joined, 0 before the first."""
        return self.round.generation if self.round else 0

    def get_backend(self) -> str:
        return self._backend

    def get_run_id(self) -> str:
        return self._run_id

    @property
    def use_agent_store(self) -> bool:
        """Workers use the store of rank 0's agent; it outlives them and is up before they start."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait for a round and join it. The workers of the round before must have stopped.

        Raises:
            RendezvousClosedError: the job ended.
            RendezvousTimeoutError: no round within the time given.
        """
        self._store = None  # whoever hosted the last generation's store stops doing so
        while True:
            if self._is_fit():
                self._member.announce(Status.READY)
            try:
                found = self._member.wait_round(self._timeout_s)
            except JobClosed as error:
                raise RendezvousClosedError(str(error)) from error
            except TimeoutError as error:
                if self._member.is_spare():
                    continue  # the job is well; it may need this node yet
                raise RendezvousTimeoutError(str(error)) from error
            place = found.place_of(self._member.node_id)
            assert place is not None
            try:
                store, info = self._host(found.generation) if place == 0 else self._connect(found.generation)
            except _Unreachable as error:
                self._num_unreachable += 1
                self._member.stay_out(str(error), stay_out_s(self._num_unreachable))
                continue
            except (
                KVUnavailable,
                TimeoutError,
                OSError,
                RuntimeError,
            ) as error:  # torch's DistStoreError is a RuntimeError
                log.warning("generation %d broke while it formed: %s", found.generation, error)
                continue
            self._num_unreachable = 0
            self._store = store
            self.round = found
            return RendezvousInfo(store, place, len(found.participants), info)

    def _is_fit(self) -> bool:
        """Wait until this node is fit to run workers; returns False if there is nothing left to take part in."""
        if self._preflight is None:
            return True
        member = self._member
        return self._preflight.pass_or_wait(
            member.hold_back,
            member.wait,
            lambda: bool(member.outcome()) or member.draining(),
            self.generation,
            min(PATIENCE_S, member.rules.stop_timeout_s / 4),
        )

    def _host(self, generation: int) -> tuple[TCPStore, RendezvousStoreInfo]:
        try:
            store, port = self._listen()
        except (OSError, RuntimeError) as error:  # the address is gone, or no descriptor is left
            raise _Unreachable(f"cannot host the workers' store at {self._address}: {error}") from error
        self._join(generation, worker_store=f"{self._address} {port}")
        return store, RendezvousStoreInfo(self._address, port)

    def _listen(self) -> tuple[TCPStore, int]:
        """Listen on this node's own address only: a TCPStore left to itself listens on every interface."""
        family = socket.AF_INET6 if ":" in self._address else socket.AF_INET
        listener = socket.create_server((self._address, 0), family=family, backlog=1024)
        with contextlib.suppress(OSError):  # whoever says nothing costs no descriptor: workers speak at once
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, _SILENT_S)
        port: int = listener.getsockname()[1]
        store = TCPStore(
            self._address,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=_STORE_TIMEOUT_S),
            master_listen_fd=listener.detach(),
        )
        return store, port

    def _connect(self, generation: int) -> tuple[Any, RendezvousStoreInfo]:
        """Join, and see that this node's workers will reach their store."""
        joined = self._join(generation)
        address, _, port_text = joined.worker_store.rpartition(" ")
        port = int(port_text)
        try:
            connect(address, port, _STORE_CONNECT_TIMEOUT_S).close()
        except OSError as error:
            if broken := self._member.broken(generation):  # no wonder
                raise TimeoutError(broken.reason) from error
            self._member.cannot_reach(joined.participants[0].node_id)
            raise _Unreachable(f"cannot reach the workers' store at {address}:{port}: {error}") from error
        return self._open(address, port), RendezvousStoreInfo(address, port)

    def _open(self, address: str, port: int) -> Any:
        """Open the worker store as an agent sees it."""
        return _LateStore(address, port)

    def _join(self, generation: int, worker_store: str = "") -> Round:
        timeout_s = self._member.rules.stop_timeout_s + _JOIN_MARGIN_S
        return self._member.join(generation, timeout_s, worker_store=worker_store)

    def num_nodes_waiting(self) -> int:
        """Return 1 while the workers should be restarted: a participant is gone, or a better round can be formed."""
        if self.generation == 0:
            return 0
        broken = self._member.broken(self.generation)
        return 1 if broken or self._member.stop_requested(self.generation) else 0

    def is_closed(self) -> bool:
        return bool(self._member.outcome())

    def set_closed(self) -> None:
        """Do nothing: a job is closed by its leader, when its work is done or its budget used, not by one agent."""

    def shutdown(self) -> bool:
        """Leave the job, so that the others need not wait for this node's lease."""
        self._member.leave()
        return True


class _LateStore:
    """A client of the worker store that connects when it is first used.

    Our agent does not use one: ranks follow from the round. It saves rank 0's agent a connection per node, and this
    node the look-up of a host name that torch makes for each (reverse DNS, seconds where it does not answer).
    """

    def __init__(self, address: str, port: int) -> None:
        self._address = address
        self._port = port
        self._store: TCPStore | None = None

    def __getattr__(self, name: str) -> Any:
        if self._store is None:
            self._store = open_store(self._address, self._port)
        return getattr(self._store, name)


def open_store(address: str, port: int) -> TCPStore:
    """Open a client of the worker store. Raises torch's DistStoreError, a RuntimeError, where it cannot be reached."""
    store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=_STORE_TIMEOUT_S))
    store.set_timeout(timedelta(seconds=_STORE_TIMEOUT_S))
    return store
