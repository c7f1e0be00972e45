"""Calls to an etcd cluster: channels, fail-over, tokens, and gRPC's errors in our words.

Of the `etcd3` package only the generated messages and stubs are used. Its client object keeps one wall-clock
"failed" mark per endpoint for five minutes, never renews an auth token, and breaks a watch for good when its stream
breaks; the calls we need are few, and made here with deadlines and fail-over of our own.

gRPC does not survive `fork`: a process that holds a channel must start others by exec only. The agents do (torch
starts workers through `subprocess`); whoever forks workers must do so from a process that never came here.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

from launcher.errors import KVError, KVUnavailable
from launcher.kv.etcd.config import EtcdConfig


def _import_quietly() -> tuple[Any, Any]:
    """Import gRPC with its own log and fork handlers off; it reads both settings when it is first loaded.

    The environment is put back, because workers inherit it and may use gRPC for something else.
    """
    quiet = {"GRPC_VERBOSITY": "NONE", "GRPC_ENABLE_FORK_SUPPORT": "0"}
    before = {name: os.environ.get(name) for name in quiet}
    os.environ.update({name: before[name] or value for name, value in quiet.items()})
    try:
        import grpc
        from etcd3 import etcdrpc

        grpc.insecure_channel("localhost:1").close()  # loads the settings
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
    return grpc, etcdrpc


grpc, etcdrpc = _import_quietly()

log = logging.getLogger(__name__)

CALL_TIMEOUT_S: Final = 3.0

RECONNECT_S: Final = 0.4
"""An endpoint that refuses is tried again after so long."""

_OPTIONS: Final = (
    # a stream's reader waits in gRPC, instead of waking ten times a second to ask a thread of gRPC's own
    ("SingleThreadedUnaryStream", 1),
    ("grpc.use_local_subchannel_pool", 1),  # else channels with equal arguments share one connection
    ("grpc.enable_http_proxy", 0),  # leases of two seconds do not go through a proxy meant for downloads
    ("grpc.service_config_disable_resolution", 1),
    ("grpc.enable_retries", 0),  # whether a call may be sent twice is decided here
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.keepalive_time_ms", 10_000),  # etcd hangs up on clients that ping more often than every 5 s
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
)
_TOKEN_REFUSED: Final = ("invalid auth token", "revision of auth store is old")
_ELSEWHERE: Final = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.CANCELLED,
)
_NOT_NOW: Final = (
    *_ELSEWHERE,
    grpc.StatusCode.RESOURCE_EXHAUSTED,  # etcd is full or overrun: an operator's or a moment's matter
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
)


class UserRefused(KVUnavailable):
    """User or password are wrong: a mistake when a job starts, and something to wait out while it runs."""


class LeaseEnded(KVError):
    """A put named a lease that etcd no longer knows."""


class Endpoints:
    """Which endpoint is in use. Shared by all channels of a client: what one finds out, the others go by."""

    def __init__(self, num_endpoints: int) -> None:
        self.num_endpoints = num_endpoints
        self.current = 0
        self.holds_streams_open = False
        """Whether etcd is reached through something that ends a stream once one direction is closed."""
        self._lock = threading.Lock()
        self._told: set[Callable[[], None]] = set()

    def failed(self, index: int) -> None:
        """Go on to the next endpoint, unless another thread already did."""
        with self._lock:
            if self.current != index:
                return
            self.current = (index + 1) % self.num_endpoints
            told = list(self._told)
        for tell in told:
            tell()

    def tell(self, changed: Callable[[], None]) -> None:
        """Call `changed` whenever another endpoint is used; from any thread, so it must not wait."""
        with self._lock:
            self._told.add(changed)

    def tell_no_more(self, changed: Callable[[], None]) -> None:
        """Do not call `changed` any more."""
        with self._lock:
            self._told.discard(changed)


class AuthToken:
    """The auth token of a user, empty where there is none. Shared by the channels of a client."""

    def __init__(self) -> None:
        self.value = ""

    def forget(self, refused: str) -> None:
        """Drop the token if it is the one that was `refused`; the next call asks for another."""
        if self.value == refused:
            self.value = ""


class EndpointChannel:
    """A channel to one endpoint, and the calls on it; each is made when first used, as a node uses few of them."""

    def __init__(self, index: int, channel: Any) -> None:
        self.index = index
        self.channel = channel

    @functools.cached_property
    def kv(self) -> Any:
        return etcdrpc.KVStub(self.channel)

    @functools.cached_property
    def lease(self) -> Any:
        return etcdrpc.LeaseStub(self.channel)

    @functools.cached_property
    def renew(self) -> Callable[..., Any]:
        """`LeaseKeepAlive` for one renewal. A stream of one message each way is on the wire what a unary call is, and
        gRPC's Python starts two threads for a stream."""
        return self.channel.unary_unary(  # type: ignore[no-any-return]
            "/etcdserverpb.Lease/LeaseKeepAlive",
            request_serializer=etcdrpc.LeaseKeepAliveRequest.SerializeToString,
            response_deserializer=etcdrpc.LeaseKeepAliveResponse.FromString,
        )

    @functools.cached_property
    def renew_held_open(self) -> Callable[..., Any]:
        """`LeaseKeepAlive` as a stream whose both directions stay open until the answer has come."""
        keep_alive = self.lease.LeaseKeepAlive

        def call(request: Any, **options: Any) -> Any:
            answered = threading.Event()

            def requests() -> Iterator[Any]:
                yield request
                answered.wait()

            answers = keep_alive(requests(), **options)
            try:
                return next(answers)
            except StopIteration as error:
                raise KVUnavailable("etcd ended the renewal without an answer") from error
            finally:
                answered.set()
                answers.cancel()

        return call

    @functools.cached_property
    def watch(self) -> Callable[..., Any]:
        """`Watch` with one request, after which the stream is closed in that direction. One thread waits for it; where
        both directions stay open, gRPC's Python takes three, one of which looks ten times a second."""
        return self.channel.unary_stream(  # type: ignore[no-any-return]
            "/etcdserverpb.Watch/Watch",
            request_serializer=etcdrpc.WatchRequest.SerializeToString,
            response_deserializer=etcdrpc.WatchResponse.FromString,
        )

    @functools.cached_property
    def watch_held_open(self) -> Callable[..., Any]:
        """`Watch` with an iterator of requests."""
        return etcdrpc.WatchStub(self.channel).Watch  # type: ignore[no-any-return]

    @functools.cached_property
    def auth(self) -> Any:
        return etcdrpc.AuthStub(self.channel)

    @functools.cached_property
    def cluster(self) -> Any:
        return etcdrpc.ClusterStub(self.channel)

    @functools.cached_property
    def maintenance(self) -> Any:
        return etcdrpc.MaintenanceStub(self.channel)


