"""A bucket as an object store whose every operation is one request, tried once (a listing: one per page)."""

from __future__ import annotations

import copy
import hashlib
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar
from urllib.parse import quote

from storage.errors import AlreadyExists, Cause, Corrupt, Denied, Interrupted, NotFound, Transient
from storage.stores import objects
from storage.stores.buffers import Buffer, size_of, views_of
from storage.stores.keys import check_key, check_prefix
from storage.stores.objects import Capability, ObjectInfo, ObjectStore, Upload, check_read_size, exists
from storage.stores.s3.client import S3Client
from storage.stores.s3.connections import Connections
from storage.stores.s3.digests import Sent, digest, headers_of
from storage.stores.s3.etags import WEAK, bare, marked
from storage.stores.s3.listing import Page, all_pages
from storage.stores.s3.options import S3Location, S3Options, format_url
from storage.stores.s3.probe import honours_conditional_deletes, honours_conditions
from storage.stores.s3.refusals import Request, parse_body, to_error
from storage.stores.s3.responses import Response, TooLong, error_body

T = TypeVar("T")

_OK = (200, 204, 206)
_NUMBER = re.compile(r"[0-9]{1,19}")
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")

_PROBES: Mapping[Capability, Callable[[Bucket], bool]] = {
    Capability.CONDITIONAL_PUTS: honours_conditions,
    Capability.CONDITIONAL_DELETES: honours_conditional_deletes,
}
FetchPage = Callable[[str, str | None, str], Page]
"""From a prefix, the token of a page (None for the first) and a delimiter to that page."""

_verdicts: dict[tuple[str, str, Capability], bool] = {}
_verdicts_lock = threading.Lock()


@dataclass(frozen=True)
class _Exchange:
    """One request for one object; `verb` is for messages. `if_absent`: the headers say so."""

    verb: str
    method: str
    key: str
    query: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    views: Sequence[memoryview] = ()
    if_absent: bool = False


