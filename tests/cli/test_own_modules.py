"""What lies beside a user's script is the script's: our processes import none of it, whatever its name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.workers import program
from tests.cluster import read_lines

COMMAND = str(Path(sys.executable).parent / "elastic-moe")
LOUD = "import os, sys\nprint('THEIRS', __name__, os.getpid(), flush=True)\n"


def packages(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(LOUD)


def call(folder: Path, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        command, cwd=folder, env={**clean, **env}, capture_output=True, text=True, timeout=120, check=False
    )


def run(folder: Path, script: str, **env: str) -> subprocess.CompletedProcess[str]:
    return call(folder, COMMAND, "run", "--log-dir", str(folder / "logs"), script, **env)


def events(folder: Path, name: str) -> list[dict[str, str]]:
    return [event for event in read_lines(folder / "logs" / "events.jsonl") if event["event"] == name]


@pytest.mark.parametrize(
    "command", [(COMMAND,), (sys.executable, "-m", "elastic_moe"), ("env", "PYTHONPATH=.", COMMAND)]
)
def test_a_command_imports_nothing_of_the_current_folder(command: tuple[str, ...], tmp_path: Path) -> None:
    packages(tmp_path, "launcher", "storage", "pydantic", "numpy")
    (tmp_path / "random.py").write_text("raise SystemExit('not ours')\n")
    done = call(tmp_path, *command, "--help")  # of all verbs, and so of all that these import
    assert (done.returncode, done.stderr) == (0, "")
    assert "THEIRS" not in done.stdout


@pytest.mark.parametrize("how", ["beside", "PYTHONPATH"])
def test_a_scripts_own_modules_are_its_own_and_nobody_elses(how: str, tmp_path: Path) -> None:
    """Of our packages, the standard library, torch's: one line each, from the process of the script."""
    folder = tmp_path / "here" if how == "beside" else tmp_path / "there"
    names = ["launcher", "storage", "sympy", "json", "queue", "yaml_of_mine"]
    if how == "beside":  # from PYTHONPATH, it is what the command `elastic-moe` itself imports
        names.append("elastic_moe")
    packages(folder, *names)
    (tmp_path / "here").mkdir(exist_ok=True)
    listed = ", ".join(f"'{name}'" for name in names)
    (tmp_path / "here" / "train.py").write_text(
        f"import os\nfor n in ({listed}):\n    __import__(n)\nprint('SCRIPT', os.getpid(), flush=True)\n"
    )
    env = {} if how == "beside" else {"PYTHONPATH": str(folder)}
    done = run(tmp_path / "here", "train.py", **env)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    pid = next(line[1] for line in lines if line[0] == "SCRIPT")
    assert [line[1:] for line in lines if line[0] == "THEIRS"] == [[name, pid] for name in names]
    assert "hides the module" in events(tmp_path / "here", "warm_start_off")[0]["reason"]


def test_a_script_without_such_names_starts_warm(tmp_path: Path) -> None:
    packages(tmp_path, "models")
    (tmp_path / "storage").mkdir()  # a folder of data hides no package
    (tmp_path / "train.py").write_text(
        "import sys, models, storage\nprint(type(sys.meta_path[0]).__name__, storage.open_store.__name__)\n"
    )
    done = run(tmp_path, "train.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "Stash open_store"
    assert not events(tmp_path, "warm_start_off")


def test_a_script_may_look_elsewhere_as_it_runs(tmp_path: Path) -> None:
    packages(tmp_path / "libraries", "launcher", "sympy")
    (tmp_path / "libraries" / "launcher" / "kv.py").write_text("print('THEIRS launcher.kv')\n")
    (tmp_path / "train.py").write_text(
        "import sys\nsys.path.insert(0, 'libraries')\nimport launcher.kv, sympy\n"
        "print(type(sys.meta_path[0]).__name__)\n"
    )
    done = run(tmp_path, "train.py")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith(("THEIRS", "Stash"))]
    assert [line.split()[:2] for line in lines] == [
        ["THEIRS", "launcher"],
        ["THEIRS", "launcher.kv"],
        ["THEIRS", "sympy"],
        ["Stash"],
    ]


@pytest.mark.parametrize(
    ("wants", "message"),
    [
        (
            "from storage import Checkpointer",
            "ImportError: cannot import name 'Checkpointer' from 'storage' ({theirs})",
        ),
        ("import storage.checkpointer", "ModuleNotFoundError: No module named 'storage.checkpointer'"),
        ("import storage\nstorage.open_store('x')", "AttributeError: module 'storage' has no attribute 'open_store'"),
        ("import elastic_moe.worker", "ImportError: elastic_moe needs its own package 'storage' ({ours})"),
        ("import storage\nimport elastic_moe", "ImportError: elastic_moe needs its own package 'storage' ({ours})"),
    ],
)
def test_a_script_that_wants_both_is_told_which_hides_which(wants: str, message: str, tmp_path: Path) -> None:
    packages(tmp_path, "storage")
    (tmp_path / "train.py").write_text(wants)
    if wants.startswith("from"):
        done = run(tmp_path, "train.py")
        assert done.returncode == 70
    else:  # what a cold worker runs, without an agent around it
        done = call(tmp_path, sys.executable, "-u", program.__file__, "no-stacks", "train.py")
        assert done.returncode == 1
    theirs, ours = tmp_path / "storage" / "__init__.py", Path(__file__).parents[2] / "storage"
    assert message.format(theirs=theirs, ours=ours) in done.stderr
    assert str(ours) in done.stderr
    assert str(theirs.parent) in done.stderr
    assert "ename" in done.stderr
    assert "`from yourpackage import storage`" in done.stderr


def test_plain_python_is_told_too(tmp_path: Path) -> None:
    packages(tmp_path / "libraries", "launcher")
    (tmp_path / "train.py").write_text("import elastic_moe\n")
    done = call(tmp_path, sys.executable, "train.py", PYTHONPATH=str(tmp_path / "libraries"))
    assert done.returncode == 1
    assert f"{tmp_path / 'libraries'} comes first in PYTHONPATH" in done.stderr
