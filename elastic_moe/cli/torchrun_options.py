"""torchrun's own options as `run` takes them: each works, or is refused in one line that says what to use.

torch looks at some of them late or never, and tells of others without their names.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import re
import shutil
import uuid
from pathlib import Path
from typing import NoReturn

from elastic_moe.cli.parser import PROG
from elastic_moe.errors import UserError
from elastic_moe.urls import local_path

log = logging.getLogger(__name__)

_MASTER_ADDR, _MASTER_PORT = "127.0.0.1", 29500  # as torchrun has them
_DEVICES = {"gpu": "cuda", "xpu": "xpu"}
"""What --nproc-per-node may name, and the module of torch that knows of it."""
_STREAMS = re.compile(r"[0-3]|\d+:[0-3](,\d+:[0-3])*")


def torchrun_parser() -> argparse.ArgumentParser:
    """The parser of the installed torch, whose mistakes are told in one line.

    Raises:
        UserError: a `PET_*` variable of the environment cannot be read.
    """
    from torch.distributed.run import get_args_parser

    try:
        parser = get_args_parser()
    except ValueError as error:  # of a switch: "invalid literal for int() with base 10: 'yes'"
        odd = (
            f"{name}={value}" for name, value in os.environ.items() if name.startswith("PET_") and value in str(error)
        )
        raise UserError(f"{next(odd, 'a variable PET_...')}: it is a switch, which must be 0 or 1") from None
    setattr(parser, "error", _usage_error)  # noqa: B010 (it would tell its whole usage with each mistake)
    if parser.get_default("max_restarts") == 0:  # a string if PET_MAX_RESTARTS names one
        parser.set_defaults(max_restarts=None)  # not given is something else than 0: then the policy decides
    return parser


def _usage_error(message: str) -> NoReturn:
    raise UserError(f"{message} (see {PROG} run --help)")


def check_values(given: argparse.Namespace) -> None:
    """Raises UserError for a value that torch would tell of without its option, late, or by a traceback."""
    least, colon, most = given.nnodes.partition(":")
    if not (least.isdecimal() and (most.isdecimal() or not colon) and 1 <= int(least) <= int(most or least)):
        raise UserError(f"--nnodes {given.nnodes}: it must be N or MIN:MAX, with 1 <= MIN <= MAX")
    _check_workers(given.nproc_per_node)
    for option in ("redirects", "tee"):
        value = getattr(given, option)
        if not _STREAMS.fullmatch(value):
            raise UserError(
                f"--{option} {value}: it must be 0 (none), 1 (stdout), 2 (stderr) or 3 (both), or such a number for "
                "each local rank, as in 0:3,1:2"
            )
    if given.max_restarts < 0:
        raise UserError(f"--max-restarts {given.max_restarts}: it must be 0 or more")
    if not 0 < given.monitor_interval < math.inf:
        raise UserError(f"--monitor-interval {given.monitor_interval:g}: it must be a number of seconds above 0")
    if (given.shutdown_timeout or 0) < 0:
        raise UserError(f"--shutdown-timeout {given.shutdown_timeout}: it must be a number of seconds, 0 or more")
    if given.run_path:
        raise UserError("--run-path: not supported; leave it out, the script runs in a process of its own")
    if given.log_dir is not None:
        try:
            local_path(given.log_dir)
        except ValueError as error:
            raise UserError(f"--log-dir {error}") from None
    # Every worker would look silent, or none.
    streams = [part.rpartition(":")[2] for text in (given.redirects, given.tee) for part in text.split(",")]
    if given.silence_timeout is not None and set(streams) <= {"0"}:
        raise UserError("--silence-timeout: needs the workers' output in files to watch: add --tee 3 or --redirects 3")
    if given.module and given.no_python:
        raise UserError("--no-python: not together with --module, which Python runs")
    _check_events(given)
    _take_signals(given)


def _check_events(given: argparse.Namespace) -> None:
    from torch.distributed.elastic.events.handlers import get_logging_handler

    try:
        get_logging_handler(given.event_log_handler)
    except KeyError:
        raise UserError(
            f"--event-log-handler {given.event_log_handler}: nobody has registered such a handler; torch has null and "
            "console, and --log-dir gets events.jsonl without one"
        ) from None


def _check_workers(text: str) -> None:
    if text.lstrip("-").isdecimal():
        if int(text) < 1:
            raise UserError(f"--nproc-per-node {text}: a node runs at least one worker")
        return
    import torch

    other = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if text not in ("auto", "cpu", *_DEVICES, other and other.type):
        raise UserError(f"--nproc-per-node {text}: it must be a number, or auto, cpu, gpu or xpu: a worker for each")


def check_machine(given: argparse.Namespace) -> None:
    """Refuse what this machine has no devices for: torch would tell of it by a traceback, once the agent has begun."""
    import torch

    workers = given.nproc_per_node
    if workers in _DEVICES and not getattr(torch, _DEVICES[workers]).is_available():
        raise UserError(
            f"--nproc-per-node {workers}: this torch sees no such device on this machine; give a number of workers, "
            "or cpu"
        )
    if given.numa_binding is not None and not torch.cuda.is_available():
        raise UserError(f"--numa-binding {given.numa_binding}: needs GPUs, of which this torch sees none: leave it out")


def check_script(given: argparse.Namespace) -> None:
    """Refuse a script that is not there at once, instead of by every worker of every restart."""
    if given.no_python and shutil.which(given.training_script) is None:
        raise UserError(f"--no-python {given.training_script!r}: no such program, or it may not be executed")
    if not given.module and not given.no_python and not Path(given.training_script).is_file():
        raise UserError(f"script {given.training_script!r}: no such file")


def _take_signals(given: argparse.Namespace) -> None:
    from launcher import parse_signals

    given.signals = parse_signals(getattr(given, "signals_to_handle", None))  # torch 2.12 has no such option


def choose_backend(given: argparse.Namespace) -> None:
    """Choose where nodes meet if the user left it open: one node needs no store, several meet at an embedded one, or in
    the folder or bucket that the endpoint names.
    """
    from launcher import BACKENDS, OUTLIVING, looks_like_bucket, unknown_backend

    if given.standalone:  # torchrun assigns them too
        given.rdzv_backend, given.rdzv_endpoint, given.rdzv_id = "memory", "", "none"
    alone = given.standalone or given.nnodes in ("1", "1:1")
    if given.rdzv_backend == "static" and not given.rdzv_endpoint and not alone:
        given.rdzv_endpoint = _master(given)
    if given.rdzv_backend in ("static", "c10d"):
        given.rdzv_backend = "memory" if alone and not given.rdzv_endpoint else "embedded"
        if looks_like_bucket(given.rdzv_endpoint):
            given.rdzv_backend = "bucket"
    if given.rdzv_backend not in BACKENDS:
        raise UserError(f"--rdzv-backend {given.rdzv_backend}: {unknown_backend(given.rdzv_backend)}")
    if given.rdzv_backend == "embedded" and not given.rdzv_endpoint:
        raise UserError("--rdzv-endpoint: several nodes need HOST:PORT of the first one to meet at")
    if given.rdzv_backend == "embedded" and given.rdzv_endpoint.strip().endswith(":0") and not alone:
        raise UserError(
            f"--rdzv-endpoint {given.rdzv_endpoint}: port 0 is any free one, which other nodes could not know; give one"
        )
    if given.rdzv_backend == "etcd3" and not given.rdzv_endpoint:
        raise UserError("--rdzv-endpoint: etcd3 needs HOST:PORT of the etcd, or several, separated by commas")
    if given.rdzv_backend == "bucket" and not given.rdzv_endpoint:
        raise UserError("--rdzv-endpoint: bucket needs a folder that all nodes share, or a URL (s3://bucket/meet)")
    if given.rdzv_id in (None, "none"):
        if given.rdzv_backend in OUTLIVING:  # such a store outlives jobs: two that share a name would be one
            raise UserError(
                "--rdzv-id: jobs that share an etcd or a bucket need names of their own; the same on all nodes of one"
            )
        given.rdzv_id = uuid.uuid4().hex[:8] if given.rdzv_backend == "memory" else "default"
    if "/" in given.rdzv_id:  # it names a folder of --log-dir, and keys in the store
        raise UserError(f"--rdzv-id {given.rdzv_id!r}: may not hold a '/'")


def _master(given: argparse.Namespace) -> str:
    """Where nodes meet whose commands say it by --master-addr and --master-port; "" where they do not."""
    if given.master_addr == _MASTER_ADDR and given.master_port is None:
        return ""
    if given.node_rank:
        log.info("--node-rank %d is not used: nodes get their ranks as they come, and keep them", given.node_rank)
    return f"{given.master_addr}:{given.master_port or _MASTER_PORT}"
