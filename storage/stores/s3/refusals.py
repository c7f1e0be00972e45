"""From a server's refusal to an error that says what to do. Pure."""

from __future__ import annotations

import email.utils
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from xml.etree import ElementTree

from storage.errors import AlreadyExists, Cause, Corrupt, Denied, Forbidden, NotFound, StorageError, Transient

_THROTTLED = {
    "SlowDown",
    "SlowDownRead",
    "SlowDownWrite",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
    "RequestLimitExceeded",
    "ServiceUnavailable",
    "RequestThrottled",
}
_DAMAGED = {
    "BadDigest",
    "XAmzContentSHA256Mismatch",
    "XAmzContentChecksumMismatch",
    "IncompleteBody",
    "MalformedXML",
    "InvalidPart",
}
_CONFLICT = {"ConditionalRequestConflict", "OperationAborted"}
_REDIRECT = {
    "PermanentRedirect",
    "TemporaryRedirect",
    "AuthorizationHeaderMalformed",
    "IllegalLocationConstraintException",
}
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired"}
WORN_OUT = _EXPIRED | {"InvalidAccessKeyId", "SignatureDoesNotMatch"}
"""Codes that say that other credentials may do."""
_FORBIDDEN = {"", "AccessDenied", "AllAccessDisabled"}
"""Codes of a 403 that refuses an access; others say that the credentials are wrong. A HEAD's refusal has no code."""
_BODY_MAX_CHARS = 200
_SKEW_S_MAX = 900.0


@dataclass(frozen=True)
class Refusal:
    """A server's refusal. `headers` have lower-case names."""

    status: int
    code: str = ""
    message: str = ""
    region: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """What was asked for, in the words of messages: `verb` such as "look at", `what` such as `s3://bucket/key`."""

    verb: str
    what: str
    bucket: str
    endpoint: str
    is_put: bool = False
    if_absent: bool = False


def parse_body(status: int, headers: Mapping[str, str], body: bytes) -> Refusal:
    """An error response, in whatever shape it comes: S3's XML, another's text, or nothing (HEAD)."""
    lower = {name.lower(): value for name, value in headers.items()}
    code = message = region = ""
    if body.lstrip().startswith(b"<") and b"<!" not in body:  # no DTD, so no entities that grow
        try:
            root = ElementTree.fromstring(body)
            code, message, region = (_text(root, name) for name in ("Code", "Message", "Region"))
        except ElementTree.ParseError:
            pass
    if not message:
        message = " ".join(re.sub(r"<[^>]*>", " ", body.decode("utf-8", "replace")).split())[:_BODY_MAX_CHARS]
    return Refusal(status, code, message, region or lower.get("x-amz-bucket-region", ""), lower)


def to_error(answer: Refusal, request: Request, now_s: float) -> StorageError:
    """The error of a refusal. Its text holds no credentials and no signatures."""
    status, code = answer.status, answer.code
    asked = f"{request.verb} {request.what}"
    said = f"{code or f'HTTP {status}'}{f': {answer.message}' if answer.message else ''}"
    if status == 429 or code in _THROTTLED or (status == 503 and not code):
        return Transient(f"{asked}: throttled ({said})", Cause.THROTTLED, _retry_after_s(answer))
    if code in _CONFLICT or (status == 409 and request.if_absent):
        return Transient(f"{asked}: {said}", Cause.CONFLICT)
    if code in _DAMAGED:
        return Transient(f"{asked}: damaged on the way ({said})", Cause.DAMAGED)
    if code == "RequestTimeout" or status == 408:
        return Transient(f"{asked}: {said}", Cause.STALLED)
    if code in _REDIRECT or status in (301, 302, 307, 308):
        region = f"is in region {answer.region}; add ?region={answer.region}" if answer.region else "is somewhere else"
        return Denied(f"bucket {request.bucket!r} {region} to the URL or set AWS_DEFAULT_REGION ({said})")
    if status == 407:
        return Denied(f"{asked}: the proxy wants another user and password (HTTP 407); check HTTP_PROXY")
    if status == 412:
        if request.if_absent:
            return AlreadyExists(f"{request.what} exists")
        return Corrupt(f"{request.what} changed while it was read")
    if status == 416:
        return Corrupt(f"{request.what} is shorter than it must be")
    if code == "NoSuchBucket":
        return Denied(f"there is no bucket {request.bucket!r} at {request.endpoint}")
    if code == "NoSuchUpload":
        return NotFound(f"the upload of {request.what} is gone: somebody else has ended it")
    if status == 404 and request.is_put:
        # JuiceFS's gateway, when the last other object of the folder is deleted at that moment
        return Transient(f"{asked}: {said}", Cause.CONFLICT)
    if status == 404 and request.verb.startswith("list"):
        return Denied(f"{request.endpoint} has no bucket {request.bucket!r} to {asked} ({said}); is that its address?")
    if status == 404:
        return NotFound(f"{request.what} does not exist")
    if status == 501:
        return Denied(f"{asked}: the store does not implement what was asked ({said}); check storage_class and sse")
    if status >= 500:
        return Transient(f"{asked}: {said}", Cause.SERVER_ERROR, _retry_after_s(answer))
    kind = Forbidden if status == 403 and code in _FORBIDDEN and not _is_skewed(answer, now_s) else Denied
    return kind(_refusal(answer, request, asked, said, now_s))


def _refusal(answer: Refusal, request: Request, asked: str, said: str, now_s: float) -> str:
    if answer.code == "RequestTimeTooSkewed" or (answer.status == 403 and _is_skewed(answer, now_s)):
        return f"{asked}: {_skew(answer, now_s)}; set this host's clock (NTP)"
    if answer.code == "InvalidAccessKeyId":
        return f"{asked}: {request.endpoint} does not know the access key; check AWS_ACCESS_KEY_ID or the profile"
    if answer.code == "SignatureDoesNotMatch":
        return f"{asked}: the secret key does not fit the access key; check AWS_SECRET_ACCESS_KEY or the profile"
    if answer.code in _EXPIRED:
        return f"{asked}: the session's credentials have expired or are not valid ({said}); get new ones"
    if "ObjectLock" in answer.code or "Content-MD5" in answer.message:
        return f"{asked}: refused ({said}); add checksum=md5 or checksum=crc32c to the URL"
    return f"{asked}: refused ({said})"


def _skew(answer: Refusal, now_s: float) -> str:
    skew_s = _skew_s(answer, now_s)
    if skew_s is None:
        return "this host's clock is too far from the store's"
    return f"this host's clock is {abs(skew_s):.0f} s {'ahead of' if skew_s > 0 else 'behind'} the store's"


def _skew_s(answer: Refusal, now_s: float) -> float | None:
    try:
        return now_s - email.utils.parsedate_to_datetime(answer.headers["date"]).timestamp()
    except (KeyError, ValueError, TypeError):
        return None


def _is_skewed(answer: Refusal, now_s: float) -> bool:
    """Whether the clocks differ by more than a signature may: the refusal of a HEAD does not say why."""
    skew_s = _skew_s(answer, now_s)
    return not answer.code and skew_s is not None and abs(skew_s) > _SKEW_S_MAX


def _retry_after_s(answer: Refusal) -> float | None:
    text = answer.headers.get("retry-after", "")
    return min(float(text), 60.0) if text.isdecimal() else None


def _text(root: ElementTree.Element, name: str) -> str:
    found = next((child.text for child in root if child.tag.rpartition("}")[2] == name), None)
    return (found or "").strip()
