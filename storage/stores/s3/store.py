"""`s3://`: a bucket with retries, and large objects put in parts."""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass

from storage.agent import num_local_ranks
from storage.errors import AlreadyExists, Cause, NotFound, StorageError, Transient
from storage.parallel import Pool, run_all
from storage.stores.adaptive_limit import AdaptiveLimit
from storage.stores.buffers import Buffer, cut, size_of, views_of
from storage.stores.objects import Capability, Fetch, ObjectInfo, parts_of_size
from storage.stores.retry_policy import Retrier
from storage.stores.retrying_store import RetryingStore, stored_equal
from storage.stores.s3.bucket import Bucket
from storage.stores.s3.digests import Sent
from storage.stores.s3.etags import multipart_etag
from storage.stores.s3.listing import Page
from storage.stores.s3.options import parse_url
from storage.stores.s3.uploads import part_size_bytes

log = logging.getLogger(__name__)

_NUM_PART_THREADS = 16

_limits: dict[tuple[str, str], AdaptiveLimit] = {}
_limits_lock = threading.Lock()


_Part = Callable[[], Sequence[memoryview]]
"""Gives a part's bytes, as often as it is asked for them."""


@dataclass(frozen=True)
class _Content:
    """The content of an object that goes up in parts."""

    parts: Sequence[_Part]
    if_absent: bool = False


class S3Store(RetryingStore):
    """The object store of a bucket. Every part of a large object is a request of its own, with its own retries."""

    def __init__(self, bucket: Bucket, retrier: Retrier, part_bytes: int) -> None:
        super().__init__(bucket, retrier)
        self._bucket = bucket
        self._part_bytes = part_bytes
        self._pool = Pool(_NUM_PART_THREADS, thread_name_prefix="storage-part")

    def put(self, key: str, buffers: Sequence[Buffer], *, if_absent: bool = False) -> ObjectInfo:
        """See `ObjectStore.put`."""
        views = views_of(buffers)
        if (size_bytes := size_of(views)) <= self._part_bytes:
            return super().put(key, views, if_absent=if_absent)
        cuts = cut(views, part_size_bytes(size_bytes, self._part_bytes))
        parts: list[_Part] = [functools.partial(list, part) for part in cuts]
        return self._put_content(key, _Content(parts, if_absent), self._pool)

    def put_from(self, key: str, size_bytes: int, fetch: Fetch, pool: Executor) -> ObjectInfo:
        """See `ObjectStore.put_from`. A part that has to be sent again is not fetched again."""
        if size_bytes <= self._part_bytes:
            return super().put(key, fetch(0, size_bytes))
        places = parts_of_size(size_bytes, part_size_bytes(size_bytes, self._part_bytes))
        return self._put_content(key, _Content([functools.partial(fetch, *place) for place in places]), pool)

    def list(self, prefix: str) -> Sequence[ObjectInfo]:
        """See `ObjectStore.list`."""
        return self._bucket.list(prefix, self._page)

    def folders(self, prefix: str) -> Sequence[str]:
        """See `ObjectStore.folders`."""
        return self._bucket.folders(prefix, self._page)

    def close(self) -> None:
        """See `ObjectStore.close`."""
        self._pool.shutdown()
        super().close()

    def _page(self, prefix: str, token: str | None, delimiter: str) -> Page:
        return self._retrier.call(f"list {prefix}", lambda: self._bucket.page(prefix, token, delimiter))

    def _put_content(self, key: str, content: _Content, pool: Executor) -> ObjectInfo:
        # AWS wants the whole upload begun anew after a conflict, see CompleteMultipartUpload
        upload = functools.partial(self._put_parts, key, content, pool)
        return self._retrier.call(f"put {key}", upload, takes_slot=False)

    def _put_parts(self, key: str, content: _Content, pool: Executor) -> ObjectInfo:
        # parts wait for it on the same threads: a pool starts first what it was given first
        begun = pool.submit(self._begin, key, content)
        try:
            calls = [
                functools.partial(self._put_part, key, begun, number, part)
                for number, part in enumerate(content.parts, 1)
            ]
            sent = run_all(pool, calls)
            parts, size_bytes = [part for part, _ in sent], sum(size for _, size in sent)
            return self._complete(key, begun.result(), content, parts, size_bytes)
        except BaseException:
            if begun.exception() is None:
                self._abort(key, begun.result())
            raise

    def _begin(self, key: str, content: _Content) -> str:
        if content.if_absent:
            self._retrier.call(f"look at {key}", lambda: self._bucket.guard_new(key))
        return self._retrier.call(f"begin {key}", lambda: self._bucket.create_upload(key))

    def _put_part(self, key: str, begun: Future[str], number: int, part: _Part) -> tuple[Sent, int]:
        """The part as it was sent, and its size. It is fetched while the upload is begun."""
        views = part()
        send = functools.partial(self._bucket.put_part, key, begun.result(), number, views)
        return self._retrier.call(f"put part {number} of {key}", send), size_of(views)

    def _complete(self, key: str, upload: str, content: _Content, parts: Sequence[Sent], size_bytes: int) -> ObjectInfo:
        """Join the parts. Where the answers leave doubt, the object itself says whether it has happened."""
        condition = content.if_absent and self.can(Capability.CONDITIONAL_PUTS)
        doubts: list[Transient] = []

        def attempt() -> str:
            try:
                return self._bucket.complete_upload(key, upload, parts, with_condition=condition)
            except Transient as error:
                error.given_up = error.cause is Cause.CONFLICT
                doubts.append(error)
                raise

        try:
            etag = self._retrier.call(f"complete {key}", attempt)
        except (NotFound, AlreadyExists, Transient) as error:
            # an upload that is gone may be done: somebody on the way can have sent the request twice
            in_doubt = doubts or isinstance(error, NotFound)
            found = self._settle(key, content, [part.etag for part in parts], size_bytes) if in_doubt else None
            if found is not None:
                log.info("%s was put, though the store said: %s", key, error)
                return found
            if isinstance(error, Transient) and error.cause is Cause.CONFLICT:
                error.given_up = False  # the whole upload is begun anew
            raise
        return ObjectInfo(key, size_bytes, etag)

    def _settle(self, key: str, content: _Content, etags: Sequence[str], size_bytes: int) -> ObjectInfo | None:
        """The object's info if it is what the parts make: by its etag, or else byte by byte."""
        try:
            info = self.info(key)
            if f'"{info.etag}"' == multipart_etag(etags) and info.size_bytes == size_bytes:
                return info
            return stored_equal(self, key, (view for part in content.parts for view in part()))
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
    """Open the bucket and prefix that follow `s3://`. Raises BadURL, Denied, UsageError (LOCAL_WORLD_SIZE)."""
    location, options = parse_url(rest)
    num_requests = options.num_requests_max(num_local_ranks(os.environ))
    bucket = Bucket(location, options)
    with _limits_lock:
        # one limit for all stores of this process in a bucket: it is the bucket that throttles
        limit = _limits.setdefault(bucket.name, AdaptiveLimit(num_requests))
    return S3Store(bucket, Retrier(limit, bucket.retries), options.part_size_bytes)
