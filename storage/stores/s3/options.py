"""What an `s3://` URL may say after its `?`. Credentials are not among it: URLs end up in logs."""

from __future__ import annotations

from typing import Literal
from urllib.parse import parse_qsl, urlencode, urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from storage.errors import BadURL, Denied
from storage.stores.keys import check_key
from storage.stores.s3.digests import Algorithm

_MIB = 1024 * 1024
_SECRETS = ("access_key", "secret", "token", "password", "key_id", "credential")


class S3Options(BaseModel):
    """One store's settings; None leaves it to boto3: environment, `~/.aws/config`, instance role."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    endpoint_url: str | None = None
    """Another server than AWS; else AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL or the profile's."""
    region: str | None = None
    profile: str | None = None
    anonymous: bool = False
    """Send no signature: for public buckets."""
    addressing_style: Literal["auto", "path", "virtual"] = "auto"
    """Where the bucket's name goes; auto: into the path if there is an endpoint_url, else into the host's name."""
    ca_bundle: str | None = None
    """A PEM file with the authorities to trust; else AWS_CA_BUNDLE or the profile's, else the system's."""
    storage_class: str | None = None
    sse: Literal["AES256", "aws:kms", "aws:kms:dsse"] | None = None
    """Server-side encryption of what is put."""
    sse_kms_key_id: str | None = None
    request_payer: Literal["requester"] | None = None
    """Who asks pays for requests and traffic, as such buckets want it said with every request."""
    checksum: Algorithm | None = None
    """Send a checksum of every body that is put, as Object Lock wants it: Content-MD5, or x-amz-checksum-..."""
    sign_payload: Literal["auto", "always", "never"] = "auto"
    """Sign a SHA-256 of every body that is put, so that the server refuses damage on the way. auto: without TLS."""
    part_size_mib: int = Field(default=16, ge=5, le=5 * 1024)
    """Objects larger than this go up in parts of this size."""
    num_connections: int = Field(default=32, ge=1, le=1024)
    """How many requests of this process may be under way at once; throttling lowers it for a while."""
    num_connections_per_node: int = Field(default=256, ge=1, le=65536)
    """The same for all processes of a node (LOCAL_WORLD_SIZE) together; each has an equal share of it."""
    connect_timeout_s: float = Field(default=10.0, gt=0)
    stall_timeout_s: float = Field(default=30.0, gt=0)
    """A request counts as stalled when no byte has moved for this long."""

    @field_validator("endpoint_url")
    @classmethod
    def _is_url(cls, value: str | None) -> str | None:
        if value is not None:
            parts = urlsplit(value)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
                raise ValueError("must be http://host[:port] or https://host[:port]")
            return value.rstrip("/")
        return value

    def num_requests_max(self, num_processes: int) -> int:
        """How many requests one of a node's processes may have under way: at least 1. Pure."""
        return max(1, min(self.num_connections, self.num_connections_per_node // num_processes))

    @property
    def part_size_bytes(self) -> int:
        """`part_size_mib` in bytes."""
        return self.part_size_mib * _MIB


class S3Location(BaseModel):
    """A bucket and the prefix that is the store's root: "" or ending in a slash."""

    model_config = ConfigDict(frozen=True)

    bucket: str
    prefix: str


def parse_url(rest: str) -> tuple[S3Location, S3Options]:
    """Take apart what follows `s3://`. Pure. Raises BadURL."""
    path, _, query = rest.partition("?")
    bucket, _, prefix = path.partition("/")
    if not bucket:
        raise BadURL("s3:// needs a bucket, such as s3://bucket/run")
    if "@" in bucket or ":" in bucket:
        raise BadURL(
            "an s3:// URL is s3://bucket/prefix and holds no credentials: put them into AWS_ACCESS_KEY_ID and"
            " AWS_SECRET_ACCESS_KEY, or into a profile"
        )
    prefix = prefix.strip("/")
    if prefix:
        try:
            check_key(prefix)
        except Denied as error:
            raise BadURL(f"s3://{path}: {error}") from None
    return S3Location(bucket=bucket, prefix=prefix + "/" if prefix else ""), _parse_options(query)


def format_url(location: S3Location, options: S3Options) -> str:
    """The URL of a location with its options: what `parse_url` takes apart. Pure."""
    path = f"s3://{location.bucket}/{location.prefix}".rstrip("/")
    given = options.model_dump(exclude_defaults=True)
    values = {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in given.items()}
    return f"{path}?{urlencode(values, safe=':/')}" if values else path


def _parse_options(query: str) -> S3Options:
    pairs = parse_qsl(query, keep_blank_values=True)
    fields = S3Options.model_fields
    for name, _ in pairs:
        if name in fields:
            continue
        if any(part in name.lower() for part in _SECRETS):
            raise BadURL(f"{name} does not belong into a URL: use the environment or a profile (profile=NAME)")
        raise BadURL(f"an s3:// URL has no option {name!r}; it has {', '.join(fields)}")
    try:
        return S3Options.model_validate(dict(pairs))
    except ValidationError as error:
        problem = error.errors()[0]
        name, value = str(problem["loc"][0]), str(problem["input"])
        value = "..." if "@" in value else value  # may hold a password
        message = problem["msg"].removeprefix("Value error, ")
        raise BadURL(f"the option {name}={value} of an s3:// URL is wrong: {message}") from None
