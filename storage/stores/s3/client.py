"""The only file that knows boto3: credentials, signatures, control requests, multipart uploads.

boto3 tries nothing again here: `storage.stores.retry_policy` does, from one table for everything. Nor does it send
anything: it makes the requests and reads the answers, and between the two they go over the connections of
`storage.stores.s3.connections`, with an end to each answer.
"""

from __future__ import annotations

import copy
import functools
import logging
import re
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

import boto3.session
import botocore.session
from botocore import UNSIGNED
from botocore.auth import UNSIGNED_PAYLOAD, S3SigV4Auth
from botocore.awsrequest import AWSPreparedRequest, AWSRequest, AWSResponse
from botocore.client import Config
from botocore.credentials import Credentials
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectTimeoutError,
    CredentialRetrievalError,
    EndpointConnectionError,
    HTTPClientError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    ProxyConnectionError,
    ReadTimeoutError,
    SSLError,
    TokenRetrievalError,
)
from botocore.handlers import BUILTIN_HANDLERS, REGISTER_FIRST, REGISTER_LAST
from botocore.hooks import EventAliaser, HierarchicalEmitter
from botocore.parsers import ResponseParserError

from storage.errors import BadURL, Cause, Denied, StorageError, Transient
from storage.stores.s3.connections import Address, Connections, connect_error
from storage.stores.s3.digests import Sent, part_arguments, upload_arguments
from storage.stores.s3.listing import Page, UploadsPage, all_pages, needed, page_of, uploads_of
from storage.stores.s3.options import S3Location, S3Options
from storage.stores.s3.proxies import find_proxy
from storage.stores.s3.refusals import WORN_OUT, Refusal, Request, to_error
from storage.stores.s3.responses import Response, TooLong

log = logging.getLogger(__name__)

T = TypeVar("T")

PAGE_SIZE = 1000
ANSWER_SIZE_BYTES_MAX = 4 * 1024 * 1024
"""The largest answer to a control request. A page of a thousand names of 1024 bytes, each as %XX, has 3.5 MB."""
_FLAG = re.compile(rb"<IsTruncated(?!>\s*(true|false)\s*</IsTruncated>)")
"""botocore takes everything but "true" for false, and a listing would be cut short."""
_REGION = "us-east-1"  # of those who name none
_UNSENDABLE = re.compile(r"[^!-~]")
_AWS = (".amazonaws.com", ".amazonaws.com.cn", ".aws")
_NO_CREDENTIALS = (
    "no credentials for {}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or profile=NAME in the URL,"
    " or anonymous=true for a public bucket"
)


