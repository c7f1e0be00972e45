"""The S3 options that verbs which look at stores share, and sizes in words."""

from __future__ import annotations

import argparse

from elastic_moe.errors import UserError
from storage import with_options


def with_s3_options(args: argparse.Namespace, *urls: str) -> list[str]:
    """Add --endpoint-url and --profile to the URLs of `s3://`. Raises UserError if there is none to add them to."""
    given = {"endpoint_url": args.endpoint_url, "profile": args.profile}
    options = {name: value for name, value in given.items() if value is not None}
    if options and not any(url.startswith("s3://") for url in urls):
        name = next(iter(options)).replace("_", "-")
        raise UserError(f"--{name} is for s3:// URLs; the URL is {' and '.join(map(repr, urls))}")
    return [with_options(url, options) if url.startswith("s3://") else url for url in urls]


def size_text(size_bytes: int) -> str:
    """A size in words, such as `3.2 MiB`. Pure."""
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
