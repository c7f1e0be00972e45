"""mypy, strict, in a project of a user's that imports all three packages, with torch left out: it takes minutes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent / "typed_project"
MISTAKES = PROJECT / "mistakes.txt"
SETTINGS = "[mypy]\nstrict = True\nwarn_unreachable = True\n[mypy-torch.*]\nfollow_imports = skip\n"


@pytest.fixture(scope="module")
def complaints(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[int]]:
    """By file, the lines that mypy has something to say of."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "mypy.ini").write_text(SETTINGS)
    names = ["train.py", "mistakes.py"]
    for name, text in zip(names, (PROJECT / "train.py", MISTAKES), strict=True):
        (folder / name).write_text(text.read_text())
    cache = request.config.cache.mkdir("typed_project")
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(cache), "--no-error-summary", *names]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 1, "there are mistakes, and nothing else: " + done.stdout + done.stderr
    found: dict[str, set[int]] = {name: set() for name in names}
    for line in done.stdout.splitlines():
        matched = re.match(r"([\w.]+):(\d+): error: ", line)
        assert matched, line
        found[matched[1]].add(int(matched[2]))
    return found


def test_a_users_script_passes(complaints: dict[str, set[int]]) -> None:
    assert complaints["train.py"] == set()


def test_what_is_wrong_in_it_is_found(complaints: dict[str, set[int]]) -> None:
    lines = MISTAKES.read_text().splitlines()
    assert complaints["mistakes.py"] == {number for number, line in enumerate(lines, 1) if line.endswith("# wrong")}