class S3Client:
    """One bucket's control requests, and the signatures of all others. Thread-safe.

    Raises:
        BadURL: no such profile, an option that botocore refuses, or a proxy that cannot be used.
        Denied: there are no credentials.
    """

    def __init__(self, location: S3Location, options: S3Options) -> None:
        self._bucket = location.bucket
        self._options = options
        self._renewing = threading.Lock()
        self.num_renewed = 0
        try:
            session = _session(options.profile)
            self._client = _make_client(session, options)
            self._credentials = None if options.anonymous else session.get_credentials()
            if self._credentials is not None:
                self._frozen()
            url = urlsplit(
                self._client.generate_presigned_url("get_object", Params={"Bucket": self._bucket, "Key": "k"})
            )
        except ProfileNotFound as error:
            raise BadURL(f"there is no profile {error.kwargs['profile']!r} in the AWS configuration") from None
        except (NoCredentialsError, PartialCredentialsError):
            raise Denied(_NO_CREDENTIALS.format(f"s3://{self._bucket}")) from None
        except (BotoCoreError, ValueError, OSError) as error:  # of a file with a token, say
            raise BadURL(f"s3://{self._bucket} cannot be opened: {error}") from None
        self._anonymous = options.anonymous
        self.endpoint = str(self._client.meta.endpoint_url)
        self.path = unquote(url.path).removesuffix("k")
        self.host = url.netloc
        ca_bundle = options.ca_bundle or session.get_config_variable("ca_bundle")
        tls = url.scheme == "https"
        # a host of the form that urllib's rules for NO_PROXY are about: with its port
        proxy = find_proxy(url.scheme, url.netloc, urllib.request.getproxies(), urllib.request.proxy_bypass)
        self.address = Address(url.hostname or "", url.port or (443 if tls else 80), tls, ca_bundle, proxy)
        self._region = self._client.meta.region_name or _REGION
        self._checksum = options.checksum
        self._arguments: Mapping[str, str] = {"Bucket": self._bucket}
        if options.request_payer is not None:
            self._arguments = {**self._arguments, "RequestPayer": options.request_payer}
        self._uploads: Mapping[str, str] = _upload_arguments(options)
        self._connections = Connections(self.address, options.connect_timeout_s, options.stall_timeout_s)
        self._client.meta.events.register("before-send.s3", self._send)

    def renewed(self, refusal: Refusal, num_renewed: int, error: StorageError) -> StorageError:
        """`error`, as which a request was refused, or one that is tried again: there are other credentials by now.

        botocore reads a file of credentials once, as it does the environment. Who has short-lived ones in a file
        writes it anew in time, and this process outlives many of them.

        Args:
            num_renewed: the number when the request was signed.
        """
        if refusal.code not in WORN_OUT or not self._renew(num_renewed):
            return error
        return Transient(f"{error} (there are other credentials now)")

    def _renew(self, num_renewed: int) -> bool:
        """Whether there are other credentials now than when there were so many."""
        with self._renewing:
            if self.num_renewed != num_renewed:
                return True
            if self._credentials is None:
                return False
            try:
                session = _session(self._options.profile)
                found = session.get_credentials()
                if found is None or found.get_frozen_credentials() == self._credentials.get_frozen_credentials():
                    return False
                client = _make_client(session, self._options)
            except (BotoCoreError, ValueError, OSError) as error:
                log.warning("s3://%s: there are no other credentials: %s", self._bucket, error)
                return False
            client.meta.events.register("before-send.s3", self._send)
            self._client, self._credentials, self.num_renewed = client, found, num_renewed + 1
            log.info("s3://%s: goes on with other credentials", self._bucket)
            return True

    def close(self) -> None:
        """Close the connections."""
        self._connections.close()
        self._client.close()

    def sign(self, method: str, target: str, headers: Mapping[str, str], payload_sha256: str | None) -> dict[str, str]:
        """`headers` and those that sign a request to `target`, which is quoted already. Raises Denied, Transient."""
        scheme = "https" if self.address.tls else "http"
        request = AWSRequest(method, f"{scheme}://{self.host}{target}", {**headers, "Host": self.host})
        if not self._anonymous:
            credentials = self._guarded(
                Request("sign for", f"s3://{self._bucket}", self._bucket, self.endpoint), self._frozen
            )
            _Signer(credentials, self._region, payload_sha256 or UNSIGNED_PAYLOAD).add_auth(request)
        return dict(request.headers.items())

    def page(self, prefix: str, token: str | None, delimiter: str, request: Request) -> Page:
        """One page of the objects (and folders, with a delimiter) below `prefix`."""
        arguments: dict[str, Any] = {"Prefix": prefix, "Delimiter": delimiter, "ContinuationToken": token}
        given = {name: value for name, value in arguments.items() if value}

        def ask() -> Page:
            return page_of(self._client.list_objects_v2(**self._arguments, **given, MaxKeys=PAGE_SIZE), prefix)

        return self._guarded(request, ask)

    def create_upload(self, key: str, request: Request) -> str:
        """Begin a multipart upload and return its id."""
        arguments = {**self._arguments, "Key": key, **self._uploads}
        return self._guarded(
            request, lambda: needed(self._client.create_multipart_upload(**arguments), "UploadId", str)
        )

    def complete_upload(self, key: str, upload: str, parts: Sequence[Sent], request: Request) -> str:
        """Make one object of the parts, if there is none yet where `request` says so; its etag.

        An error inside a 200 is an error all the same.
        """
        rows = [
            {"PartNumber": number, "ETag": part.etag, **part_arguments(self._checksum, part)}
            for number, part in enumerate(parts, 1)
        ]
        arguments: dict[str, Any] = {**self._arguments, "Key": key, "UploadId": upload}
        arguments["MultipartUpload"] = {"Parts": rows}
        if request.if_absent:
            arguments["IfNoneMatch"] = "*"
        return self._guarded(request, lambda: needed(self._client.complete_multipart_upload(**arguments), "ETag", str))

    def uploads(self, prefix: str, request: Request) -> list[tuple[str, str, float]]:
        """All unfinished uploads below `prefix`: (key, id, when begun). Raises Denied where there is no end."""

        def ask(token: object | None) -> UploadsPage:
            given = dict(zip(("KeyMarker", "UploadIdMarker"), token, strict=True)) if isinstance(token, tuple) else {}
            given = {name: value for name, value in given.items() if value}
            return uploads_of(self._client.list_multipart_uploads(**self._arguments, Prefix=prefix, **given), prefix)

        pages = all_pages(f"{request.verb} {request.what}", lambda token: self._guarded(request, lambda: ask(token)))
        return [row for page in pages for row in page.rows]

    def abort_upload(self, key: str, upload: str, request: Request) -> None:
        """Free what the parts of an upload hold. Raises NotFound if there is no such upload any more."""
        arguments = {**self._arguments, "Key": key, "UploadId": upload}
        self._guarded(request, lambda: self._client.abort_multipart_upload(**arguments))

    def _send(self, request: AWSPreparedRequest, **kwargs: Any) -> AWSResponse:
        """botocore's `before-send`: whoever answers it has sent the request."""
        url = urlsplit(request.url)
        if url.netloc != self.host:  # where botocore follows a redirect to; the other requests do not
            raise Denied(f"bucket {self._bucket!r} is somewhere else, at {url.netloc}; add ?region=... to the URL")
        headers = {name: _header(value) for name, value in request.headers.items() if name.lower() != "host"}
        body = request.body.encode() if isinstance(request.body, str) else bytes(request.body or b"")

        def consume(response: Response) -> AWSResponse:
            data = response.read(ANSWER_SIZE_BYTES_MAX)
            if b"<!DOCTYPE" in data or b"<!ENTITY" in data:
                raise ValueError("it defines entities")
            if _FLAG.search(data):
                raise ValueError("its IsTruncated is neither true nor false")
            return AWSResponse(request.url, response.status, dict(response.headers), _Body(data))

        target = url.path + (f"?{url.query}" if url.query else "")
        given = {**headers, "Host": self.host}
        return self._connections.exchange(request.method, target, given, [memoryview(body)] if body else [], consume)

    def _frozen(self) -> Credentials:
        if self._credentials is None:
            raise NoCredentialsError
        try:
            frozen = self._credentials.get_frozen_credentials()
        except OSError as error:
            raise Denied(f"s3://{self._bucket}: the credentials cannot be renewed: {error}") from None
        if any(_UNSENDABLE.search(text or "") for text in (frozen.access_key, frozen.token)):
            raise Denied(
                f"s3://{self._bucket}: the access key or the session's token holds a line break, a blank or the like;"
                " check AWS_ACCESS_KEY_ID and AWS_SESSION_TOKEN, or the profile"
            )
        return Credentials(frozen.access_key, frozen.secret_key, frozen.token)

    def _guarded(self, request: Request, call: Callable[[], T]) -> T:
        num_renewed = self.num_renewed
        try:
            return call()
        except ProxyConnectionError as error:
            why = connect_error(self.address, _behind(error))
            why.args = (f"{request.verb} {request.what}: {why}",)
            raise why from None
        except ClientError as error:
            refusal = _answer(error)
            raise self.renewed(refusal, num_renewed, to_error(refusal, request, time.time())) from None
        except BotoCoreError as error:
            raise _translated(error, request) from None
        except (ResponseParserError, TooLong, ValueError, TypeError, LookupError, AttributeError) as error:
            # botocore parses what was damaged on the way as far as it can
            said = type(error).__name__ if isinstance(error, ResponseParserError) else str(error).splitlines()[0]
            text = f"{request.verb} {request.what}: the answer cannot be understood ({said})"
            raise Transient(text, Cause.TRUNCATED) from None