Rpc = Callable[[EndpointChannel], Callable[..., Any]]


class Transport:
    """One connection per endpoint, opened when needed. For any number of threads."""

    def __init__(
        self, config: EtcdConfig, endpoints: Endpoints, token: AuthToken, *, reconnect_s: float = RECONNECT_S
    ) -> None:
        """`reconnect_s`: while an endpoint refuses, it is tried again so often."""
        self.endpoints = endpoints
        self._options = (*_OPTIONS, ("grpc.max_reconnect_backoff_ms", int(reconnect_s * 1000)))
        self._config = config
        self._token = token
        self._lock = threading.Lock()
        self._peers: dict[int, EndpointChannel] = {}
        self._closed = False

    def name(self, index: int) -> str:
        """Return an endpoint as the user wrote it."""
        host, port = self._config.endpoints[index]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def peer(self, index: int | None = None) -> EndpointChannel:
        """Return the channel to the endpoint of this index, or to the one in use.

        Raises:
            KVUnavailable: this client is closed.
        """
        with self._lock:
            if self._closed:
                raise KVUnavailable("this client is closed")
            index = self.endpoints.current if index is None else index
            if index not in self._peers:
                self._peers[index] = EndpointChannel(index, self._open(self.name(index)))
            return self._peers[index]

    def _open(self, target: str) -> Any:
        tls = self._config.tls
        if tls is None:
            return grpc.insecure_channel(target, options=self._options)
        credentials = grpc.ssl_channel_credentials(tls.cacert, tls.key, tls.cert)
        return grpc.secure_channel(target, credentials, options=self._options)

    def call(
        self,
        rpc: Rpc,
        request: Any,
        *,
        timeout_s: float = CALL_TIMEOUT_S,
        first_share: float = 0.5,
        repeatable: bool = True,
    ) -> Any:
        """Send one request and return its answer, within `timeout_s` over all endpoints.

        Args:
            first_share: what part of the time an endpoint may take where there is another one.
            repeatable: whether the request may go to the next endpoint after one that may have carried it out unheard.

        Raises:
            KVUnavailable: no endpoint answered, or etcd cannot serve this now.
            LeaseEnded: the request names a lease that is gone.
            UserRefused: user or password are wrong.
            KVError: etcd refused it.
        """
        ends_s = time.monotonic() + timeout_s
        left = self.endpoints.num_endpoints
        refused_token = ""
        while True:
            peer = self.peer()
            attempt_s = max(0.05, min(ends_s - time.monotonic(), timeout_s * (first_share if left > 1 else 1.0)))
            token = ""
            try:
                token = self.authenticate(peer, attempt_s)
                return rpc(peer)(request, timeout=attempt_s, metadata=metadata_of(token))
            except grpc.RpcError as error:
                if is_token_refused(error.details()) and token and not refused_token:
                    refused_token = token  # refused before it had an effect: may be sent again
                    self._token.forget(token)
                    continue
                self.note_failure(peer, error)
                left -= 1
                if error.code() not in _ELSEWHERE or not repeatable or left <= 0 or time.monotonic() >= ends_s:
                    raise self._told(peer, error) from error
            except ValueError as error:  # gRPC's answer where another thread has closed the channel
                raise KVUnavailable("this client is closed") from error

    def note_failure(self, peer: EndpointChannel, error: Any) -> None:
        """Use the next endpoint from now on, if the error is this one's fault."""
        if error.code() in _ELSEWHERE and not self._closed:
            self.endpoints.failed(peer.index)

    def _told(self, peer: EndpointChannel, error: Any) -> KVError:
        code, details = error.code(), _one_line(error.details())
        if code is grpc.StatusCode.NOT_FOUND and "lease not found" in details:
            return LeaseEnded(details)
        text = f"etcd at {self.name(peer.index)}: {code.name.lower().replace('_', ' ')}: {details}"
        return KVUnavailable(text) if code in _NOT_NOW else KVError(text)

    # --- tokens

    def forget_token(self, refused: str) -> None:
        """Drop a token for which a stream was refused."""
        self._token.forget(refused)

    def authenticate(self, peer: EndpointChannel, timeout_s: float) -> str:
        """Return the user's token, asked for where there is none; "" without a user.

        Raises:
            UserRefused: user or password are wrong.
            grpc.RpcError: as any call.
        """
        if not self._config.user or self._token.value:
            return self._token.value
        request = etcdrpc.AuthenticateRequest(name=self._config.user, password=self._config.password)
        try:
            self._token.value = peer.auth.Authenticate(request, timeout=timeout_s).token
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.INVALID_ARGUMENT:
                raise UserRefused(f"--rdzv-conf user={self._config.user}: etcd refuses user or password") from error
            if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
                raise UserRefused(
                    f"--rdzv-conf user={self._config.user}: this etcd has authentication switched off; leave user out"
                ) from error
            raise
        return self._token.value

    def close(self) -> None:
        """Close every channel. Calls and streams under way fail at once."""
        with self._lock:
            self._closed = True
            peers, self._peers = list(self._peers.values()), {}
        for peer in peers:
            peer.channel.close()


def metadata_of(token: str) -> tuple[tuple[str, str], ...] | None:
    """Return the call metadata that carries a token."""
    return (("token", token),) if token else None


def is_half_close_refused(details: str | None) -> bool:
    """Whether a stream was ended because this side had said all: etcd's grpc-proxy takes that for a client's end."""
    return "context canceled" in (details or "")


def is_token_refused(details: str | None) -> bool:
    """Whether etcd asks for a new token: this one expired, or rights were changed after it was given."""
    return any(text in (details or "") for text in _TOKEN_REFUSED)


def _one_line(details: str | None) -> str:
    return " ".join((details or "no details").split())[:300]
