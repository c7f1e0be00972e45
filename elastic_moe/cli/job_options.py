"""The options that name a job's store, for verbs that look at a job or steer it from outside.

They are those of `run`, with the same meaning, so that a command line (or torchrun's `PET_*` variables) can be reused
as it is. Such a verb is a client only: it never hosts an embedded store, whatever the endpoint's name.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from elastic_moe.cli.s3_options import refuse_memory
from elastic_moe.errors import UserError

if TYPE_CHECKING:
    from launcher import JobClient

_BACKENDS = ("embedded", "bucket", "etcd3")
_OURS = ("", "static", "c10d")  # torchrun's own back ends, for which `run` takes the embedded one


def add_job_options(parser: argparse.ArgumentParser) -> None:
    """Add --rdzv-backend, --rdzv-endpoint, --rdzv-id and --rdzv-conf, also as torchrun spells them (--rdzv_id)."""
    group = parser.add_argument_group("where the job's nodes meet, as given to `run`")
    for name, metavar, text in (
        ("backend", "NAME", "embedded (default), bucket or etcd3"),
        ("endpoint", "HOST:PORT", "of the store; etcd3: several, separated by commas; bucket: a folder or URL"),
        ("id", "ID", 'name of the job (default: "default", where the store ends with it)'),
        ("conf", "KEY=VALUE,...", "how to reach the store, such as cacert, user, token_file"),
    ):
        default = os.environ.get(f"PET_RDZV_{name.upper()}", "")
        dest = f"rdzv_{name}"
        group.add_argument(f"--rdzv-{name}", dest=dest, metavar=metavar, default=default, help=text)
        group.add_argument(f"--rdzv_{name}", dest=dest, default=argparse.SUPPRESS, help=argparse.SUPPRESS)


@contextlib.contextmanager
def open_named_job(args: argparse.Namespace) -> Iterator[JobClient]:
    """Open the job that the options name, as a client of its store.

    Raises:
        UserError, launcher.UsageError: an option is missing or wrong, or nothing answers at the endpoint.
    """
    from launcher import (
        OUTLIVING,
        looks_like_bucket,
        open_job,
        unknown_backend,
    )  # slow to import, and every verb's help is built with this one

    backend = args.rdzv_backend
    if backend in _OURS:
        backend = "bucket" if looks_like_bucket(args.rdzv_endpoint) else "embedded"
    if backend == "memory":
        raise UserError("--rdzv-backend memory: such a store is inside its one agent; nobody else can ask it")
    if backend not in _BACKENDS:
        raise UserError(f"--rdzv-backend {backend}: {unknown_backend(backend)}")
    if not args.rdzv_endpoint:
        raise UserError("--rdzv-endpoint: needed, the same as the job's nodes were given")
    if backend == "bucket":
        refuse_memory(args.rdzv_endpoint, "--rdzv-endpoint ")
    if backend in OUTLIVING and not args.rdzv_id:
        raise UserError("--rdzv-id: needed, several jobs may share an etcd or a bucket")
    with open_job(backend, args.rdzv_endpoint, args.rdzv_id or "default", args.rdzv_conf) as job:
        yield job
