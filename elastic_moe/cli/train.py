"""`elastic-moe train`: one rank of a training job, under `elastic-moe run`, torchrun, or alone."""

from __future__ import annotations

import argparse
import json
import logging
import os
import textwrap
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from elastic_moe.cli.console import log_to_console
from elastic_moe.cli.dry_run import add_dry_run, dry_run, refuse_without
from elastic_moe.cli.parser import USAGE_EXIT_CODE, add_set, one_line
from elastic_moe.cli.s3_options import refuse_memory
from elastic_moe.errors import NotFinite
from launcher import Environment, hide_secrets

if TYPE_CHECKING:
    from elastic_moe.cli.parser import Subparsers

EXAMPLE = """\
[model]
num_experts = 8
top_k = 2

[data]
url = "stdlib"            # Python's own sources; or "corpus/*.jsonl", ...
validation = 0.01

[train]
steps = 300
validate_every = 50

[checkpoint]
url = "checkpoints/moe"   # or "s3://bucket/moe"
every = "1min"
"""

_EPILOG = f"""\
Fields are laid over each other: defaults, JOB.toml, the environment
({Environment.prefix}_SECTION__FIELD), --set. An empty JOB.toml trains the defaults.

A JOB.toml that runs as it is:

{textwrap.indent(EXAMPLE, "  ")}

On several processes:
  elastic-moe run ... --mesh JOB.toml -m elastic_moe train JOB.toml

--dry-run prints one line for each number of nodes: the mesh that it would train
on, and what one rank's memory holds when it holds the most; where nothing fits,
of the mesh that takes the least. Its exit codes: 0 the job fits on some number
of nodes, 1 on none, 2 wrong usage.
"""


def register(verbs: Subparsers) -> None:
    """Add the verb `train`."""
    parser = verbs.add_parser(
        "train",
        help="train a job; usually under `run`",
        description="Train a Mixture-of-Experts model. Continues from the newest good checkpoint.",
        epilog=_EPILOG,
    )
    parser.add_argument("job", metavar="JOB.toml", help="the job's sections: model, data, optim, train, ...")
    add_set(parser)
    add_dry_run(parser)
    parser.set_defaults(handler=handle, ends_at_once=True)


def handle(args: argparse.Namespace) -> int:
    """Train to the end, or to a stop that the launcher asked for."""
    if args.dry_run:
        return dry_run(args)
    refuse_without(args)
    log_to_console()
    try:
        return _train(args)
    except Exception as error:
        exit_code = getattr(error, "exit_code", None)
        is_clear = exit_code in (USAGE_EXIT_CODE, NotFinite.exit_code)
        message = one_line(str(error)) if is_clear else f"{type(error).__name__}: {error}"
        told = _tell_agent(message, message if is_clear else traceback.format_exc())
        if exit_code is not None and is_clear and told and os.environ.get("RANK", "0") != "0":
            return int(exit_code)  # all ranks see the same job and the same numbers, and say the same: rank 0 prints it
        raise


def _tell_agent(message: str, callstack: str) -> bool:
    """Write why this worker ends to where the agent looks for it. False if there is no agent.

    The format is that of torch's `ErrorHandler.record_exception` (torch/distributed/elastic/multiprocessing/errors),
    which cannot be imported for it: a mistake in the job is told without waiting for torch.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return False
    extra = {"py_callstack": callstack, "timestamp": str(int(time.time()))}
    told = json.dumps({"message": {"message": message, "extraInfo": extra}})
    try:
        Path(path).write_text(hide_secrets(told))
    except OSError as problem:
        logging.getLogger(__name__).warning("the agent is not told of the error: %s", problem)
        return False
    return True


def _train(args: argparse.Namespace) -> int:
    from elastic_moe.config import load

    job = load(args.job, sets=args.sets, environ=os.environ)
    if job.checkpoint.url is not None:
        refuse_memory(job.checkpoint.url, "checkpoint.url = ")
    from elastic_moe.trainer.run import train  # imports torch: a mistake in the job is told before that

    train(job)
    return 0