class _Body:
    """A body that has come, as botocore asks for it."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def stream(self) -> Iterator[bytes]:
        yield self._data


def _header(value: str | bytes) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else value


class _Signer(S3SigV4Auth):
    """Signs with a digest of the payload that the caller knows: botocore would need the body in its hands."""

    def __init__(self, credentials: Credentials, region: str, payload_sha256: str) -> None:
        super().__init__(credentials, "s3", region)
        self._payload_sha256 = payload_sha256

    def payload(self, request: AWSRequest) -> str:
        return self._payload_sha256


@functools.cache
def _loader() -> Any:
    """botocore's service models: parsing them anew for each client takes most of the time to make it."""
    return botocore.session.Session().get_component("data_loader")


@functools.cache
def _handlers() -> HierarchicalEmitter:
    """botocore's own handlers of events: a third of the time to make a client goes to registering them for each.

    Not by a session, to which those of plugins (`botocore.register_initializer`) would be added, as to every other one.
    """
    emitter = HierarchicalEmitter()
    names = EventAliaser(emitter)
    registers = {REGISTER_FIRST: names.register_first, REGISTER_LAST: names.register_last}
    for event, handler, *when in BUILTIN_HANDLERS:
        (registers[when[0]] if when else names.register)(event, handler)
    return emitter


