"""A console that goes, is full or was never there: no traceback, and an exit code that says what there is to say."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest

from elastic_moe.cli import streams
from tests.template import child_environment

PLAN = "plan --experts 8 --slots-per-node 8 --nodes 1:40"
NOTHING_THERE = "ckpt ls nowhere"


GONE = "| true; exit ${PIPESTATUS[0]}"


def call(redirected: str, *arguments: str) -> tuple[int, str]:
    """The exit code and stderr of the command, its streams as a shell would redirect them."""
    command = f'"{sys.executable}" -m elastic_moe "$@" {redirected}'
    environment = child_environment()
    done = subprocess.run(["bash", "-c", command, "bash", *arguments], env=environment, capture_output=True, timeout=60)
    return done.returncode, done.stderr.decode()


def test_a_command_does_to_its_end_what_nobody_reads_of(tmp_path: Path) -> None:
    """Its exit code is that of all it was to do, not of what was read."""
    step = tmp_path / "run" / "step-000000001"
    step.mkdir(parents=True)
    (step / ".metadata").write_bytes(b"no metadata")
    assert call(f"2>&1 {GONE}", "ckpt", "verify", str(tmp_path / "run")) == (1, "")


@pytest.mark.parametrize(
    ("redirected", "command", "code", "told"),
    [
        (GONE, PLAN, 0, ""),
        (f"2>&1 {GONE}", PLAN, 0, ""),
        (GONE, "--help", 0, ""),
        (GONE, "--version", 0, ""),
        (f"2>&1 {GONE}", NOTHING_THERE, 2, ""),
        ("> /dev/full", PLAN, 1, "elastic-moe: error: cannot write: No space left on device\n"),
        ("> /dev/full 2>&1", PLAN, 1, ""),
        ("> /dev/full", "--help", 1, "elastic-moe: error: cannot write: No space left on device\n"),
        (">&-", PLAN, 0, ""),
        (">&- 2>&- <&-", PLAN, 0, ""),
        (">&- 2>&- <&-", NOTHING_THERE, 2, ""),
        (f"2>&1 {GONE}", "status --rdzv-endpoint 127.0.0.1:9 --rdzv-conf connect_timeout=0.1", 2, ""),
    ],
)
def test_a_command_ends_quietly(redirected: str, command: str, code: int, told: str) -> None:
    assert call(redirected, *command.split()) == (code, told)


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # the latter in the locale C
def test_names_that_the_encoding_lacks_are_written_all_the_same(errors: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run `rün`, and one whose name is no text, where the locale is not UTF-8."""
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="ascii", errors=errors, write_through=True))
    streams.take_any_text()
    print("r\xfcn \udcff")
    assert written.getvalue() == b"r\\xfcn \\udcff\n"
