"""To be imported by who forks: makes a client of nothing, so that those forked need not read what all clients share."""

from __future__ import annotations

from storage.stores.s3.client import S3Client
from storage.stores.s3.options import S3Location, S3Options
from storage.stores.s3.store import open_s3 as open_s3  # with all that it takes

_NOWHERE = "http://127.0.0.1:9"

S3Client(
    S3Location(bucket="nobody", prefix=""), S3Options(anonymous=True, endpoint_url=_NOWHERE, region="us-east-1")
).close()