def _session(profile: str | None) -> botocore.session.Session:
    handlers = copy.copy(_handlers())
    session = botocore.session.Session(event_hooks=handlers, include_builtin_handlers=False, profile=profile)
    session.register_component("data_loader", _loader())
    return session


def _make_client(session: botocore.session.Session, options: S3Options) -> Any:
    high = boto3.session.Session(botocore_session=session)  # once: it adds handlers to the session below

    def make(style: str) -> Any:
        config = Config(
            signature_version=UNSIGNED if options.anonymous else "s3v4",
            s3={"addressing_style": style},
            retries={"total_max_attempts": 1},
            connect_timeout=options.connect_timeout_s,
            read_timeout=options.stall_timeout_s,
            max_pool_connections=options.num_connections,
            # vendors refuse trailers that they do not know; our own checksums are in the manifest
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        return high.client(
            "s3",
            # an empty AWS_DEFAULT_REGION is none, and not a region of that name
            region_name=options.region or (None if session.get_config_variable("region") else _REGION),
            endpoint_url=options.endpoint_url,
            verify=options.ca_bundle,
            config=config,
        )

    if options.addressing_style != "auto":
        return make(options.addressing_style)
    if options.endpoint_url is not None:
        return make("path")
    client = make("auto")
    # the endpoint may come from the environment or from the profile: only botocore knows
    host = urlsplit(client.meta.endpoint_url).hostname or ""
    return client if host.endswith(_AWS) else make("path")


def _upload_arguments(options: S3Options) -> dict[str, str]:
    arguments: dict[str, str | None] = {
        **upload_arguments(options.checksum),
        "StorageClass": options.storage_class,
        "ServerSideEncryption": options.sse,
        "SSEKMSKeyId": options.sse_kms_key_id,
    }
    return {name: value for name, value in arguments.items() if value is not None}


def _translated(error: BotoCoreError, request: Request) -> StorageError:
    asked = f"{request.verb} {request.what}"
    if isinstance(error, SSLError):
        return Denied(f"{asked}: {error}; name the server's authority in ca_bundle")
    if isinstance(error, (EndpointConnectionError, ConnectTimeoutError)):
        return Transient(f"{asked}: {error}", Cause.UNREACHABLE)
    if isinstance(error, ReadTimeoutError):
        return Transient(f"{asked}: {error}", Cause.STALLED)
    if isinstance(error, HTTPClientError):
        return Transient(f"{asked}: {error}", Cause.RESET)
    if isinstance(error, (NoCredentialsError, PartialCredentialsError)):
        return Denied(_NO_CREDENTIALS.format(request.what))
    if isinstance(error, (CredentialRetrievalError, TokenRetrievalError)):
        return Denied(f"{asked}: the credentials cannot be refreshed: {error}")
    return Denied(f"{asked}: {error}")


def _behind(error: ProxyConnectionError) -> Exception:
    """What the socket said. botocore's text holds the proxy's URL, and may hide too little of the password in it."""
    found: BaseException | None = error.kwargs["error"]
    while found is not None and not isinstance(found, OSError):
        found = getattr(found, "original_error", None) or found.__cause__
    return found or ConnectionError("no connection")


def _answer(error: ClientError) -> Refusal:
    said, meta = error.response.get("Error", {}), error.response.get("ResponseMetadata", {})
    code, headers = str(said.get("Code", "")), meta.get("HTTPHeaders", {})
    region = said.get("Region") or headers.get("x-amz-bucket-region", "")
    status = int(meta.get("HTTPStatusCode", 0))
    return Refusal(status, "" if code.isdecimal() else code, str(said.get("Message", "")), region, headers)