class Bucket(ObjectStore):
    """See `ObjectStore`; `storage.stores.s3.store` makes it patient, and puts large objects in parts."""

    def __init__(self, location: S3Location, options: S3Options) -> None:
        self._location = location
        self._options = options
        self._client = S3Client(location, options)
        self._connections = Connections(self._client.address, options.connect_timeout_s, options.stall_timeout_s)
        self._closers = [self._connections.close, self._client.close]
        self._is_known = False

    def impatient(self, timeout_s: float) -> Bucket:
        """See `ObjectStore.impatient`. It has connections of its own, with shorter time-outs; credentials are shared.

        Listings and the control of uploads go over this store's connections, with its time-outs.
        """
        options, other = self._options, copy.copy(self)
        other._connections = Connections(
            self._client.address, min(timeout_s, options.connect_timeout_s), min(timeout_s, options.stall_timeout_s)
        )
        other._closers = []
        self._closers.append(other._connections.close)
        return other

    def close(self) -> None:
        """See `ObjectStore.close`."""
        for close in self._closers:
            close()

    @property
    def url(self) -> str:
        """`s3://bucket/prefix?options`, without any credentials."""
        return format_url(self._location, self._options)

    @property
    def name(self) -> tuple[str, str]:
        """What tells this bucket from all others."""
        return self._client.endpoint, self._location.bucket

    def can(self, capability: Capability) -> bool:
        """See `ObjectStore.can`. What only the server knows is found out by the first who asks in this process."""
        if (probe := _PROBES.get(capability)) is None:
            return capability is Capability.GUARDED_READS
        with _verdicts_lock:
            if (*self.name, capability) not in _verdicts:
                _verdicts[*self.name, capability] = probe(self)
            return _verdicts[*self.name, capability]

    # objects ----------------------------------------------------------------------------------------------------

    def put(self, key: str, buffers: Sequence[Buffer], *, if_absent: bool = False) -> ObjectInfo:
        """See `ObjectStore.put`; one request, whatever the size."""
        return self.put_object(key, buffers, with_condition=if_absent and self.guard_new(key))

    def guard_new(self, key: str) -> bool:
        """Have `key` be new, as far as the server lets us; whether its put is to send a condition, which is honoured.

        Where none is, all that can be done is to look first. Raises AlreadyExists.
        """
        check_key(key)
        if self.can(Capability.CONDITIONAL_PUTS):
            return True
        if exists(self, key):
            raise AlreadyExists(f"{self._what(key)} exists")
        return False

    def put_object(self, key: str, buffers: Sequence[Buffer], *, with_condition: bool) -> ObjectInfo:
        """One PUT; `with_condition` sends `If-None-Match: *`."""
        views = views_of(buffers)
        size_bytes = size_of(views)
        headers = {
            **self._put_headers,
            **({"If-None-Match": "*"} if with_condition else {}),
            **self._checksum(views)[0],
        }
        etag = self._exchange(_Exchange("put", "PUT", key, "", headers, views, with_condition), _etag_of)
        return ObjectInfo(key, size_bytes, etag)

    def read_into(self, key: str, offset: int, buffers: Sequence[memoryview], *, if_match: str | None = None) -> str:
        """See `ObjectStore.read_into`; a body that breaks off raises Interrupted."""
        views = views_of(buffers)
        size_bytes = size_of(views)
        if not size_bytes:
            info = self.info(key)
            self._check_empty_read(info, offset, if_match)
            return info.etag
        headers = {"Range": f"bytes={offset}-{offset + size_bytes - 1}", "Accept-Encoding": "identity"}
        if if_match and not if_match.startswith(WEAK):  # servers let no weak one match; `_check_range` compares it
            headers["If-Match"] = f'"{if_match}"'

        def consume(response: Response) -> str:
            self._check_range(key, response, offset, size_bytes, if_match)
            try:
                response.read_into(views)
            except Interrupted as error:
                error.args = (f"read {self._what(key)}: {error}",)
                error.etag = marked(error.etag)
                raise
            return marked(response.headers.get("ETag", ""))

        return self._exchange(_Exchange("read", "GET", key, headers=headers), consume)

    def read(self, key: str) -> bytes:
        """See `ObjectStore.read`."""

        def consume(response: Response) -> bytes:
            try:
                return response.read(objects.READ_SIZE_BYTES_MAX)
            except TooLong as error:
                check_read_size(self._what(key), error.size_bytes)
                raise

        return self._exchange(_Exchange("read", "GET", key, headers={"Accept-Encoding": "identity"}), consume)

    def info(self, key: str) -> ObjectInfo:
        """See `ObjectStore.info`."""

        def consume(response: Response) -> ObjectInfo:
            response.read_start()
            size = response.headers.get("Content-Length", "")
            if _NUMBER.fullmatch(size) is None:
                told = f"{size!r} as its Content-Length" if size else "no Content-Length"
                raise Transient(f"look at {self._what(key)}: the answer has {told}", Cause.TRUNCATED)
            return ObjectInfo(key, int(size), bare(response.headers.get("ETag", "")))

        return self._exchange(_Exchange("look at", "HEAD", key), consume)

    def delete(self, key: str) -> None:
        """See `ObjectStore.delete`. One request each: not every server has the one for many."""
        try:
            self._exchange(_Exchange("delete", "DELETE", key), Response.read_start)
        except NotFound:
            return

    def delete_version(self, key: str, etag: str) -> bool:
        """See `ObjectStore.delete_version`."""
        try:
            guarded = _Exchange("delete", "DELETE", key, headers={"If-Match": f'"{etag}"'})
            self._exchange(guarded, Response.read_start)
        except NotFound:
            return True
        except Corrupt:  # 412: another version is there
            return False
        return True

    # listings ---------------------------------------------------------------------------------------------------

    def page(self, prefix: str, token: str | None, delimiter: str = "") -> Page:
        """One page of a listing, with keys as the server has them."""
        check_prefix(prefix)
        root = self._location.prefix + prefix
        return self._client.page(root, token, delimiter, self._request("list", prefix))

    def list(self, prefix: str, fetch: FetchPage | None = None) -> Sequence[ObjectInfo]:
        """See `ObjectStore.list`; `fetch` gets one page, by default `page`. Raises Denied where there is no end.

        What no key of ours can name (folder markers) is left out.
        """
        found = []
        for name, size_bytes, etag, when in (row for page in self._pages(prefix, "", fetch) for row in page.objects):
            key = name.removeprefix(self._location.prefix)
            if _is_key(key):
                found.append(ObjectInfo(key, size_bytes, bare(etag), when))
        return sorted(found, key=lambda info: info.key)

    def folders(self, prefix: str, fetch: FetchPage | None = None) -> Sequence[str]:
        """See `ObjectStore.folders`; `fetch` gets one page, by default `page`. Raises Denied where there is no end."""
        root, pages = self._location.prefix + prefix, self._pages(prefix, "/", fetch)
        names = (name.removeprefix(root).rstrip("/") for page in pages for name in page.folders)
        return sorted(name for name in names if _is_key(name))

    def _pages(self, prefix: str, delimiter: str, fetch: FetchPage | None) -> Sequence[Page]:
        fetch_page = fetch or self.page
        return all_pages(
            f"list {self._what(prefix)}",
            lambda token: fetch_page(prefix, None if token is None else str(token), delimiter),
        )

    # multipart --------------------------------------------------------------------------------------------------

    def create_upload(self, key: str) -> str:
        """Begin a multipart upload and return its id."""
        return self._client.create_upload(self._location.prefix + key, self._request("put", key))

    def put_part(self, key: str, upload: str, number: int, views: Sequence[memoryview]) -> Sent:
        """Send part `number` (from 1)."""
        query = f"partNumber={number}&uploadId={quote(upload, safe='-._~')}"
        headers, digest = self._checksum(views)
        etag = self._exchange(_Exchange("put", "PUT", key, query, headers, views), _raw_etag_of)
        if not etag:
            text = f"put part {number} of {self._what(key)}: the answer has no ETag, so the parts cannot be joined"
            raise Transient(text, Cause.TRUNCATED)
        return Sent(etag, digest)

    def complete_upload(self, key: str, upload: str, parts: Sequence[Sent], *, with_condition: bool) -> str:
        """Make the object of its parts; its etag. Raises NotFound when the upload is gone (or done)."""
        request = self._request("put", key, if_absent=with_condition)
        return bare(self._client.complete_upload(self._location.prefix + key, upload, parts, request))

    def uploads(self) -> Sequence[Upload]:
        """See `ObjectStore.uploads`."""
        rows = self._client.uploads(self._location.prefix, self._request("list the uploads of", ""))
        named = [(name.removeprefix(self._location.prefix), upload, when) for name, upload, when in rows]
        return [Upload(key, upload, when) for key, upload, when in named if _is_key(key)]

    def abort(self, upload: Upload) -> None:
        """See `ObjectStore.abort`."""
        self.abort_upload(upload.key, upload.id)

    def abort_upload(self, key: str, upload: str) -> None:
        """Give an upload up. Raises NotFound when it is gone (or done)."""
        self._client.abort_upload(self._location.prefix + key, upload, self._request("abort the upload of", key))

    # ------------------------------------------------------------------------------------------------------------

    @property
    def _signs_payload(self) -> bool:
        wanted = self._options.sign_payload
        return wanted == "always" or (wanted == "auto" and not self._client.address.tls)

    @property
    def _put_headers(self) -> Mapping[str, str]:
        headers: dict[str, str | None] = {
            "x-amz-storage-class": self._options.storage_class,
            "x-amz-server-side-encryption": self._options.sse,
            "x-amz-server-side-encryption-aws-kms-key-id": self._options.sse_kms_key_id,
        }
        return {name: value for name, value in headers.items() if value is not None}

    def _checksum(self, views: Sequence[memoryview]) -> tuple[Mapping[str, str], str]:
        """The headers with the body's checksum, and the checksum; nothing where none is wanted."""
        algorithm = self._options.checksum
        if algorithm is None:
            return {}, ""
        found = digest(algorithm, views)
        return headers_of(algorithm, found), found

    @property
    def _payer(self) -> Mapping[str, str]:
        payer = self._options.request_payer
        return {} if payer is None else {"x-amz-request-payer": payer}

    def _exchange(self, asked: _Exchange, consume: Callable[[Response], T]) -> T:
        method, key = asked.method, check_key(asked.key)
        path = quote(self._client.path + self._location.prefix + key, safe="/-._~")
        target = f"{path}?{asked.query}" if asked.query else path
        sent = {**asked.headers, **self._payer}
        payload_sha256, num_renewed = None, self._client.num_renewed
        if method == "PUT":
            sent["Content-Length"] = str(size_of(asked.views))
            payload_sha256 = _sha256(asked.views) if self._signs_payload else None
        signed = self._client.sign(method, target, sent, payload_sha256)
        request = self._request(asked.verb, key, if_absent=asked.if_absent, is_put=method == "PUT")

        def checked(response: Response) -> T:
            if response.status in _OK:
                self._is_known = True
                return consume(response)
            body = error_body(response)
            if method == "HEAD" and (response.status != 404 or not self._is_known):
                body = self._explain(target) or body
            refusal = parse_body(response.status, dict(response.headers), body)
            raise self._client.renewed(refusal, num_renewed, to_error(refusal, request, time.time()))

        return self._connections.exchange(method, target, signed, asked.views, checked)

    def _explain(self, target: str) -> bytes:
        """Why a HEAD was refused: its answer has no body, and a missing bucket looks like a missing object."""
        headers = self._client.sign("GET", target, {"Range": "bytes=0-0", **self._payer}, None)
        return self._connections.exchange("GET", target, headers, (), error_body)

    def _request(self, verb: str, key: str, *, if_absent: bool = False, is_put: bool = False) -> Request:
        return Request(verb, self._what(key), self._location.bucket, self._client.endpoint, is_put, if_absent)

    def _what(self, key: str) -> str:
        return f"s3://{self._location.bucket}/{self._location.prefix}{key}"

    def _check_empty_read(self, info: ObjectInfo, offset: int, if_match: str | None) -> None:
        if if_match and info.etag != bare(if_match):
            raise Corrupt(f"{self._what(info.key)} changed while it was read")
        if offset > info.size_bytes:
            raise Corrupt(f"{self._what(info.key)} is shorter than it must be ({info.size_bytes} bytes)")

    def _check_range(self, key: str, response: Response, offset: int, size_bytes: int, if_match: str | None) -> None:
        """Whether this is the answer to what was asked: not every proxy and server keeps to ranges and conditions."""
        etag = bare(response.headers.get("ETag", ""))
        if if_match and etag != bare(if_match):
            raise Corrupt(f"{self._what(key)} changed while it was read")
        match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if response.status != 206 or match is None or int(match[1]) != offset:
            raise Denied(
                f"{self._client.endpoint} does not answer ranged reads; {self._what(key)} cannot be read from it"
            )
        if int(match[2]) + 1 < offset + size_bytes:
            raise Corrupt(f"{self._what(key)} is shorter than it must be ({match[3]} bytes)")


def _raw_etag_of(response: Response) -> str:
    response.read_start()
    return response.headers.get("ETag", "")


def _etag_of(response: Response) -> str:
    return bare(_raw_etag_of(response))


def _is_key(name: str) -> bool:
    try:
        check_key(name)
    except Denied:
        return False
    return True


def _sha256(views: Sequence[memoryview]) -> str:
    digest = hashlib.sha256()
    for view in views:
        digest.update(view)
    return digest.hexdigest()
