"""The CPU's form of the checks for GPUs, and the table that they make. README's script is in tests/docs already."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu import __main__ as runner
from tests.gpu.checks import CHECKS, LIMITS_S, ROOT


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in CHECKS if "README" not in name])
def test_on_the_cpu(name: str, tmp_path: Path) -> None:
    assert CHECKS[name](torch.device("cpu"), tmp_path)


def test_a_check_that_fails_is_told_and_fails_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A check of a name that its own process does not know."""
    monkeypatch.setitem(CHECKS, "no such check", lambda device, folder: "")
    monkeypatch.setitem(LIMITS_S, "no such check", 60.0)
    monkeypatch.setattr(runner, "TIME_S_MAX", 60.0)
    assert runner.main(["no such check"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("accelerator")
    assert "FAILED" in lines[2] and "KeyError" in lines[2]


def test_what_is_wrong_is_in_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def wrong(device: torch.device, folder: Path) -> str:
        raise AssertionError("staging goes through pageable memory\nand more")

    CHECKS["wrong"] = wrong
    try:
        assert runner.run_one("wrong", "cpu") == 1
    finally:
        del CHECKS["wrong"]
    told = capsys.readouterr().out.splitlines()[-1]
    assert '"figure": "AssertionError: staging goes through pageable memory"' in told


def test_no_time_is_left_for_ever(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(runner, "TIME_S_MAX", 0.0)
    assert runner.main(["pinned"]) == 1
    assert "no time left" in capsys.readouterr().out
    assert runner.main(["nothing of that name"]) == 2
    assert sum(LIMITS_S.values()) > runner.TIME_S_MAX  # the sum of limits is not what bounds it


def test_a_package_that_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runner.missing(["json", "no_such_package", "torch"]) == ["no_such_package"]
    monkeypatch.setattr(runner, "missing", lambda: ["isal", "shtab"])
    assert runner.main([]) == 1
    assert capsys.readouterr().out == "missing: pip install isal shtab\n"


def test_nothing_is_imported_before_it_is_known_to_be_there() -> None:
    code = "import sys, tests.gpu.__main__; print({'torch', 'numpy', 'pydantic', 'storage'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert found.stdout.strip() == "set()", found.stderr
