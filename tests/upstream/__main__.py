"""`TORCH_SOURCES=/path/to/pytorch python -m tests.upstream [test_planner.py ...]`: torch's tests of DCP on our storage.

Each file that touches storage runs twice, with stock's file system and fsspec classes and with ours under their names
(`instead`). What passes with stock's and not with ours is listed, with the reason that `known.toml` gives; without one,
the exit code is 1. The sources have to be of the installed torch's release: PyPI's wheels have no tests in them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from tests.upstream import compare
from tests.upstream.compare import Outcome

_HERE = Path(__file__).parent
_FOLDER = Path("test", "distributed", "checkpoint")
_MARKS = ("FileSystemWriter", "FileSystemReader", "FsspecWriter", "FsspecReader", "checkpoint_id=")
_FILE_TIMEOUT_S = 1800.0
_TEST_TIMEOUT_S = 300


def find(sources: str | None, names: Sequence[str]) -> tuple[Path, list[Path]]:
    """The folder, and its files that touch storage. Raises ValueError, in one line."""
    if not sources or not (folder := Path(sources).expanduser() / _FOLDER).is_dir():
        found = f"{sources} has no {_FOLDER}" if sources else "TORCH_SOURCES is not set"
        release = torch.__version__.partition("+")[0]
        raise ValueError(
            f"{found}; give a checkout of torch's sources: git clone --depth 1 -b v{release}"
            " https://github.com/pytorch/pytorch, then make test-upstream TORCH_SOURCES=/path/to/pytorch"
        )
    files = sorted(path for path in folder.rglob("test_*.py") if any(mark in path.read_text() for mark in _MARKS))
    return folder, [path for path in files if not names or path.name in names]


def run(path: Path, storage: str) -> dict[str, Outcome]:
    """One file's tests, in processes of their own, of which none is left."""
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder, "junit.xml")
        environment = {
            **os.environ,
            "ELASTIC_MOE_UPSTREAM": storage,
            "PYTHONPATH": os.pathsep.join([str(_HERE / "site"), str(_HERE.parent.parent)]),
            "TMPDIR": folder,
            "OMP_NUM_THREADS": "1",  # tests run many processes
        }
        arguments = ["-q", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(path.parent)]
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *arguments, f"--timeout={_TEST_TIMEOUT_S}", f"--junitxml={junit}", path],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=folder,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=_FILE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            output = f"it did not end within {_FILE_TIMEOUT_S:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if junit.exists():
            return compare.outcomes(junit.read_text())
        return {"::": Outcome(compare.FAILED, output.strip().rpartition("\n")[2])}


def report(folder: Path, files: Sequence[Path], known: Mapping[str, str]) -> int:
    """Run and tell; the number of differences that are not listed."""
    unknown = 0
    for path in files:
        name = str(path.relative_to(folder))
        stock, ours = run(path, "stock"), run(path, "ours")  # one after the other: some share a path of their own
        print(f"{name}\n    stock: {compare.count(stock)}\n    ours:  {compare.count(ours)}", flush=True)
        for found in compare.differences(name, stock, ours, known):
            unknown += found.reason is None
            mark = "known" if found.reason else "NEW"
            print(f"    {mark}: {found.test}: {found.reason or found.why}", flush=True)
    return unknown


def main(argv: Sequence[str]) -> int:
    """0 without a difference that is not listed, 1 with one, 2 without sources."""
    try:
        folder, files = find(os.environ.get("TORCH_SOURCES"), argv[1:])
    except ValueError as error:
        print(f"test-upstream: {error}", file=sys.stderr)
        return 2
    unknown = report(folder, files, tomllib.loads((_HERE / "known.toml").read_text())["known"])
    print(f"{len(files)} files, torch {torch.__version__}: {unknown} differences that are not listed in known.toml")
    return 1 if unknown or not files else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
