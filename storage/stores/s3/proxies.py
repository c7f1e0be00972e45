"""Which HTTP proxy stands before a store, as `HTTP_PROXY`, `HTTPS_PROXY` and `NO_PROXY` say it. Pure.

The rules are those of `urllib.request`, by which botocore goes as well: the variable is that of the store's scheme, and
a host that `NO_PROXY` names, or whose domain it names, is reached without.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from storage.errors import BadURL, Cause, Denied, StorageError, Transient

_PORT = 80
_UNAUTHORIZED = 407


@dataclass(frozen=True, slots=True)
class Proxy:
    """A proxy that is spoken to without TLS. `variable` names where it came from, for messages.

    `headers` are for the proxy alone: they hold its password, so they are in no text of this object.
    """

    host: str
    port: int
    variable: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        """`http://host:port`, for messages."""
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


def find_proxy(
    scheme: str, netloc: str, proxies: Mapping[str, str], is_bypassed: Callable[[str], bool]
) -> Proxy | None:
    """The proxy for requests to `scheme://netloc`; None where there is none.

    Args:
        proxies: proxy URLs by the scheme of what is asked for, as `urllib.request.getproxies` returns them.
        is_bypassed: `urllib.request.proxy_bypass`, or what answers as it does for a host with its port.

    Raises:
        BadURL: the proxy's URL cannot be used. The text does not hold the URL, which may hold a password.
    """
    url = proxies.get(scheme)
    if not url or is_bypassed(netloc):
        return None
    variable = f"{scheme.upper()}_PROXY"
    try:
        parts = urlsplit(url if "://" in url else f"http://{url.removeprefix('//')}")
        host, port = parts.hostname, parts.port or _PORT
    except ValueError:
        host = None
    if not host:
        raise BadURL(
            f"{variable} is no URL of a proxy: it must be http://[user:password@]host[:port], with special characters"
            " of the password as %XX"
        )
    if parts.scheme != "http":
        raise BadURL(f"{variable} names a proxy by {parts.scheme}://, but only http:// proxies can be used")
    headers = {}
    if parts.username:
        told = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
        headers["Proxy-Authorization"] = f"Basic {base64.b64encode(told).decode()}"
    return Proxy(host, port, variable, headers)


def tunnel_refused(proxy: Proxy, address: str, status: int) -> StorageError:
    """Why the proxy makes no connection to `address`: it has answered a CONNECT with `status`. Pure."""
    if status == _UNAUTHORIZED:
        return Denied(f"the proxy {proxy} wants another user and password (HTTP 407); check {proxy.variable}")
    if status >= 500:
        return Transient(f"the proxy {proxy} cannot reach {address} (HTTP {status})", Cause.UNREACHABLE)
    return Denied(
        f"the proxy {proxy} does not connect to {address} (HTTP {status}); check {proxy.variable} and NO_PROXY"
    )
