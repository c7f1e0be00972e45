"""From what a user writes for a store's address to the addresses that it has."""

from __future__ import annotations

import ipaddress
import logging
import re
import socket
import time
from collections.abc import Sequence

from launcher.errors import UsageError

log = logging.getLogger(__name__)

DEFAULT_PORT = 29400
_RETRY_S = 0.5
_NO_NAME = re.compile(r"[\s/,@:\[\]?#%]")


def parse_endpoint(endpoint: str, default_port: int = DEFAULT_PORT, *, free_port: bool = False) -> tuple[str, int]:
    """Parse `HOST`, `HOST:PORT`, `[V6]:PORT` or `[V6]`. With `free_port` the port may be 0: any that is free.

    Raises:
        UsageError: the text is none of these.
    """
    text = endpoint.strip()
    if "://" in text:
        raise _bad(endpoint, f"leave {text.partition('://')[0]}:// out", default_port)
    bracketed = re.fullmatch(r"\[([^\]]*)\](?::(.*))?", text)
    if bracketed:
        host, port_text = bracketed[1], bracketed[2]
        if not _is_ipv6(host):
            raise _bad(endpoint, f"{host!r} is no IPv6 address", default_port)
    elif _is_ipv6(text) or text.count(":") > 1:
        raise _bad(endpoint, "an IPv6 address goes into brackets, as in [::1]:29400", default_port)
    else:
        host, colon, told = text.partition(":")
        port_text = told if colon else None
        if "," in text:
            raise _bad(endpoint, "only etcd3 takes several", default_port)
        if not host or _NO_NAME.search(host):
            raise _bad(endpoint, f"{host!r} is no host name" if host else "the host is missing", default_port)
    if port_text is None:
        return host, default_port
    if not re.fullmatch("[0-9]{1,5}", port_text) or not int(not free_port) <= int(port_text) < 65536:
        raise _bad(endpoint, f"{port_text!r} is no port from 1 to 65535", default_port)
    return host, int(port_text)


def _bad(endpoint: str, why: str, port: int) -> UsageError:
    return UsageError(f"--rdzv-endpoint {endpoint!r}: {why}; expected HOST:PORT, such as node-1.example:{port}")


def _is_ipv6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True


def addresses_of(host: str, within_s: float = 0.0) -> list[str]:
    """Look up the addresses of a host, in an order that is the same on every node: IPv4 first, then by number.

    A name that nobody knows yet (a pod's, whose record comes with it) is asked for again for `within_s`.

    Raises:
        UsageError: the host has none by then, or only loopback ones, which other nodes take for their own.
    """
    ends_s = time.monotonic() + within_s
    told = False
    while True:
        try:
            found = {str(info[4][0]) for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
            break
        except UnicodeError as error:  # a label that is empty or too long
            raise UsageError(f"--rdzv-endpoint: {host!r} is no host name: {error}") from error
        except OSError as error:
            if time.monotonic() >= ends_s:
                raise UsageError(f"--rdzv-endpoint: host {host!r} is unknown: {error.strerror}") from error
            if not told:
                log.warning("host %r is unknown (%s): asked again for %g s", host, error.strerror, within_s)
                told = True
        time.sleep(max(0.0, min(_RETRY_S, ends_s - time.monotonic())))
    if told:
        log.info("host %r is known now: %s", host, ", ".join(in_order(found)))
    reachable = found if is_local(host) else {address for address in found if not is_loopback(address)}
    if not reachable:
        # Debian's /etc/hosts names a machine's own address 127.0.1.1, which is another for every machine.
        raise UsageError(
            f"--rdzv-endpoint: {host!r} is {in_order(found)[0]} here, which no other node can reach; give its address"
        )
    return in_order(reachable)


def in_order(addresses: Sequence[str] | set[str]) -> list[str]:
    """Sort addresses: IPv4 first, then by number."""

    def key(address: str) -> tuple[int, bytes]:
        parsed = ipaddress.ip_address(address.partition("%")[0])
        return parsed.version, parsed.packed

    return sorted(addresses, key=key)


def is_loopback(address: str) -> bool:
    """Whether an address is this machine's on every machine."""
    return address.startswith("127.") or address == "::1"


def is_local(host: str) -> bool:
    """Whether a host is named so that every machine takes it for itself."""
    return host == "localhost" or is_loopback(host)


def spelled(host: str, port: int) -> str:
    """Write an endpoint as a user does."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
