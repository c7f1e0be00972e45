"""Bytes of objects, fetched as fast as a client can by parallel ranged GETs, and not looked at: the limit for reading.

Three clients, of which the benchmark takes the fastest: threads that receive from plain sockets into memory in one
system call per part (`recv_into` with MSG_WAITALL), this package's own pooled connections, and the C client of AWS
(`awscrt`), as `boto3` uses it on large machines.
"""

from __future__ import annotations

import queue
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from urllib.parse import urlsplit

import awscrt.auth
import awscrt.http
import awscrt.io
import awscrt.s3
import boto3
from botocore.client import Config

from storage import open_store
from storage.parallel import run_all
from tests.s3 import BUCKET

PART_SIZE_BYTES = 16 * 1024 * 1024
NUM_THREADS = 8


@dataclass(frozen=True)
class Span:
    """Bytes [start, start + size_bytes) of an object, by its key in the bucket, that belong at byte `at` of memory."""

    key: str
    start: int
    size_bytes: int
    at: int


def spans_of(objects: Sequence[tuple[str, int]], rank: int, world_size: int) -> list[Span]:
    """This rank's equal share of all bytes of the objects (key, size in bytes), in parts."""
    total = sum(size for _, size in objects)
    first, last = rank * total // world_size, (rank + 1) * total // world_size
    found, begin = [], 0
    for key, size in objects:
        start, stop = max(first, begin), min(last, begin + size)
        found += [
            Span(key, place - begin, min(PART_SIZE_BYTES, stop - place), place - first)
            for place in range(start, stop, PART_SIZE_BYTES)
        ]
        begin += size
    return found


def read_by_sockets(endpoint_url: str, spans: Sequence[Span], memory: memoryview) -> None:
    """Plain sockets: nothing but a head of an answer is ever parsed."""
    client = boto3.client("s3", endpoint_url=endpoint_url, config=Config(s3={"addressing_style": "path"}))
    where = urlsplit(endpoint_url)
    heads = {key: _head(client, where.netloc, key) for key in {span.key for span in spans}}
    todo: queue.SimpleQueue[Span] = queue.SimpleQueue()
    for span in spans:
        todo.put(span)

    def work() -> None:
        with socket.create_connection((where.hostname, where.port)) as connection:
            for span in _drained(todo):
                last = span.start + span.size_bytes - 1
                connection.sendall(heads[span.key] + f"Range: bytes={span.start}-{last}\r\n\r\n".encode())
                _receive(connection, memory[span.at : span.at + span.size_bytes])

    _in_threads(work)


def read_by_pool(endpoint_url: str, spans: Sequence[Span], memory: memoryview) -> None:
    """`storage.stores.s3`, without plan and checksums."""
    store = open_store(f"s3://{BUCKET}/?endpoint_url={endpoint_url}")

    def read(span: Span) -> Callable[[], object]:
        return lambda: store.read_into(span.key, span.start, [memory[span.at : span.at + span.size_bytes]])

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        run_all(pool, map(read, spans))


def read_by_crt(endpoint_url: str, spans: Sequence[Span], memory: memoryview) -> None:
    """AWS's C client. It hands over bytes objects, which are copied once more."""
    where = urlsplit(endpoint_url)
    credentials = boto3.Session().get_credentials()
    assert credentials is not None
    provider = awscrt.auth.AwsCredentialsProvider.new_static(credentials.access_key, credentials.secret_key)
    bootstrap = awscrt.io.ClientBootstrap.get_or_create_static_default()
    client = awscrt.s3.S3Client(
        bootstrap=bootstrap,
        region="us-east-1",
        tls_mode=awscrt.s3.S3RequestTlsMode.DISABLED,
        credential_provider=provider,
        part_size=PART_SIZE_BYTES,
        throughput_target_gbps=10.0,
    )

    def ask(span: Span) -> awscrt.s3.S3Request:
        def keep(chunk: bytes, offset: int, **_: object) -> None:
            at = span.at + offset - span.start
            memory[at : at + len(chunk)] = chunk

        headers = awscrt.http.HttpHeaders([("host", where.netloc)])
        headers.add("range", f"bytes={span.start}-{span.start + span.size_bytes - 1}")
        request = awscrt.http.HttpRequest("GET", f"/{BUCKET}/{span.key}", headers)
        return client.make_request(type=awscrt.s3.S3RequestType.GET_OBJECT, request=request, on_body=keep)

    for request in [ask(span) for span in spans]:
        request.finished_future.result(timeout=120)


CLIENTS = {"sockets": read_by_sockets, "pooled": read_by_pool, "awscrt": read_by_crt}


def _head(client: object, host: str, key: str) -> bytes:
    url = client.generate_presigned_url("get_object", Params={"Bucket": BUCKET, "Key": key})  # type: ignore[attr-defined]
    return f"GET {url.split(host, 1)[1]} HTTP/1.1\r\nHost: {host}\r\n".encode()


def _receive(connection: socket.socket, view: memoryview) -> None:
    """The answer's head, and its body into `view`."""
    head = b""
    while b"\r\n\r\n" not in head:
        received = connection.recv(4096)
        assert received, "the server closed the connection"
        head += received
    head, _, first = head.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 206"), head.decode("latin-1")
    view[: len(first)] = first
    at = len(first)
    while at < view.nbytes:
        num_bytes = connection.recv_into(view[at:], view.nbytes - at, socket.MSG_WAITALL)
        assert num_bytes, "the body broke off"
        at += num_bytes


def _drained(todo: queue.SimpleQueue[Span]) -> Iterator[Span]:
    while True:
        try:
            yield todo.get_nowait()
        except queue.Empty:
            return


def _in_threads(work: Callable[[], None]) -> None:
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        run_all(pool, [work] * NUM_THREADS)
