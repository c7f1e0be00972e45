"""The command line's composition root: registers the verbs and turns errors into exit codes.

Exit codes: 0 done, 1 failed, 2 the user's mistake (one line on stderr), 130 interrupted. A verb's own further codes
are in its help.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import logging
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from elastic_moe.cli import ckpt, demo, drain, plan, report, run, status, train
from elastic_moe.cli.parser import PROG, Parser, PrintCompletion, one_line

_INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it


def build_parser() -> Parser:
    """The whole parser. Imports no torch: only the handlers of verbs that train do."""
    parser = Parser(
        prog=PROG,
        description="Launch PyTorch jobs on machines that come and go, keep them training,\n"
        "and keep their state safe in object storage.",
    )
    parser.add_argument("--version", action="version", version=importlib.metadata.version(PROG))
    parser.add_argument(
        "--print-completion",
        action=PrintCompletion,
        choices=("bash", "zsh"),
        help="write the completion script for a shell and exit",
    )
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", dest="verb", required=True)
    for module in (run, train, demo, plan, ckpt, status, drain, report):
        module.register(verbs)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    `argv` defaults to the process's own arguments, and only then a verb may end the process itself.
    """
    args = build_parser().parse_args(argv)
    ends_at_once = argv is None and getattr(args, "ends_at_once", False)
    try:
        code = _call(args)
    except Exception:
        if not ends_at_once:
            raise
        sys.excepthook(*sys.exc_info())
        code = 1
    if ends_at_once:
        _end_at_once(code)
    return code


def _call(args: argparse.Namespace) -> int:
    """The verb's exit code, with errors that carry one told in one line."""
    try:
        code: int = args.handler(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader (`| head`) has seen enough. Python would complain once more when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        exit_code = getattr(error, "exit_code", None)
        if not isinstance(exit_code, int):
            raise
        print(f"{PROG}: error: {one_line(str(error))}", file=sys.stderr)
        return exit_code
    return code


def _end_at_once(code: int) -> NoReturn:
    """Exit without taking the interpreter apart: with torch that costs a second, for which all other nodes wait."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)
