"""Variables that a script sets before it imports torch count in a worker that is forked from what has imported it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.workers import boot, early_variables
from launcher.workers.warm import COLD, WarmStart
from tests.cluster import read_lines
from tests.template import template

SOURCES = {
    "os.environ['OMP_NUM_THREADS'] = '3'\nimport torch": ["OMP_NUM_THREADS"],
    "from os import environ\nenviron['TORCH_LOGS'] = x\nfrom torch import nn": ["TORCH_LOGS"],
    "os.environ.setdefault('MKL_NUM_THREADS', '3')\nimport torch.nn": ["MKL_NUM_THREADS"],
    "os.environ.update({'KMP_BLOCKTIME': '0'}, ATEN_CPU_CAPABILITY='default')": [
        "ATEN_CPU_CAPABILITY",
        "KMP_BLOCKTIME",
    ],
    "os.environ |= {'TORCHDYNAMO_DISABLE': '1'}": ["TORCHDYNAMO_DISABLE"],
    "os.putenv('GOMP_SPINCOUNT', '0')": ["GOMP_SPINCOUNT"],
    "os.environb[b'TORCH_CPP_LOG_LEVEL'] = b'INFO'": ["TORCH_CPP_LOG_LEVEL"],
    "os.environ.pop('TORCH_GIVEN', None)\ndel os.environ['OMP_GIVEN']": ["OMP_GIVEN", "TORCH_GIVEN"],
    "def main():\n    os.environ['PYTORCH_CUDA_ALLOC_CONF'] = 'x'\n    import torch": ["PYTORCH_CUDA_ALLOC_CONF"],
    "if True:\n    os.environ['GLOO_SOCKET_IFNAME'] = 'lo'": ["GLOO_SOCKET_IFNAME"],
    "import settings\nimport torch": ["OPENBLAS_NUM_THREADS"],
    "from lib import more\nimport torch": ["NUMEXPR_MAX_THREADS"],
    "os.environ['SEEN_BY_RECORDER'] = '1'": ["SEEN_BY_RECORDER"],
    # As it is already, or too late for any process, or read later, or somebody else's.
    "os.environ['OMP_GIVEN'] = '1'\nos.environ.setdefault('OMP_GIVEN', '7')": [],
    "import torch\nos.environ['OMP_NUM_THREADS'] = '3'": [],
    "import imports_torch\nos.environ['OMP_NUM_THREADS'] = '3'": [],
    "try:\n    import torch\nexcept ImportError:\n    pass\nos.environ['OMP_NUM_THREADS'] = '3'": [],
    "os.environ['NCCL_DEBUG'] = os.environ['TORCH_NCCL_BLOCKING_WAIT'] = os.environ['MINE'] = '1'": [],
    "print(os.environ['OMP_NUM_THREADS'], {}['TORCH_LOGS'])": [],
    "not Python at all, or of a later version": [],
}


@pytest.mark.parametrize("source", SOURCES)
def test_what_a_text_sets_before_torch(source: str, tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "__init__.py").touch()
    (tmp_path / "lib" / "more.py").write_text("import os\nos.environ['NUMEXPR_MAX_THREADS'] = '1'\n")
    (tmp_path / "settings.py").write_text("import os, script\nos.environ['OPENBLAS_NUM_THREADS'] = '1'\n")
    (tmp_path / "imports_torch.py").write_text("import torch\n")
    script = tmp_path / "script.py"
    script.write_text(source)
    given = {"OMP_GIVEN": "1", "TORCH_GIVEN": "1"}
    assert early_variables.set_in_source(script, given, {"SEEN_BY_RECORDER"}) == SOURCES[source]


def test_a_text_that_cannot_be_read_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_bytes(b"\0\xff" + b"(" * 100_000)
    assert early_variables.set_in_source(tmp_path / "script.py", {}, set()) == []
    assert early_variables.set_in_source(tmp_path / "none.py", {}, set()) == []


def test_only_what_is_asked_for_by_name_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GONE_THROUGH", "1")
    with early_variables.Recorder() as recorder:
        assert os.getenv("ASKED_FOR") is None
        assert "LOOKED_FOR" not in os.environ
        assert dict(os.environ.items())["GONE_THROUGH"] == "1"
    assert recorder.read == {"ASKED_FOR", "LOOKED_FOR"}
    os.environ.get("AFTERWARDS")
    assert "AFTERWARDS" not in recorder.read


def test_what_c_sees_is_looked_at() -> None:
    os.putenv("ONLY_FOR_C", "ä=1")
    try:
        assert early_variables.current()["ONLY_FOR_C"] == "ä=1"
    finally:
        os.unsetenv("ONLY_FOR_C")


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[WarmStart, str, list[str]]]:
    told: list[str] = []
    started = WarmStart(tmp_path_factory.mktemp("zygote"), lambda event, /, **fields: told.append(fields["reason"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        try:
            yield started, started.socket_path(), told
        finally:
            started.close()


BEGINS = "import os, sys\nprint('prelude', flush=True)\nset = os.environ.__setitem__\n"
ENDS = (
    "\nimport torch\nis_fork = type(sys.meta_path[0]).__name__ == 'Stash'\n"
    "print(torch.get_num_threads(), torch._C._get_cpu_capability(), is_fork, os.environ.get('SET'))\n"
)
RUNS = {
    "seen in its text": ("os.environ['OMP_NUM_THREADS'] = '2'", "prelude\n2 {cpu} False None\n"),
    "found when it has happened": ("set('OMP_' + 'NUM_THREADS', '2')", "prelude\nprelude\n2 {cpu} False None\n"),
    "found in C's environment": ("os.putenv('OMP_' + 'NUM_THREADS', '2')", "prelude\nprelude\n2 {cpu} False None\n"),
    "taken away": (
        "getattr(os, 'environ').pop('OMP_' + 'NUM_THREADS')",
        "prelude\nprelude\n{cores} {cpu} False None\n",
    ),
    "for a library": ("set('ATEN_CPU_' + 'CAPABILITY', 'default')", "prelude\nprelude\n1 DEFAULT False None\n"),
    "nothing of that kind": ("set('SET', 'yes'); set('NCCL_DEBUG', 'INFO')", "prelude\n1 {cpu} True yes\n"),
    "as it was": ("set('OMP_NUM_THREADS', '1')", "prelude\n1 {cpu} True None\n"),
    "too late": ("import torch\nset('OMP_NUM_THREADS', '3')\nimport numpy", "prelude\n1 {cpu} True None\n"),
    "in a fork of its own": (
        "if os.fork():\n    os._exit(os.waitstatus_to_exitcode(os.wait()[1]))\nset('OMP_' + 'NUM_THREADS', '3')",
        "prelude\n1 {cpu} True None\n",
    ),
}


@pytest.mark.parametrize("case", RUNS)
def test_the_first_run_is_right(case: str, warm: tuple[WarmStart, str, list[str]], tmp_path: Path) -> None:
    import torch

    source, expected = RUNS[case]
    (tmp_path / "script.py").write_text(BEGINS + source + ENDS)
    command = [sys.executable, "-I", "-S", boot.__file__, str(os.getpid()), warm[1], sys.executable, "-u", "script.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected.format(cores=len(os.sched_getaffinity(0)), cpu=torch._C._get_cpu_capability())
    if "True" in expected:
        assert done.stderr == ""
    else:
        assert "cold: the script sets " in done.stderr


def test_all_later_starts_are_cold(tmp_path: Path) -> None:
    """Real workers: the first is started again, the second cold at once; the agent says so once."""
    (tmp_path / "script.py").write_text(
        BEGINS + "set('KMP_' + 'BLOCKTIME', '0')" + ENDS + "print('again', os.environ['TORCHELASTIC_RESTART_COUNT'])\n"
        "sys.exit(os.environ['TORCHELASTIC_RESTART_COUNT'] == '0')\n"
    )
    done = template().run("elastic-moe", "run", "--log-dir", "logs", "script.py", folder=tmp_path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith(("prelude", "again"))]
    assert lines == ["prelude", "prelude", "again 0", "prelude", "again 1"]
    events = read_lines(tmp_path / "logs" / "events.jsonl")
    (off,) = [event for event in events if event["event"] == "warm_start_off"]
    assert off["reason"] == "the script sets KMP_BLOCKTIME before it imports torch"
    assert [event["warm"] for event in events if event["event"] == "workers_started"] == [True, False]


def test_what_changes_on_disk_is_not_run_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed module that the zygote has imported, here from a folder of installed packages."""
    installed = tmp_path / "installed"
    (installed / "some-1.dist-info").mkdir(parents=True)
    module = installed / "sitecustomize_more.py"
    module.write_text("VALUE = 1\n")
    (installed / "sitecustomize.py").write_text("import sitecustomize_more\n")
    (tmp_path / "script.py").write_text("import sitecustomize_more, sys\nprint(sitecustomize_more.VALUE)\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(installed), *sys.path]))
    told: list[str] = []
    warm = WarmStart(tmp_path, lambda event, /, **_: told.append(event))

    def run() -> tuple[str, str]:
        zygote = warm.socket_path()
        command = [
            sys.executable,
            "-I",
            "-S",
            boot.__file__,
            str(os.getpid()),
            zygote,
            sys.executable,
            "-u",
            "script.py",
        ]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
        return done.stdout, done.stderr

    try:
        assert run() == ("1\n", "")
        module.write_text("VALUE = 22\n")
        assert run() == (
            "22\n",
            f"started cold: sitecustomize_more ({module}) has changed since it was imported ahead\n",
        )
        assert run() == ("22\n", "")
        assert told == ["warm_start_renewed"]
    finally:
        warm.close()


def test_a_long_folder_for_temporary_files_costs_nothing(tmp_path: Path) -> None:
    """The address of a Unix socket holds 107 bytes."""
    long = tmp_path / ("x" * 120) / ("y" * 120)
    long.mkdir(parents=True)
    (tmp_path / "script.py").write_text("import sys\nprint(type(sys.meta_path[0]).__name__)\n")
    command = [str(Path(sys.executable).parent / "elastic-moe"), "run", str(tmp_path / "script.py")]
    env = {**os.environ, "TMPDIR": str(long)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "Stash\n"), done.stderr
    assert "cold" not in done.stderr
    assert COLD not in os.listdir(long)
