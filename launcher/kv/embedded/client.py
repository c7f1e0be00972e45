"""A client of the embedded store.

Calls share one connection; each watch and each lease has its own. A broken connection is opened anew by the next
call, so a watch resumes from its revision; whether a call that broke had its effect is unknown (`KVUnavailable`).
"""

from __future__ import annotations

import base64
import logging
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any

from launcher.errors import Compacted, KVError, KVUnavailable, StoreHostSilent, UsageError
from launcher.frames import ProtocolError, receive, send
from launcher.kv.base import Entry, Snapshot, WatchEvent
from launcher.kv.embedded import wire
from launcher.kv.embedded.server import IDLE_TIMEOUT_S, MAX_WAIT_S
from launcher.kv.endpoint import spelled
from launcher.kv.lease import Lease

log = logging.getLogger(__name__)

_CALL_TIMEOUT_S = 3.0
_IDLE_S_MAX = IDLE_TIMEOUT_S / 2


class _Addresses:
    """Where the store may be; the one that has answered last is tried first. Shared by a client's connections."""

    def __init__(self, hosts: Sequence[str], port: int) -> None:
        self._hosts = tuple(hosts)
        self.port = port
        self.node_id = ""
        """Of the node that hosts the store, as it has told."""

    def __str__(self) -> str:
        return ", ".join(spelled(host, self.port) for host in self._hosts)

    @property
    def first(self) -> str:
        """The address to try first."""
        return self._hosts[0]

    def connect(self, timeout_s: float) -> socket.socket:
        """Connect to the first address that takes a connection.

        Raises:
            OSError: none does; this is what the last one said.
        """
        hosts = self._hosts
        for host in hosts:
            try:
                sock = socket.create_connection((host, self.port), timeout=timeout_s / len(hosts))
            except OSError:
                if host == hosts[-1]:
                    raise
            else:
                self._hosts = (host, *(other for other in hosts if other != host))
                return sock
        raise AssertionError("a store has an address")


