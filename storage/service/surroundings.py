"""Whether the service opens a store as the worker would: what the environment says of credentials and proxies."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping

from storage.stores.registry import is_everywhere

_DECIDING = re.compile(
    r"(AWS|BOTO|S3|GOOGLE|GCS|AZURE|FSSPEC)_.*|(HTTPS?|NO|ALL)_PROXY|SSL_CERT_(FILE|DIR)|REQUESTS_CA_BUNDLE|HOME",
    re.IGNORECASE,
)


def digest(env: Mapping[str, str]) -> str:
    """A digest of the variables that decide by whose credentials, and by which way, a store is reached. Pure."""
    found = sorted((name, value) for name, value in env.items() if _DECIDING.fullmatch(name))
    return hashlib.blake2b(repr(found).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


def why_not(url: str, mine: str, services: str) -> str | None:
    """Why the service cannot save to `url` for a process with the digest `mine`; None if it can. Pure."""
    if not is_everywhere(url):
        return f"the store of {url} lives in this process"
    if mine != services:
        return "credentials or proxies in this process's environment are not those that the service was started with"
    return None
