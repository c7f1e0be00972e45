"""`s3://`: a bucket with retries, and large objects put in parts."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from storage.errors import AlreadyExists, Cause, NotFound, StorageError, Transient
from storage.fetch import run_all
from storage.flight import Flight
from storage.objects import Buffer, ObjectInfo, Upload
from storage.retries import Retrier
from storage.retrying import RetryingStore, stored_equal, views_of
from storage.s3.bucket import Bucket
from storage.s3.client import Page
from storage.s3.options import parse_url
from storage.s3.uploads import multipart_etag, part_size_bytes, parts_of

log = logging.getLogger(__name__)

_NUM_PART_THREADS = 16

_flights: dict[tuple[str, str], Flight] = {}
_flights_lock = threading.Lock()


class S3Store(RetryingStore):
    """The object store of a bucket. Every part of a large object is a request of its own, with its own retries."""

    def __init__(self, bucket: Bucket, retrier: Retrier, part_bytes: int) -> None:
        super().__init__(bucket, retrier)
        self._bucket = bucket
        self._part_bytes = part_bytes
        self._pool = ThreadPoolExecutor(_NUM_PART_THREADS, thread_name_prefix="storage-part")

    def put(self, key: str, buffers: Sequence[Buffer], *, if_absent: bool = False) -> ObjectInfo:
        """See `ObjectStore.put`."""
        views = views_of(buffers)
        if sum(view.nbytes for view in views) <= self._part_bytes:
            return super().put(key, views, if_absent=if_absent)
        # AWS wants the whole upload begun anew after a conflict, see CompleteMultipartUpload
        upload = functools.partial(self._put_parts, key, views, if_absent)
        return self._retrier.call(f"put {key}", upload, in_flight=False)

    def list(self, prefix: str) -> Sequence[ObjectInfo]:
        """See `ObjectStore.list`."""
        return self._bucket.listed(self._bucket.pages(prefix, "", self._page))

    def folders(self, prefix: str) -> Sequence[str]:
        """See `ObjectStore.folders`."""
        return self._bucket.folded(prefix, self._bucket.pages(prefix, "/", self._page))

    def uploads(self) -> Sequence[Upload]:
        """See `MultipartStore.uploads`."""
        return self._retrier.call("list uploads", self._bucket.uploads)

    def abort(self, upload: Upload) -> None:
        """See `MultipartStore.abort`."""
        self._retrier.call(f"abort {upload.key}", lambda: self._bucket.abort_upload(upload.key, upload.id))

    def _page(self, prefix: str, token: str | None, delimiter: str) -> Page:
        return self._retrier.call(f"list {prefix}", lambda: self._bucket.page(prefix, token, delimiter))

    def _put_parts(self, key: str, views: Sequence[memoryview], if_absent: bool) -> ObjectInfo:
        self._retrier.call(f"look at {key}", lambda: self._bucket.look_first(key, if_absent))
        size_bytes = sum(view.nbytes for view in views)
        upload = self._retrier.call(f"begin {key}", lambda: self._bucket.create_upload(key))
        try:
            parts = parts_of(views, part_size_bytes(size_bytes, self._part_bytes))
            calls = [functools.partial(self._put_part, key, upload, n, part) for n, part in enumerate(parts, 1)]
            etags = run_all(self._pool, calls)
            return self._complete(key, upload, views, etags, if_absent)
        except BaseException:
            self._abort(key, upload)
            raise

    def _put_part(self, key: str, upload: str, number: int, part: Sequence[memoryview]) -> str:
        send = functools.partial(self._bucket.put_part, key, upload, number, part)
        return self._retrier.call(f"put part {number} of {key}", send)

    def _complete(
        self, key: str, upload: str, views: Sequence[memoryview], etags: Sequence[str], if_absent: bool
    ) -> ObjectInfo:
        """Join the parts. Where the answers leave doubt, the object itself says whether it has happened."""
        condition = if_absent and self.capabilities.conditional_puts
        doubts: list[Transient] = []

        def attempt() -> str:
            try:
                return self._bucket.complete_upload(key, upload, etags, condition)
            except Transient as error:
                error.given_up = error.cause is Cause.CONFLICT
                doubts.append(error)
                raise

        try:
            etag = self._retrier.call(f"complete {key}", attempt)
        except (NotFound, AlreadyExists, Transient) as error:
            # an upload that is gone may be done: somebody on the way can have sent the request twice
            found = self._settle(key, views, etags) if doubts or isinstance(error, NotFound) else None
            if found is not None:
                log.info("%s was put, though the store said: %s", key, error)
                return found
            if isinstance(error, Transient) and error.cause is Cause.CONFLICT:
                error.given_up = False  # the whole upload is begun anew
            raise
        return ObjectInfo(key, sum(view.nbytes for view in views), etag)

    def _settle(self, key: str, views: Sequence[memoryview], etags: Sequence[str]) -> ObjectInfo | None:
        """The object's info if it is what the parts make: by its etag, or else byte by byte."""
        try:
            info = self.info(key)
            if f'"{info.etag}"' == multipart_etag(etags) and info.size_bytes == sum(view.nbytes for view in views):
                return info
            return stored_equal(self, key, views)
        except (NotFound, Transient):
            return None

    def _abort(self, key: str, upload: str) -> None:
        try:
            self._retrier.call(f"abort {key}", lambda: self._bucket.abort_upload(key, upload))
        except NotFound:
            return
        except StorageError as error:
            log.warning("parts of an upload of %s are left behind in %s: %s", key, self.url, error)


def open_s3(rest: str) -> S3Store:
    """Open what follows `s3://`. Raises BadURL, Denied."""
    location, options = parse_url(rest)
    bucket = Bucket(location, options)
    with _flights_lock:
        # one flight for all stores of this process in a bucket: it is the bucket that throttles
        flight = _flights.setdefault(bucket.name, Flight(options.num_connections))
    return S3Store(bucket, Retrier(flight, bucket.retries), options.part_size_bytes)
