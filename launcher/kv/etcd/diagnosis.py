"""Why an etcd endpoint cannot be used, found out with plain sockets.

gRPC's own messages differ between versions and say "failed to connect" of nearly everything; a person at the command
line needs to know whether it is the address, the certificate, or not an etcd at all. Asked only after a call failed.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
from dataclasses import dataclass

from launcher.kv.etcd.config import Tls

_HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))  # preface, empty SETTINGS
_SETTINGS_FRAME = 4
_TLS_ALERT = 0x15


@dataclass(frozen=True)
class Flaw:
    """What is wrong. `permanent`: waiting will not mend it."""

    what: str
    permanent: bool


# An etcd that starts, or has not found its cluster's leader yet, is as mute as something that is none.
_MUTE = Flaw("something listens there, but it does not answer as an etcd does", permanent=False)


def diagnose(host: str, port: int, tls: Tls | None, timeout_s: float) -> Flaw | None:
    """Find what is wrong with an endpoint, as far as its socket tells; None where it speaks HTTP/2 as etcd does."""
    try:
        sock = socket.create_connection((host, port), timeout=timeout_s)
    except socket.gaierror as error:
        return Flaw(f"host {host!r} is unknown ({error.strerror})", permanent=False)
    except TimeoutError:
        return Flaw("no answer", permanent=False)
    except OSError as error:
        return Flaw((error.strerror or str(error)).lower(), permanent=False)
    with sock:
        return _plain(sock, timeout_s) if tls is None else _encrypted(sock, host, tls, timeout_s)


def _plain(sock: socket.socket, timeout_s: float) -> Flaw | None:
    peer = sock.getpeername()[:2]
    answer = _answer(sock)
    if answer[:1] == bytes([_TLS_ALERT]) or (not answer and _speaks_tls(peer, timeout_s)):
        return Flaw("it wants TLS; add --rdzv-conf protocol=https,cacert=PATH", permanent=True)
    return _told(answer)


def _answer(sock: socket.socket) -> bytes:
    """Return what the other side says to an HTTP/2 client; nothing if it is silent or hangs up."""
    try:
        sock.sendall(_HTTP2_HELLO)
        return sock.recv(64)
    except OSError:
        return b""


def _speaks_tls(peer: tuple[str, int], timeout_s: float) -> bool:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # only whether it is TLS is asked; nothing is sent or believed
    context.set_alpn_protocols(["h2"])
    try:
        with socket.create_connection(peer, timeout=timeout_s) as sock, context.wrap_socket(sock):
            return True
    except ssl.SSLError as error:
        return "ALERT" in (error.reason or "")  # such as: it wants a client certificate
    except OSError:
        return False


def _encrypted(sock: socket.socket, host: str, tls: Tls, timeout_s: float) -> Flaw | None:
    peer = sock.getpeername()[:2]
    try:
        with tls.context().wrap_socket(sock, server_hostname=host) as secure:
            secure.sendall(_HTTP2_HELLO)
            answer = secure.recv(64)  # under TLS 1.3 a refused client certificate shows here, not in the handshake
    except ssl.SSLCertVerificationError as error:
        return Flaw(f"its certificate is not accepted: {error.verify_message}", permanent=True)
    except ssl.SSLError as error:
        return _handshake(error, tls, peer, timeout_s)
    except TimeoutError:
        return _MUTE
    except OSError as error:
        return Flaw(f"it closed the TLS connection: {(error.strerror or str(error)).lower()}", permanent=False)
    return _told(answer)


def _handshake(error: ssl.SSLError, tls: Tls, peer: tuple[str, int], timeout_s: float) -> Flaw:
    """Find why a TLS handshake failed, where the other side's certificate was not the cause."""
    reason = (error.reason or str(error)).replace("_", " ").lower()
    if any(hint in reason for hint in ("eof", "wrong version", "http request", "record layer")):
        with contextlib.suppress(OSError), socket.create_connection(peer, timeout=timeout_s) as sock:
            if _answer(sock):
                return Flaw("it does not speak TLS; leave protocol=https and the certificates out", permanent=True)
        return _MUTE
    if any(hint in reason for hint in ("certificate", "unknown ca", "handshake failure")):
        if not tls.cert:
            return Flaw("it wants a client certificate; add --rdzv-conf cert=PATH,key=PATH", permanent=True)
        return Flaw(f"it refuses this client's certificate: {reason}", permanent=True)
    return Flaw(f"the TLS handshake failed: {reason}", permanent=True)


def _told(answer: bytes) -> Flaw | None:
    if not answer:
        return _MUTE
    is_http2 = len(answer) >= 4 and answer[3] == _SETTINGS_FRAME
    return None if is_http2 else Flaw("something else listens there, not an etcd", permanent=True)
