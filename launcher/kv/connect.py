"""From `--rdzv-backend` and `--rdzv-endpoint` to a store."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import random
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Self

from launcher.environment import Environment
from launcher.errors import KVUnavailable, UsageError
from launcher.kv.base import KV
from launcher.kv.bucket.client import BucketKV
from launcher.kv.bucket.register import Register
from launcher.kv.embedded.client import EmbeddedKV
from launcher.kv.embedded.server import EmbeddedServer
from launcher.kv.endpoint import addresses_of, is_local, is_loopback, parse_endpoint, spelled
from launcher.kv.etcd.config import EtcdConfig
from launcher.kv.memory import MemoryKV
from launcher.kv.options import StoreOptions
from launcher.kv.prefixed import Prefixed

log = logging.getLogger(__name__)

BACKENDS = ("embedded", "bucket", "etcd3", "memory")
OUTLIVING = ("bucket", "etcd3")
"""Back ends whose store is there when a job has ended, for the next one of its name to find."""
REGISTERS = "elastic_moe.registers"
"""Group of entry points: functions from an endpoint to a `launcher.kv.bucket.register.Register`; one is `storage`."""
_EMBEDDED_TIMEOUT_S = 10.0
_ETCD_TIMEOUT_S = 6.0
_LEAST_TIMEOUT_S = 3.0
_DOCUMENTATION_ADDRESS = "192.0.2.1"  # RFC 5737: of no machine, and beyond the default route of any


@dataclass(frozen=True)
class Connection:
    """An open store; as a context manager it is closed at the end."""

    kv: KV
    local_address: str
    """Under which peers reach this node."""
    hosts_store: bool
    """Whether the store ends with this node."""
    close: Callable[[], None]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def connect(
    backend: str,
    endpoint: str,
    options: StoreOptions = StoreOptions(),  # noqa: B008 (frozen)
    *,
    local_addr: str | None = None,
    timeout_s: float | None = None,
    node_id: str = "",
) -> Connection:
    """Open the store.

    Args:
        node_id: who opens it; the others are told where that node hosts the store.
        timeout_s: how long to wait for the store; None: as long as its kind deserves (an embedded one comes with the
            first node, an etcd should be there before).

    Raises:
        UsageError: an unknown back end, a bad or unreachable endpoint, a missing token.
    """
    match backend:
        case "memory":
            kv = MemoryKV()
            return Connection(kv, local_addr or "127.0.0.1", hosts_store=False, close=kv.close)
        case "embedded":
            return _connect_embedded(endpoint, options, local_addr, timeout_s or _EMBEDDED_TIMEOUT_S, node_id)
        case "bucket":
            return _connect_bucket(endpoint, local_addr)
        case "etcd3":
            return _connect_etcd(endpoint, options, local_addr, timeout_s or _ETCD_TIMEOUT_S)
        case _:
            raise UsageError(f"--rdzv-backend {backend}: {unknown_backend(backend)}")


def unknown_backend(backend: str) -> str:
    """Say what is wrong with a back end that is none of ours."""
    if backend in ("etcd", "etcd-v2"):
        return "torch's own, for the v2 API that etcd no longer has; did you mean etcd3?"
    return f"unknown; choose one of {', '.join(BACKENDS)}"


def looks_like_bucket(endpoint: str) -> bool:
    """Whether an endpoint is a folder or a URL of objects, and no address."""
    return "://" in endpoint or endpoint.startswith(("/", "./", "../", "~/"))


def _connect_bucket(endpoint: str, local_addr: str | None) -> Connection:
    found = {point.name: point for point in entry_points(group=REGISTERS)}
    if "storage" not in found:
        raise UsageError("--rdzv-backend bucket: the package elastic-moe is not installed, which knows object stores")
    register: Register = found["storage"].load()(os.path.expanduser(endpoint))
    kv = BucketKV(register)
    try:
        kv.get("")
    except KVUnavailable as error:
        kv.close()
        raise UsageError(f"--rdzv-endpoint {endpoint}: {error}") from error
    return Connection(kv, local_addr or _own_address(), hosts_store=False, close=kv.close)


def _own_address() -> str:
    """Return this machine's address on the way to others: that of its default route, else of its name."""
    for address in (_DOCUMENTATION_ADDRESS, socket.gethostname()):
        with contextlib.suppress(OSError, UsageError):
            return _address_towards(addresses_of(address)[0])
    return "127.0.0.1"


