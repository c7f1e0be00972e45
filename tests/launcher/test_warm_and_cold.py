"""What a script sees of its process: run by `python`, as a cold worker, and forked. All that differs is listed here."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.environment import Environment
from launcher.workers import boot
from launcher.workers.warm import COLD, WarmStart

MIRROR = Path(__file__).parent / "scripts" / "mirror.py"

OF_WORKERS = {
    "hooks": "sys.excepthook leaves the exception where the agent finds it, and then does what Python does",
    "fds": "a file for stacks, which the script's children do not get",
    "depth": "frames of ours lie below the script's first one; tracebacks leave them out",
}
"""In which any worker differs from `python SCRIPT`, and why."""

OF_FORKED = {
    "meta_path": "what the zygote has imported comes out of the first finder, when the script imports it",
    "fds": "sockets to the zygote and the agent, which the script's children do not get",
    "depth": OF_WORKERS["depth"],
    "logging": "loggers of torch exist already, enabled whatever logging.config does before torch is imported",
    "gc_frozen": "the collector need not go through what the zygote has imported",
    "atexit": "what torch has registered; it finds nothing to do where torch was not used",
}
"""In which a forked worker differs from a cold one, and why."""

FORMS = {
    "script": ["mirror.py", "--children"],
    "script elsewhere": ["../elsewhere/mirror.py"],
    "script by a link": ["link.py"],
    "module": ["-m", "package.mirror", "--children"],
    "package": ["-m", "package"],
    "zip": ["archive.zip", "x"],
    "compiled": ["compiled.pyc"],
}
ENVIRONMENTS: dict[str, dict[str, str]] = {
    "as it is": {"PYTHONHASHSEED": "7"},
    "another": {
        "PYTHONHASHSEED": "7",
        "PYTHONIOENCODING": "latin-1:replace",
        "PYTHONWARNINGS": "error::UserWarning,ignore::DeprecationWarning",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONFAULTHANDLER": "1",
        "PYTHONOPTIMIZE": "1",
        "PYTHONINTMAXSTRDIGITS": "5000",
        "PYTHONSAFEPATH": "1",
        "LC_ALL": "C",
    },
}


def make_forms(folder: Path) -> None:
    for path in ("mirror.py", "package/mirror.py", "package/__main__.py", "../elsewhere/mirror.py"):
        (folder / path).parent.mkdir(exist_ok=True)
        shutil.copy(MIRROR, folder / path)
    (folder / "package" / "__init__.py").touch()
    (folder / "link.py").symlink_to("../elsewhere/mirror.py")
    make = "import py_compile, zipfile as z; py_compile.compile('mirror.py', 'compiled.pyc'); "
    make += "z.ZipFile('archive.zip', 'w').write('mirror.py', '__main__.py')"
    subprocess.run([sys.executable, "-c", make], cwd=folder, check=True)
    (folder / "stacks").touch()


CASES = [*(("as it is", form) for form in FORMS), ("another", "script")]


@pytest.fixture(scope="module")
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A folder with the script in all forms, and a zygote's socket, in one environment."""
    folder = tmp_path_factory.mktemp("forms") / "here"
    folder.mkdir()
    make_forms(folder)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"OMP_NUM_THREADS": "1", **ENVIRONMENTS[request.param]}.items():
            patch.setenv(name, value)
        warm = WarmStart(folder, lambda *_, **__: None)
        try:
            yield folder, warm.socket_path()
        finally:
            warm.close()


@functools.cache
def seen(folder: Path, *command: str) -> dict[str, Any]:
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **Environment(stacks=folder / "stacks").to_env()},
        input=b"typed",
        capture_output=True,
        timeout=120,
        start_new_session=True,
        umask=0o037,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stderr == b""
    return dict(json.loads(done.stdout))


def differing(one: dict[str, Any], other: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    assert one.keys() == other.keys()
    return {name: (one[name], other[name]) for name in one if one[name] != other[name]}


@pytest.mark.parametrize(("place", "form"), CASES, indirect=["place"])
def test_all_that_differs_has_a_reason(place: tuple[Path, str], form: str) -> None:
    folder, zygote = place
    boots = (sys.executable, "-I", "-S", boot.__file__, str(os.getpid()))
    program = (sys.executable, "-u", *FORMS[form])
    plain = seen(folder, *program)
    cold = seen(folder, *boots, COLD, *program)
    forked = seen(folder, *boots, zygote, *program)
    unlisted = {k: v for k, v in differing(plain, cold).items() if k not in OF_WORKERS}
    assert not unlisted, "python and a cold worker"
    unlisted = {k: v for k, v in differing(cold, forked).items() if k not in OF_FORKED}
    assert not unlisted, "a cold worker and a forked one"
    assert cold["inherited"] == forked["inherited"] == plain["inherited"]


@pytest.mark.parametrize("place", ["as it is"], indirect=True)
def test_what_is_listed_does_differ(place: tuple[Path, str]) -> None:
    """A reason that is none any more goes."""
    folder, zygote = place
    boots = (sys.executable, "-I", "-S", boot.__file__, str(os.getpid()))
    program = (sys.executable, "-u", *FORMS["script"])
    plain, cold = seen(folder, *program), seen(folder, *boots, COLD, *program)
    assert differing(plain, cold).keys() == OF_WORKERS.keys()
    assert differing(cold, seen(folder, *boots, zygote, *program)).keys() == OF_FORKED.keys()
