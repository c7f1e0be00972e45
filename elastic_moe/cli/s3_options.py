"""What verbs that look at stores share: the options of S3, which URLs are refused, and sizes in words."""

from __future__ import annotations

import argparse

from elastic_moe.errors import UserError
from storage import is_of_this_process, with_options


def refuse_memory(url: str, what: str = "") -> None:
    """Raises UserError for a URL of this process's memory: `what`, that it is given for, would be there with nobody."""
    if is_of_this_process(url):
        raise UserError(
            f"{what}{url} is the memory of this command, which ends with it: give a folder or a store, such as "
            "s3://bucket/run"
        )


def with_s3_options(args: argparse.Namespace, *urls: str) -> list[str]:
    """Add --endpoint-url and --profile to the URLs of `s3://`.

    Raises UserError if there is none to add them to, or for a URL that nobody else can open.
    """
    for url in urls:
        refuse_memory(url)
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
