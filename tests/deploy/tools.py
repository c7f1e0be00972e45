"""What the checks of `deploy/` share: needed tools, and command lines read as the program reads them."""

from __future__ import annotations

import argparse
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import pytest

from elastic_moe.cli import run
from elastic_moe.cli.main import build_parser
from launcher.elastic.rdzv_conf import RendezvousConf

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"

REQUIRED = "ELASTIC_MOE_CHECK_DEPLOY"
"""Set by `make check-deploy`, which installs the tools: a missing one is then a failure, and elsewhere a skip."""


def need(*tools: str, package: str) -> None:
    """Go on only where all the tools are installed."""
    places = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
    if missing := [tool for tool in tools if shutil.which(tool, path=places) is None]:
        told = f"{', '.join(missing)} not installed (Debian: {package}); `make check-deploy` installs it"
        if os.environ.get(REQUIRED):
            pytest.fail(told)
        pytest.skip(told)


def parse_run(words: Sequence[str], environment: Mapping[str, str] = MappingProxyType({})) -> argparse.Namespace:
    """Read `run ...`, the words after `elastic-moe`, as it would in this environment; a mistake fails the test."""
    called = build_parser().parse_args(list(words))
    assert called.verb == "run"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        given = run._parse(called.arguments)
    conf_of(given)
    return given


def conf_of(given: argparse.Namespace) -> RendezvousConf:
    """The `--rdzv-conf` of a command line."""
    return RendezvousConf.parse_text(given.rdzv_conf)


def most_nodes(given: argparse.Namespace) -> int:
    """MAX of `--nnodes`."""
    return int(str(given.nnodes).rpartition(":")[2])


def documented_exit_codes() -> set[int]:
    """The codes in the table of docs/launcher.md."""
    page = (ROOT / "docs" / "launcher.md").read_text()
    return {int(code) for code in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)}


def fill_in(text: str, variables: Mapping[str, str]) -> str:
    """Compose's interpolation: `${NAME}`, `${NAME:-default}`, `${NAME:?what is missing}`."""

    def value(match: re.Match[str]) -> str:
        name, kind, word = match["name"], match["kind"], match["word"]
        if variables.get(name):
            return variables[name]
        assert kind == ":-", f"{name} has no value"
        return word

    return re.sub(r"\$\{(?P<name>\w+)(?:(?P<kind>:[-?])(?P<word>[^}]*))?\}", value, text)
