"""A watch on etcd that outlives its streams: a broken one is opened anew, at the endpoint in use, where it stood."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Iterator
from typing import Any, Final, Self

from launcher.errors import Compacted, KVUnavailable
from launcher.kv.base import Entry, WatchEvent
from launcher.kv.etcd.transport import (
    CALL_TIMEOUT_S,
    EndpointChannel,
    Transport,
    etcdrpc,
    grpc,
    is_half_close_refused,
    is_token_refused,
    metadata_of,
)

log = logging.getLogger(__name__)

_DELETE: Final = 1  # mvccpb.Event.DELETE
_LOOK: Final = object()
"""In a stream's inbox: another endpoint is in use now."""


class _StreamEnded(Exception):
    """A stream is of no more use. The watch may open another one."""


class _MustStayOpen(_StreamEnded):
    """A stream was ended because this side had closed its direction."""


class _WatchStream:
    """One gRPC stream and the thread that reads it into `inbox`: responses, now and then `_LOOK`, at last None."""

    def __init__(self, transport: Transport, request: Any) -> None:
        self.opened = False
        self.opens_by_s = time.monotonic() + CALL_TIMEOUT_S
        self.inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.error: Any = None
        self.held_open = transport.endpoints.holds_streams_open
        self._transport = transport
        self._request = request
        self._closed = threading.Event()

    def open(self) -> Self:
        """Ask the endpoint in use, and read what it says.

        Raises:
            _StreamEnded: it cannot be asked.
        """
        transport = self._transport
        transport.endpoints.tell(self._look)  # before one is chosen
        try:
            self.peer: EndpointChannel = transport.peer()
            self.token = transport.authenticate(self.peer, CALL_TIMEOUT_S)
            # `hasleader`: etcd ends the stream of a member that is cut off from the others, instead of staying silent
            metadata = (("hasleader", "true"), *(metadata_of(self.token) or ()))
            if self.held_open:
                self._responses = self.peer.watch_held_open(self._requests(), metadata=metadata)
            else:
                self._responses = self.peer.watch(self._request, metadata=metadata)
            threading.Thread(target=self._read, name="etcd-watch", daemon=True).start()
        except grpc.RpcError as error:
            transport.endpoints.tell_no_more(self._look)
            transport.note_failure(self.peer, error)
            raise _StreamEnded(f"{transport.name(self.peer.index)}: {error.details()}") from error
        except BaseException:
            transport.endpoints.tell_no_more(self._look)
            raise
        return self

    def _requests(self) -> Iterator[Any]:
        yield self._request
        self._closed.wait()

    def _look(self) -> None:
        self.inbox.put(_LOOK)

    def _read(self) -> None:
        try:
            for response in self._responses:
                self.inbox.put(response)
        except grpc.RpcError as error:
            self.error = error
        finally:
            self._closed.set()
            self.inbox.put(None)

    def close(self) -> None:
        self._closed.set()
        self._transport.endpoints.tell_no_more(self._look)
        self._responses.cancel()


