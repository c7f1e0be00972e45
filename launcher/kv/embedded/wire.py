"""How the embedded store's clients and server talk: length-prefixed JSON over TCP, after proof of a shared token.

Nothing is unpickled. The token itself never travels: each side proves with an HMAC over both sides' nonces that it
knows it, so neither a stranger nor a server in the store's place gets past the first exchange.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import socket
import time

from launcher.frames import ProtocolError, receive, send

MAX_FRAME_BYTES = 4 * 1024 * 1024
MAX_HANDSHAKE_BYTES = 1024
PROTOCOL = "elastic-moe-kv/1"


def greet_as_server(sock: socket.socket, token: str, store_id: str, within_s: float, node_id: str = "") -> None:
    """Greet a client as its server, and set the socket's time-out.

    Args:
        node_id: of the node that hosts the store; told to who knows the token.

    Raises:
        ProtocolError: the client does not know the token, or speaks another protocol.
        TimeoutError: it took longer than `within_s`, however the client fed it.
    """
    ends_s = time.monotonic() + within_s
    sock.settimeout(within_s)
    nonce = secrets.token_hex(16)
    send(sock, {"protocol": PROTOCOL, "nonce": nonce, "store": store_id})
    answer = receive(sock, MAX_HANDSHAKE_BYTES, ends_s=ends_s)
    theirs = str(answer.get("nonce", ""))
    if not _same(answer.get("proof"), _proof(token, "client", nonce, theirs)):
        send(sock, {"refused": "wrong token"})
        raise ProtocolError("a client with a wrong token")
    send(sock, {"proof": _proof(token, "server", theirs, nonce), "node": node_id})


def greet_as_client(sock: socket.socket, token: str, within_s: float) -> tuple[str, str]:
    """Greet a server as its client.

    Returns:
        The store's id, another one where the store was lost and made anew; and the id of the node that hosts it.

    Raises:
        ProtocolError: the server speaks another protocol, or has another token.
        TimeoutError: it took longer than `within_s`, however the server fed it.
    """
    ends_s = time.monotonic() + within_s
    hello = receive(sock, MAX_HANDSHAKE_BYTES, ends_s=ends_s)
    if hello.get("protocol") != PROTOCOL:
        raise ProtocolError("not an elastic-moe store")
    nonce, theirs = secrets.token_hex(16), str(hello.get("nonce", ""))
    send(sock, {"nonce": nonce, "proof": _proof(token, "client", theirs, nonce)})
    answer = receive(sock, MAX_HANDSHAKE_BYTES, ends_s=ends_s)
    if not _same(answer.get("proof"), _proof(token, "server", nonce, theirs)):
        raise ProtocolError("the token is not the server's")
    return str(hello.get("store", "")), str(answer.get("node", ""))


def _same(given: object, proof: str) -> bool:
    return hmac.compare_digest(str(given).encode(errors="backslashreplace"), proof.encode())


def _proof(token: str, side: str, challenge: str, nonce: str) -> str:
    text = f"{PROTOCOL}:{side}:{challenge}:{nonce}"
    # a nonce comes from a stranger, and JSON knows halves of characters
    return hmac.new(token.encode(), text.encode(errors="backslashreplace"), hashlib.sha256).hexdigest()
