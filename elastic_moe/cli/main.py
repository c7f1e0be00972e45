"""The command line's composition root: registers the verbs and turns errors into exit codes.

Exit codes: 0 done, 1 failed, 2 the user's mistake (one line on stderr), 130 interrupted. A verb's own further codes
are in its help.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from elastic_moe.cli import here, streams
from elastic_moe.cli.parser import PROG, USAGE_EXIT_CODE, Parser, PrintCompletion, PrintVersion, one_line
from launcher import hide_secrets

_VERBS = ("run", "train", "generate", "demo", "plan", "ckpt", "status", "drain", "report", "etcd")
_INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it


def build_parser(verb: str = "") -> Parser:
    """Build the whole parser, or that of a single `verb`, which need not wait for what others import.

    This imports no torch: only the handlers of verbs that train do.
    """
    parser = Parser(
        prog=PROG,
        description="Launch PyTorch jobs on machines that come and go, keep them training,\n"
        "and keep their state safe in object storage.",
    )
    parser.add_argument("--version", action=PrintVersion, help="show program's version number and exit")
    parser.add_argument(
        "--print-completion",
        action=PrintCompletion,
        choices=("bash", "zsh", "fish", "tcsh"),
        help="write the completion script for a shell and exit",
    )
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", dest="verb", required=True)
    for name in (verb,) if verb in _VERBS else _VERBS:
        importlib.import_module(f"elastic_moe.cli.{name}").register(verbs)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    `argv` defaults to the process's own arguments, and only then a verb may end the process itself.
    """
    streams.open_closed()
    if argv is None:
        streams.take_any_text()
        here.leave()
    given = sys.argv[1:] if argv is None else argv
    parsed: list[argparse.Namespace] = []

    def parse() -> int:
        try:
            parsed.append(build_parser(given[0] if given else "").parse_args(argv))
        except SystemExit:
            sys.stdout.flush()  # the help, say
            raise
        return 0

    code = _call(parse)
    if not parsed:
        return code
    (args,) = parsed
    if argv is None and hasattr(args, "prepare"):
        args.prepare(args)  # outside of all that catches errors: it may return in another process
    if argv is None and not getattr(args, "ends_with_reader", False):
        streams.outlive_reader()
    ends_at_once = argv is None and getattr(args, "ends_at_once", False)
    try:
        code = _call(lambda: int(args.handler(args)))
    except Exception:
        if not ends_at_once:
            raise
        sys.excepthook(*sys.exc_info())
        code = 1
    if ends_at_once:
        _end_at_once(code)
    return code


def _call(act: Callable[[], int]) -> int:
    """Call `act` and return its exit code; an error that carries one is told in one line."""
    try:
        code = act()
        sys.stdout.flush()
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        streams.drop_rest()  # the reader (`| head`) has seen enough
        return 0
    except Exception as error:
        if isinstance(error, OSError) and error.errno in streams.FULL and error.filename is None:
            streams.drop_rest()
            _complain(f"cannot write: {error.strerror}")
            return 1
        if isinstance(error, OSError) and (why := here.to_blame(error)):
            streams.flush()
            _complain(why)
            return USAGE_EXIT_CODE
        exit_code = getattr(error, "exit_code", None)
        if not isinstance(exit_code, int):
            raise
        streams.flush()
        _complain(one_line(str(error)) + (here.hint() if exit_code == USAGE_EXIT_CODE else ""))
        return exit_code
    return code


def _complain(what: str) -> None:
    try:
        print(f"{PROG}: error: {hide_secrets(what)}", file=sys.stderr, flush=True)
    except OSError:
        streams.drop_rest(2)


def _end_at_once(code: int) -> NoReturn:
    """Exit without taking the interpreter apart: with torch that costs a second, for which all other nodes wait."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)