class _Session:
    """One authenticated connection, opened when needed; calls take turns."""

    def __init__(self, addresses: _Addresses, token: str) -> None:
        self._addresses = addresses
        self._token = token
        self._lock = threading.Lock()
        self._sock: socket.socket | None = None
        self._used_s = 0.0
        self.closed = False
        self.store_id = ""

    def call(self, op: str, *, timeout_s: float = _CALL_TIMEOUT_S, **fields: Any) -> dict[str, Any]:
        """Send one request and return its answer.

        Raises:
            KVUnavailable, Compacted, KVError, UsageError (a wrong token)
        """
        with self._lock:
            if self.closed:
                raise KVUnavailable("this client is closed")
            if time.monotonic() > self._used_s + _IDLE_S_MAX:
                self._drop()  # the server may be about to close it, or has: what is asked on it would be lost
            try:
                if self._sock is None:
                    self._sock = self._open(timeout_s)
                    if self.closed:  # closed while it was being opened: `close` saw no socket to shut down
                        raise EOFError("closed")
                self._sock.settimeout(timeout_s)
                send(self._sock, {"op": op, **fields})
                answer = receive(self._sock, wire.MAX_FRAME_BYTES)
                self._used_s = time.monotonic()
            except ProtocolError as error:
                self._drop()
                raise UsageError(f"rendezvous endpoint {self._addresses}: {error}") from error
            except (OSError, EOFError) as error:
                self._drop()
                raise self._unavailable(error) from error
        if "compacted" in answer:
            raise Compacted(answer["compacted"])
        if "error" in answer:
            raise KVError(answer["error"])
        return answer

    def _unavailable(self, error: Exception) -> KVUnavailable:
        what = f"the store at {self._addresses} does not answer: {error}"
        if not self._addresses.node_id:
            return KVUnavailable(what)
        return StoreHostSilent(what, self._addresses.node_id, refused=isinstance(error, ConnectionRefusedError))

    def _open(self, timeout_s: float) -> socket.socket:
        sock = self._addresses.connect(timeout_s)
        try:
            sock.settimeout(timeout_s)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.store_id, self._addresses.node_id = wire.greet_as_client(sock, self._token, timeout_s)
        except BaseException:
            sock.close()
            raise
        return sock

    def _drop(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    def close(self) -> None:
        """Close for good. A call under way fails at once."""
        self.closed = True
        sock = self._sock
        if sock is not None:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError as error:
                log.debug("connection already gone: %s", error)
        with self._lock:
            self._drop()


def _entry(told: dict[str, Any] | None) -> Entry | None:
    if told is None:
        return None
    return Entry(told["key"], base64.b64decode(told["value"]), told["revision"], told["create_revision"])


class _EmbeddedWatch:
    def __init__(self, connection: _Session, prefix: str, from_revision: int, store_id: str) -> None:
        self._connection = connection
        self._store_id = store_id
        self._prefix = prefix
        self._from_revision = from_revision
        self._cancelled = threading.Event()

    def next(self, timeout_s: float) -> tuple[WatchEvent, ...]:
        if self._cancelled.is_set():
            return ()
        wait_s = min(timeout_s, MAX_WAIT_S)
        try:
            answer = self._connection.call(
                "events",
                prefix=self._prefix,
                wait_s=wait_s,
                timeout_s=wait_s + _CALL_TIMEOUT_S,
                **{"from": self._from_revision},
            )
        except KVUnavailable:
            if self._cancelled.is_set():
                return ()
            raise
        if self._store_id not in ("", self._connection.store_id):
            raise Compacted("the store was lost and is hosted anew")
        self._from_revision = answer["next"]
        return tuple(WatchEvent(e["key"], _entry(e["entry"]), e["revision"]) for e in answer["events"])

    def cancel(self) -> None:
        self._cancelled.set()
        self._connection.close()


class EmbeddedKV:
    """The store that listens on `port` of `host`, or of one of several; the first call connects."""

    def __init__(self, host: str | Sequence[str], port: int, *, token: str) -> None:
        self._addresses = _Addresses([host] if isinstance(host, str) else host, port)
        self._token = token
        self._calls = self._connection()
        self._leases: list[Lease] = []
        self._open: list[_Session] = [self._calls]

    def _connection(self) -> _Session:
        return _Session(self._addresses, self._token)

    @property
    def address(self) -> str:
        """The host that has answered last, or the first one."""
        return self._addresses.first

    def wait_ready(self, timeout_s: float) -> None:
        """Wait until the store answers.

        Raises:
            UsageError: it does not within `timeout_s`, or something else listens there, or the token is wrong.
        """
        ends_s = time.monotonic() + timeout_s
        while True:
            try:
                self._calls.call("ping")
                return
            except KVUnavailable as error:
                if time.monotonic() >= ends_s:
                    raise UsageError(
                        f"--rdzv-endpoint {self._addresses} cannot be reached ({error.__cause__}); "
                        "is the first node up, and the address right?"
                    ) from error
            time.sleep(0.1)

    def get(self, key: str) -> Entry | None:
        return _entry(self._calls.call("get", key=key)["entry"])

    def put(
        self, key: str, value: bytes, *, if_revision: int | None = None, lease: Lease | None = None
    ) -> Entry | None:
        answer = self._calls.call(
            "put",
            key=key,
            value=base64.b64encode(value).decode(),
            if_revision=if_revision,
            lease=lease.lease_id if lease else None,
        )
        return _entry(answer["entry"])

    def list(self, prefix: str) -> Snapshot:
        answer = self._calls.call("list", prefix=prefix)
        entries = (_entry(told) for told in answer["entries"])
        return Snapshot(tuple(entry for entry in entries if entry), answer["revision"])

    def delete(self, key: str, *, if_revision: int | None = None) -> bool:
        return bool(self._calls.call("delete", key=key, if_revision=if_revision)["deleted"])

    def watch(self, prefix: str, from_revision: int) -> _EmbeddedWatch:
        connection = self._connection()
        self._open = [*(held for held in self._open if not held.closed), connection]
        return _EmbeddedWatch(connection, prefix, from_revision, self._calls.store_id)

    def lease(self, ttl_s: float) -> Lease:
        connection = self._connection()
        granted_s = time.monotonic()
        lease_id = int(connection.call("grant", ttl_s=ttl_s)["lease"])
        lease = Lease(
            lease_id,
            ttl_s,
            granted_s=granted_s,
            renew=lambda: bool(connection.call("renew", lease=lease_id, timeout_s=ttl_s / 2)["alive"]),
            revoke=lambda: self._revoke(lease_id),
            close=connection.close,
        ).start()
        self._leases = [*(held for held in self._leases if not held.lost.is_set()), lease]
        return lease

    def _revoke(self, lease_id: int) -> None:
        self._calls.call("revoke", lease=lease_id)

    def close(self) -> None:
        for lease in self._leases:
            lease.stop()
        for connection in self._open:
            connection.close()