class EtcdWatch:
    """A `launcher.kv.Watch` of a range of keys."""

    def __init__(self, transport: Transport, key: bytes, range_end: bytes, from_revision: int) -> None:
        self._transport = transport
        self._range = (key, range_end)
        self._next_revision = max(1, from_revision)
        self._stream: _WatchStream | None = None
        self._cancelled = threading.Event()
        self._lock = threading.Lock()  # `cancel` comes from another thread

    def next(self, timeout_s: float) -> tuple[WatchEvent, ...]:
        ends_s = time.monotonic() + timeout_s
        failures = 0
        while not self._cancelled.is_set():
            try:
                return self._receive(self._opened(), ends_s)
            except (_StreamEnded, ValueError) as error:  # ValueError: the channel was closed
                self._drop()
                failures += not isinstance(error, _MustStayOpen)
                if self._cancelled.is_set():
                    break
                if failures >= self._transport.endpoints.num_endpoints:
                    raise KVUnavailable(f"watch interrupted before revision {self._next_revision}: {error}") from error
                log.info("watch goes on from revision %d: %s", self._next_revision, error)
        return ()

    def _opened(self) -> _WatchStream:
        stream = self._stream
        if stream is None:
            key, range_end = self._range
            create = etcdrpc.WatchCreateRequest(key=key, range_end=range_end, start_revision=self._next_revision)
            stream = _WatchStream(self._transport, etcdrpc.WatchRequest(create_request=create)).open()
            with self._lock:
                self._stream = stream
        if self._cancelled.is_set():  # perhaps while it was being opened: `cancel` saw no stream to close
            raise _StreamEnded("cancelled")
        return stream

    def _receive(self, stream: _WatchStream, ends_s: float) -> tuple[WatchEvent, ...]:
        events: list[WatchEvent] = []
        while not self._cancelled.is_set():
            wait_until_s = ends_s if stream.opened else min(ends_s, stream.opens_by_s)
            try:
                response = stream.inbox.get(timeout=0.0 if events else max(0.0, wait_until_s - time.monotonic()))
            except queue.Empty:
                if events or time.monotonic() >= ends_s:
                    break
                response = _LOOK
            if events and (response is None or response is _LOOK):
                stream.inbox.put(response)  # for the next call; these events come first
                break
            if response is None:
                if self._cancelled.is_set():  # ended by us, which says nothing of the endpoint
                    break
                self._raise_end(stream)
            if response is _LOOK:
                self._check(stream)
                continue
            if not response.events and (response.canceled or response.compact_revision):
                self._raise_cancelled(stream, response)
            stream.opened = True
            events.extend(self._events_of(response))
        return tuple(events)

    def _events_of(self, response: Any) -> Iterator[WatchEvent]:
        for event in response.events:
            kv = event.kv
            if kv.mod_revision < self._next_revision:
                continue
            key = kv.key.decode()
            entry = None if event.type == _DELETE else Entry(key, kv.value, kv.mod_revision, kv.create_revision)
            yield WatchEvent(key, entry, kv.mod_revision)
        if response.events:  # etcd never splits a revision over two responses
            self._next_revision = max(self._next_revision, response.events[-1].kv.mod_revision + 1)

    def _check(self, stream: _WatchStream) -> None:
        """Give up a stream that broke silently. What other calls found out tells it from one that is only quiet."""
        if not stream.opened and time.monotonic() >= stream.opens_by_s:
            self._transport.endpoints.failed(stream.peer.index)
            raise _StreamEnded(f"no answer from {self._transport.name(stream.peer.index)}")
        if self._transport.endpoints.current != stream.peer.index:
            raise _StreamEnded(f"{self._transport.name(stream.peer.index)} no longer answers calls")

    def _raise_end(self, stream: _WatchStream) -> None:
        name = self._transport.name(stream.peer.index)
        if not stream.held_open and (stream.error is None or is_half_close_refused(stream.error.details())):
            self._transport.endpoints.holds_streams_open = True
            raise _MustStayOpen(f"{name} ended a stream that was closed in one direction; both stay open from now on")
        if stream.error is None:
            raise _StreamEnded(f"{name} ended the stream")
        self._transport.note_failure(stream.peer, stream.error)
        if is_token_refused(stream.error.details()):
            self._transport.forget_token(stream.token)
        raise _StreamEnded(f"{name}: {stream.error.details()}")

    def _raise_cancelled(self, stream: _WatchStream, response: Any) -> None:
        if response.compact_revision:
            self._drop()
            raise Compacted(
                f"revision {self._next_revision} is forgotten; the oldest kept is {response.compact_revision}"
            )
        # etcd 3.5 says "permission denied" of an expired token too: a new one tells which it was
        self._transport.forget_token(stream.token)
        raise _StreamEnded(f"etcd cancelled the watch: {response.cancel_reason}")

    def _drop(self) -> None:
        with self._lock:
            stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()

    def cancel(self) -> None:
        self._cancelled.set()
        self._drop()

    def is_cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled.is_set()
