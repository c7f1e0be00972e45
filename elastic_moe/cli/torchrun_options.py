"""torchrun's own options as `run` takes them: each works, or is refused in one line that says what to use.

torch looks at some of them late or never, and tells of others without their names.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import math
import os
import re
import shutil
import stat
import sys
import uuid
from collections.abc import Mapping
from importlib import metadata
from typing import NoReturn

from elastic_moe.cli.parser import PROG
from elastic_moe.cli.processors import num_usable
from elastic_moe.cli.s3_options import refuse_memory
from elastic_moe.errors import UserError
from elastic_moe.urls import local_path
from launcher import Environment, path_of_scripts, whole_number

log = logging.getLogger(__name__)

_MASTER_ADDR, _MASTER_PORT = "127.0.0.1", 29500  # as torchrun has them
_DEVICES = {"gpu": "cuda", "xpu": "xpu"}
"""What --nproc-per-node may name, and the module of torch that knows of it."""
_NODES = re.compile("[0-9]{1,9}(:[0-9]{1,9})?")
_WORKERS = re.compile("-?[0-9]{1,9}")
_STREAMS = re.compile(r"[0-3]|\d+:[0-3](,\d+:[0-3])*")


def check_environment(environ: Mapping[str, str]) -> None:
    """Look at the variables that the agent and torch's parts of it read, before torch does: it would by a traceback.

    Raises:
        UserError, launcher.UsageError: one of them is not what it must be.
    """
    Environment.from_env(environ)
    whole_number(environ, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", 30)
    level = environ.get("LOGLEVEL", "INFO")
    if not isinstance(logging.getLevelName(level), int):
        raise UserError(f"LOGLEVEL is {level!r}; torch wants one of CRITICAL, ERROR, WARNING, INFO, DEBUG")
    python = environ.get("PYTHON_EXEC")
    if python is not None and shutil.which(python) is None:
        raise UserError(f"PYTHON_EXEC is {python!r}: no such program, or it may not be executed")


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
            f"{name}={value}"
            for name, value in os.environ.items()
            if name.startswith("PET_") and str(error).endswith(f": {value!r}")
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
    least, _, most = given.nnodes.partition(":")
    if not (_NODES.fullmatch(given.nnodes) and 1 <= int(least) <= int(most or least)):
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
    _check_logs(given)
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


def _check_logs(given: argparse.Namespace) -> None:
    if given.logs_specs is None:
        return
    names = sorted(metadata.entry_points(group="torchrun.logs_specs").names)
    if given.logs_specs not in names:
        there = f"there are {', '.join(names)}" if names else "there are none; leave it out"
        raise UserError(
            f"--logs-specs {given.logs_specs}: no installed package has such specs (entry points of "
            f"torchrun.logs_specs): {there}"
        )


def _check_workers(text: str) -> None:
    if _WORKERS.fullmatch(text):
        if int(text) < 1:
            raise UserError(f"--nproc-per-node {text}: a node runs at least one worker")
        return
    import torch

    other = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if text not in ("auto", "cpu", *_DEVICES, other and other.type):
        raise UserError(f"--nproc-per-node {text}: it must be a number, or auto, cpu, gpu or xpu: a worker for each")


def check_machine(given: argparse.Namespace) -> None:
    """Refuse what this machine has no devices for: torch would tell of it by a traceback, once the agent has begun.

    Workers that go by processors are as many as this process may use: torch does not look at a container's quota.
    """
    import torch

    workers = given.nproc_per_node
    if workers == "cpu" or (workers == "auto" and not torch.accelerator.is_available()):
        given.nproc_per_node = str(num_usable())
        log.info("--nproc-per-node %s: %s workers, one for each processor here", workers, given.nproc_per_node)
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
    if given.module:
        _check_module(given.training_script)
    elif not given.no_python:
        _check_file(given.training_script)
        if given.training_script.startswith("-"):  # which Python would take for an option
            given.training_script = os.path.join(os.curdir, given.training_script)


def _check_module(module: str) -> None:
    """Raises UserError for a module that no worker would find, as far as its first name tells; nothing is imported."""
    if "PYTHON_EXEC" in os.environ:
        return  # which has modules of its own
    found: object = None
    own = sys.path[:]
    sys.path[:] = [*([] if sys.flags.safe_path else [""]), *path_of_scripts()]
    try:
        found = importlib.util.find_spec(module.partition(".")[0])
    except (ImportError, ValueError):  # ".x" is none, and what sits in `sys.modules` for itself tells nothing
        found = sys.modules.get(module.partition(".")[0])
    finally:
        sys.path[:] = own
    if found is None:
        raise UserError(f"-m {module}: no such module here, in PYTHONPATH, or among what is installed")


def _check_file(script: str) -> None:
    """Raises UserError for what Python could not run: it runs files, and folders with a `__main__.py`."""
    try:
        mode = os.stat(script).st_mode
    except (OSError, ValueError) as error:  # ValueError: a zero byte
        is_absent = isinstance(error, (FileNotFoundError, NotADirectoryError))
        why = "no such file" if is_absent else getattr(error, "strerror", None) or str(error)
        raise UserError(f"script {script!r}: {why}") from None
    if stat.S_ISDIR(mode) and not os.path.isfile(os.path.join(script, "__main__.py")):
        raise UserError(f"script {script!r}: a folder without a __main__.py")
    if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
        raise UserError(f"script {script!r}: a pipe or a device; each worker reads it anew, so it must be a file")


def _take_signals(given: argparse.Namespace) -> None:
    from launcher import parse_signals

    given.signals = parse_signals(getattr(given, "signals_to_handle", None))  # torch 2.12 has no such option


def choose_backend(given: argparse.Namespace) -> None:
    """Choose where nodes meet if the user left it open: one node needs no store, several meet at an embedded one, or in
    the folder or bucket that the endpoint names.
    """
    from launcher import BACKENDS, OUTLIVING, looks_like_bucket, unknown_backend

    least = int(given.nnodes.partition(":")[0])
    if given.standalone:  # torchrun assigns them too
        several = given.nnodes if least > 1 else ""
        unused = {"nnodes": several, "rdzv-endpoint": given.rdzv_endpoint, "rdzv-id": given.rdzv_id}
        for option, value in unused.items():
            if value not in (None, "", "none"):
                log.warning("--standalone: --%s %s is not used, as such a job is this node alone", option, value)
        given.rdzv_backend, given.rdzv_endpoint, given.rdzv_id, given.nnodes = "memory", "", "none", "1"
    if least > 1 and not given.standalone and given.rdzv_backend == "memory":
        raise UserError(f"--rdzv-backend memory: such a job is one node, and --nnodes {given.nnodes} are several")
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
    if given.rdzv_backend == "bucket":
        refuse_memory(given.rdzv_endpoint, "--rdzv-endpoint ")
    if given.rdzv_id in (None, "", "none"):
        if given.rdzv_backend in OUTLIVING:  # such a store outlives jobs: two that share a name would be one
            raise UserError(
                "--rdzv-id: jobs that share an etcd or a bucket need names of their own; the same on all nodes of one"
            )
        given.rdzv_id = uuid.uuid4().hex[:8] if given.rdzv_backend == "memory" else "default"


def _master(given: argparse.Namespace) -> str:
    """Where nodes meet whose commands say it by --master-addr and --master-port; "" where they do not."""
    if given.master_addr == _MASTER_ADDR and given.master_port is None:
        return ""
    if given.node_rank:
        log.info("--node-rank %d is not used: nodes get their ranks as they come, and keep them", given.node_rank)
    return f"{given.master_addr}:{given.master_port or _MASTER_PORT}"
