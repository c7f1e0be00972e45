"""The argument parser that every verb uses: no abbreviations, and each mistake told in one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from launcher import hide_secrets

PROG = "elastic-moe"
USAGE_EXIT_CODE = 2
_FILES = ("FILE", "FOLDER", "DIR", "PATH", "JOB.toml", "LOG_DIR", "URL")
_FILE_DESTS = ("log_dir", "training_script", "training_script_args")

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction["Parser"]


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose sub-parsers are of its own kind (argparse makes them by `type(self)`)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **kwargs)

    def _print_message(self, message: str, file: Any = None) -> None:
        """Write, and on stdout fail as any command does that cannot: argparse would go on as if it had."""
        if message and file is sys.stdout:
            file.write(message)
        else:
            super()._print_message(message, file)

    def error(self, message: str) -> NoReturn:
        """Exit with one line instead of argparse's usage block."""
        self.exit(USAGE_EXIT_CODE, f"{PROG}: error: {hide_secrets(message)} (see {self.prog} --help)\n")


class PrintCompletion(argparse.Action):
    """Writes a shell's completion script to stdout and exits."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: Any = None) -> None:
        import shtab  # needed by this option alone

        from elastic_moe.cli.run import run_parser  # whose options are those of torch, which is imported for them

        if values not in shtab.SUPPORTED_SHELLS:
            parser.error(f"the installed shtab knows no {values}: a newer one does (1.13, say)")
        (verbs,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
        verbs.choices["run"] = run_parser()
        _complete_files(parser, shtab.FILE)
        print(shtab.complete(parser, values))
        parser.exit()


def _complete_files(parser: argparse.ArgumentParser, by: Any) -> None:
    """Have what is a file or a folder completed as one: arguments that say so by their name."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                _complete_files(inner, by)
        elif action.nargs != 0 and (action.metavar in _FILES or action.dest in _FILE_DESTS):
            setattr(action, "complete", by)  # noqa: B010 - where shtab looks for it


class PrintVersion(argparse.Action):
    """Writes the installed version to stdout and exits."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, **kwargs)

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: Any = None) -> None:
        import importlib.metadata  # 60 ms, needed by this option alone

        print(importlib.metadata.version(PROG))
        parser.exit()


def node_range(text: str) -> range:
    """`"4"` or `"1:16"`, both ends included, as a range of node counts; for argparse's `type`."""
    least, colon, most = text.partition(":")
    try:
        low, high = int(least), int(most if colon else least)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither N nor MIN:MAX") from None
    if not 1 <= low <= high:
        raise argparse.ArgumentTypeError(f"{text!r} is no range of node counts: 1 <= MIN <= MAX")
    return range(low, high + 1)


def positive_int(text: str) -> int:
    """A whole number above zero; for argparse's `type`."""
    return _at_least(1, text)


def positive_float(text: str) -> float:
    """A finite number above zero, such as seconds; for argparse's `type`."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number > 0")
    return value


def local(text: str) -> Path:
    """A path, and no URL, of which a `Path` would make a folder here; for argparse's `type`."""
    from elastic_moe.urls import local_path  # and with it pydantic, which most commands do without

    try:
        return Path(local_path(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def natural_int(text: str) -> int:
    """A whole number, zero included; for argparse's `type`."""
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number >= {least}")
    if value >= 1 << 63:  # as in a job file
        raise argparse.ArgumentTypeError("it is too large")
    return value


def one_line(text: str) -> str:
    """Replace every run of white space by one blank."""
    return " ".join(text.split())


def add_set(parser: argparse.ArgumentParser) -> None:
    """Add the option `--set`, whose values come as `args.sets`."""
    parser.add_argument(
        "--set",
        dest="sets",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        help="change a field of the job; may be given again",
    )
