"""`elastic-moe train`: one rank of a training job, under `elastic-moe run`, torchrun, or alone."""

from __future__ import annotations

import argparse
import logging
import os
from typing import TYPE_CHECKING

from elastic_moe import worker
from elastic_moe.cli.parser import USAGE_EXIT_CODE

if TYPE_CHECKING:
    from elastic_moe.cli.parser import Subparsers

_EPILOG = """\
Fields are laid over each other: defaults, JOB.toml, the environment
(ELASTIC_MOE__SECTION__FIELD), --set. An empty JOB.toml trains the defaults.

On several processes:
  elastic-moe run ... --mesh JOB.toml -m elastic_moe train JOB.toml
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
    parser.add_argument(
        "--set",
        dest="sets",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        help="change a field of the job; may be given again",
    )
    parser.set_defaults(handler=handle)


def handle(args: argparse.Namespace) -> int:
    """Train to the end, or to a stop that the launcher asked for."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    try:
        return _train(args)
    except Exception as error:
        if getattr(error, "exit_code", None) != USAGE_EXIT_CODE or os.environ.get("RANK", "0") == "0":
            raise
        # All ranks see the same job and make the same mistake: rank 0 tells it, the others leave a record.
        worker.event("usage_error", message=str(error))
        return USAGE_EXIT_CODE


def _train(args: argparse.Namespace) -> int:
    from elastic_moe.config import load

    job = load(args.job, sets=args.sets, environ=os.environ)
    from elastic_moe.trainer.run import train  # imports torch: a mistake in the job is told before that

    train(job)
    return 0
