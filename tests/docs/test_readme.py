"""What the README shows is what happens."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


@pytest.mark.slow
def test_the_script_trains_and_its_checkpoints_are_listed(tmp_path: Path) -> None:
    (script,) = re.findall(r"```python\n(# train\.py\n.*?)```", README, re.DOTALL)
    (tmp_path / "train.py").write_text(script)
    trained = elastic_moe(tmp_path, "run", "--nproc-per-node", "2", "train.py")
    assert re.search(r"^step 100: loss 0\.\d+$", trained.stdout, re.MULTILINE), trained.stdout
    listed = elastic_moe(tmp_path, "ckpt", "ls", "checkpoints/linear")
    assert "100" in listed.stdout


def elastic_moe(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "elastic_moe", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done


def test_every_make_target_it_names_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"\$ make ([a-z-]+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


PAGES = [p.relative_to(ROOT) for p in [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("deploy/*/README.md")]]


@pytest.mark.parametrize("page", sorted(map(str, PAGES)))
def test_links_lead_somewhere(page: str) -> None:
    folder = (ROOT / page).parent
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", (ROOT / page).read_text()):
        assert (folder / target).exists(), f"{page}: {target}"


def test_every_test_the_failure_model_names_exists() -> None:
    text = (ROOT / "docs" / "failure-model.md").read_text()
    files = {path.name: path for path in sorted((ROOT / "tests").rglob("test_*.py"))}
    named = re.findall(r"`((?:tests/\S+?/)?test_\w+\.py)(?:::(\w+(?:::\w+)?))?`", text)
    assert len(named) > 20
    for path, name in named:
        file = ROOT / path if path.startswith("tests/") else files[path]
        assert file.exists(), path
        for part in name.split("::") if name else ():
            assert re.search(rf"(def|class) {part}\b", file.read_text()), f"{path}::{name}"
