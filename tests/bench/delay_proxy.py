"""A proxy in front of an S3 server that counts, and lets every request wait for a while, at next to no CPU time.

It reads the heads of requests, and nothing else: bodies and answers go from socket to socket inside the kernel
(`splice`). It runs in a process of its own, so that nobody it measures waits for its interpreter.
"""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import os
import select
import socket
import threading
import time
from collections import Counter
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

import psutil

_PIPE_SIZE_BYTES = 1024 * 1024
_HEAD_SIZE_BYTES_MAX = 64 * 1024
_END_OF_HEAD = b"\r\n\r\n"


@dataclass(frozen=True)
class Counts:
    """What has passed so far: requests by method, and bytes with the heads of requests and answers."""

    num_by_method: dict[str, int]
    up_bytes: int
    down_bytes: int

    def since(self, earlier: Counts) -> Counts:
        """What came after `earlier`."""
        methods = {m: n - earlier.num_by_method.get(m, 0) for m, n in sorted(self.num_by_method.items())}
        return Counts(
            {m: n for m, n in methods.items() if n},
            self.up_bytes - earlier.up_bytes,
            self.down_bytes - earlier.down_bytes,
        )

    @property
    def num_requests(self) -> int:
        """Of all methods."""
        return sum(self.num_by_method.values())


class DelayProxy:
    """Every request to `endpoint_url` reaches the server `latency_s` later. Ends with the block, or with its parent."""

    def __init__(self, upstream_url: str, latency_s: float) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        upstream = urlsplit(upstream_url)
        address = (upstream.hostname or "", upstream.port or 80)
        self._process = context.Process(target=_serve, args=(theirs, address, latency_s), daemon=True)

    def __enter__(self) -> Self:
        self._process.start()
        self.endpoint_url = f"http://127.0.0.1:{self._received()}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.join()

    def counts(self) -> Counts:
        """See `Counts`."""
        self._pipe.send("counts")
        counts = self._received()
        assert isinstance(counts, Counts)
        return counts

    def cpu_s(self) -> float:
        """CPU seconds of the proxy's process so far."""
        times = psutil.Process(self._process.pid).cpu_times()
        return times.user + times.system

    def _received(self) -> object:
        assert self._pipe.poll(60), "the proxy does not answer"
        return self._pipe.recv()


class _Ledger:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.num_by_method: Counter[str] = Counter()
        self.up_bytes = 0
        self.down_bytes = 0

    def counts(self) -> Counts:
        with self.lock:
            return Counts(dict(self.num_by_method), self.up_bytes, self.down_bytes)


def _serve(pipe: Connection, upstream: tuple[str, int], latency_s: float) -> None:
    ledger = _Ledger()
    listener = socket.create_server(("127.0.0.1", 0), backlog=256)

    def accept() -> None:
        while True:
            client, _ = listener.accept()
            threading.Thread(target=_relay, args=(client, upstream, latency_s, ledger), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    pipe.send(listener.getsockname()[1])
    with contextlib.suppress(EOFError):  # the parent is gone
        while True:
            pipe.recv()
            pipe.send(ledger.counts())


def _relay(client: socket.socket, upstream: tuple[str, int], latency_s: float, ledger: _Ledger) -> None:
    with contextlib.suppress(OSError), client, socket.create_connection(upstream) as server:
        for end in (client, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _Line(client, server, latency_s, ledger).run()


class _Line:
    """One client's connection and the one to the server that belongs to it."""

    def __init__(self, client: socket.socket, server: socket.socket, latency_s: float, ledger: _Ledger) -> None:
        self._client = client
        self._server = server
        self._latency_s = latency_s
        self._ledger = ledger
        self._out, self._in = os.pipe()
        fcntl.fcntl(self._in, fcntl.F_SETPIPE_SZ, _PIPE_SIZE_BYTES)
        self._body_bytes = 0  # of the request's body, what is still to come

    def run(self) -> None:
        poll = select.poll()
        poll.register(self._client, select.POLLIN)
        poll.register(self._server, select.POLLIN)
        try:
            while all(self._pass_on(fd) for fd, _ in poll.poll()):
                pass
        finally:
            os.close(self._out)
            os.close(self._in)

    def _pass_on(self, fd: int) -> bool:
        """Carry something on; whether the connection is still open."""
        if fd == self._server.fileno():
            moved = self._splice(self._server, self._client, _PIPE_SIZE_BYTES)
            with self._ledger.lock:
                self._ledger.down_bytes += moved
            return moved > 0
        if self._body_bytes:
            moved = self._splice(self._client, self._server, min(self._body_bytes, _PIPE_SIZE_BYTES))
            self._body_bytes -= moved
            with self._ledger.lock:
                self._ledger.up_bytes += moved
            return moved > 0
        return self._pass_head_on()

    def _pass_head_on(self) -> bool:
        data = b""
        while _END_OF_HEAD not in data:
            received = self._client.recv(_HEAD_SIZE_BYTES_MAX)
            if not received:
                return False
            data += received
        head, _, body = data.partition(_END_OF_HEAD)
        lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        assert "transfer-encoding" not in headers, "a request without a length"
        self._body_bytes = int(headers.get("content-length", 0)) - len(body)
        with self._ledger.lock:
            self._ledger.num_by_method[lines[0].partition(" ")[0]] += 1
            self._ledger.up_bytes += len(data)
        if self._latency_s:
            time.sleep(self._latency_s)
        self._server.sendall(data)
        return True

    def _splice(self, source: socket.socket, target: socket.socket, size_bytes: int) -> int:
        moved = os.splice(source.fileno(), self._in, size_bytes)
        left = moved
        while left:
            left -= os.splice(self._out, target.fileno(), left)
        return moved