def _connect_etcd(endpoint: str, options: StoreOptions, local_addr: str | None, timeout_s: float) -> Connection:
    config = EtcdConfig.parse(endpoint, options)
    config = config.starting_with(random.randrange(len(config.endpoints)))  # else all nodes burden the first member
    try:
        # Only here: gRPC and its threads come into a process that asked for them, and into no worker.
        from launcher.kv.etcd.client import EtcdKV
    except ImportError as error:
        raise UsageError(
            f"--rdzv-backend etcd3: {error};"
            " pip install python3-etcd3 grpcio, or install elastic-moe with its extra etcd"
        ) from error
    kv = EtcdKV(config)
    if local_addr and not is_loopback(local_addr) and any(is_local(host) for host, _ in config.endpoints):
        kv.distrust_refusals()
    try:
        kv.wait_ready(timeout_s, options.prefix + "elastic-moe/")
        address = local_addr or _address_towards(_resolvable(config))
    except BaseException:
        kv.close()
        raise
    return Connection(Prefixed(kv, options.prefix), address, hosts_store=False, close=kv.close)


def _resolvable(config: EtcdConfig) -> str:
    """Return the address of the first endpoint that has one; one of them has just answered."""
    for host, _ in config.endpoints[:-1]:
        with contextlib.suppress(UsageError):
            return addresses_of(host)[0]
    return addresses_of(config.endpoints[-1][0])[0]


def _connect_embedded(
    endpoint: str, options: StoreOptions, local_addr: str | None, timeout_s: float, node_id: str
) -> Connection:
    may_host = options.is_host is not False
    host, port = parse_endpoint(endpoint, free_port=may_host)
    ends_s = time.monotonic() + timeout_s
    addresses = addresses_of(host, timeout_s)
    token = _token(options, required=not all(map(is_loopback, addresses)))
    # A name of several addresses is hosted on one that all nodes agree on; whoever comes tries all of them.
    hosted = EmbeddedServer(addresses[0], port, token=token, node_id=node_id) if may_host else None
    server = _try_host(hosted, must=options.is_host is True) if hosted else None
    if not port and not server:
        raise UsageError(f"--rdzv-endpoint {endpoint!r}: a free port can be found on this machine only")
    if not port and server:
        log.warning("the store listens at %s", spelled(host, server.port))
    kv = EmbeddedKV(addresses[:1] if server else addresses, server.port if server else port, token=token)

    def close() -> None:
        kv.close()
        if server is not None:
            server.close()

    try:
        kv.wait_ready(max(ends_s - time.monotonic(), _LEAST_TIMEOUT_S))
        address = local_addr or _address_towards(kv.address)
    except BaseException:
        close()
        raise
    return Connection(kv, address, hosts_store=server is not None, close=close)


def _token(options: StoreOptions, *, required: bool) -> str:
    if (path := options.token_file) is not None:
        try:
            return path.read_text().strip()
        except OSError as error:
            raise UsageError(f"--rdzv-conf token_file={path}: {error.strerror}") from error
    token = Environment.from_env(os.environ).token or ""
    if required and not token:
        raise UsageError(
            f"the embedded store listens beyond loopback only with a token: "
            f"set {Environment.variable('token')} "
            "to the same secret on every node, or --rdzv-conf token_file=PATH"
        )
    return token


def _try_host(server: EmbeddedServer, *, must: bool) -> EmbeddedServer | None:
    """Host the store if the endpoint is this machine's and nobody does yet. `must`: fail where that cannot be."""
    try:
        server.start()
    except OSError as error:
        # Another node of this machine was first, or the address is another machine's.
        if error.errno in (errno.EADDRINUSE, errno.EADDRNOTAVAIL) and not must:
            return None
        where = spelled(server.host, server.port)
        raise UsageError(f"--rdzv-endpoint {where} cannot be bound: {error.strerror}") from error
    return server


def _address_towards(address: str) -> str:
    """Return this machine's own address on the way to `address`; connecting a datagram socket sends nothing."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.connect((address, 9))
        return str(sock.getsockname()[0])
