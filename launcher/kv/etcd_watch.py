"""A watch on etcd that outlives its streams: a broken one is opened anew, at the endpoint in use, where it stood."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

from launcher.errors import Compacted, KVUnavailable
from launcher.kv.base import Entry, WatchEvent
from launcher.kv.etcd_transport import (
    CALL_TIMEOUT_S,
    Peer,
    Transport,
    etcdrpc,
    grpc,
    is_token_refused,
    metadata_of,
)

log = logging.getLogger(__name__)

_LOOK_S: Final = 0.25
_DELETE: Final = 1  # mvccpb.Event.DELETE


class _StreamEnded(Exception):
    """A stream is of no more use; the watch may open another one."""


class _Stream:
    """One gRPC stream and the thread that reads it into `inbox`: responses, then None."""

    def __init__(self, transport: Transport, request: Any) -> None:
        self.peer: Peer = transport.peer()
        self.opened = False
        self.opens_by_s = time.monotonic() + CALL_TIMEOUT_S
        self.inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.error: Any = None
        try:
            self.token = transport.authenticate(self.peer, CALL_TIMEOUT_S)
        except grpc.RpcError as error:
            transport.note_failure(self.peer, error)
            raise _StreamEnded(f"{transport.name(self.peer.index)}: {error.details()}") from error
        self._ended = threading.Event()
        # `hasleader`: etcd ends the stream of a member that is cut off from the others, instead of staying silent
        metadata = (("hasleader", "true"), *(metadata_of(self.token) or ()))
        self._responses = self.peer.watch.Watch(self._requests(request), metadata=metadata)
        threading.Thread(target=self._read, name="etcd-watch", daemon=True).start()

    def _requests(self, request: Any) -> Iterator[Any]:
        yield request
        self._ended.wait()  # a half-closed stream is ended by some proxies

    def _read(self) -> None:
        try:
            for response in self._responses:
                self.inbox.put(response)
        except grpc.RpcError as error:
            self.error = error
        finally:
            self._ended.set()
            self.inbox.put(None)

    def close(self) -> None:
        self._ended.set()
        self._responses.cancel()


class EtcdWatch:
    """See `launcher.kv.base.Watch`. `strip` takes the namespace off a key."""

    def __init__(
        self, transport: Transport, key: bytes, range_end: bytes, from_revision: int, strip: Callable[[bytes], str]
    ) -> None:
        self._transport = transport
        self._range = (key, range_end)
        self._next_revision = max(1, from_revision)
        self._strip = strip
        self._stream: _Stream | None = None
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
                failures += 1
                if self._cancelled.is_set():
                    break
                if failures >= self._transport.endpoints.num_endpoints:
                    raise KVUnavailable(f"watch interrupted before revision {self._next_revision}: {error}") from error
                log.info("watch goes on from revision %d: %s", self._next_revision, error)
        return ()

    def _opened(self) -> _Stream:
        stream = self._stream
        if stream is None:
            key, range_end = self._range
            create = etcdrpc.WatchCreateRequest(key=key, range_end=range_end, start_revision=self._next_revision)
            stream = _Stream(self._transport, etcdrpc.WatchRequest(create_request=create))
            with self._lock:
                self._stream = stream
        if self._cancelled.is_set():  # perhaps while it was being opened: `cancel` saw no stream to close
            raise _StreamEnded("cancelled")
        return stream

    def _receive(self, stream: _Stream, ends_s: float) -> tuple[WatchEvent, ...]:
        events: list[WatchEvent] = []
        while not self._cancelled.is_set():
            left_s = 0.0 if events else ends_s - time.monotonic()
            try:
                response = stream.inbox.get(timeout=max(0.0, min(left_s, _LOOK_S)))
            except queue.Empty:
                if events or left_s <= 0:
                    break
                self._check(stream)
                continue
            if response is None:
                if events:
                    stream.inbox.put(None)  # told by the next call; these events come first
                    break
                self._raise_end(stream)
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
            key = self._strip(kv.key)
            entry = None if event.type == _DELETE else Entry(key, kv.value, kv.mod_revision, kv.create_revision)
            yield WatchEvent(key, entry, kv.mod_revision)
        if response.events:  # etcd never splits a revision over two responses
            self._next_revision = max(self._next_revision, response.events[-1].kv.mod_revision + 1)

    def _check(self, stream: _Stream) -> None:
        """A stream that broke silently looks like a quiet one; what other calls found out tells them apart."""
        if not stream.opened and time.monotonic() > stream.opens_by_s:
            self._transport.endpoints.failed(stream.peer.index)
            raise _StreamEnded(f"no answer from {self._transport.name(stream.peer.index)}")
        if self._transport.endpoints.current != stream.peer.index:
            raise _StreamEnded(f"{self._transport.name(stream.peer.index)} no longer answers calls")

    def _raise_end(self, stream: _Stream) -> None:
        name = self._transport.name(stream.peer.index)
        if stream.error is None:
            raise _StreamEnded(f"{name} ended the stream")
        self._transport.note_failure(stream.peer, stream.error)
        if is_token_refused(stream.error.details()):
            self._transport.forget_token(stream.token)
        raise _StreamEnded(f"{name}: {stream.error.details()}")

    def _raise_cancelled(self, stream: _Stream, response: Any) -> None:
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
