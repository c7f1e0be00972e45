"""What a command finds around it, whoever has made it so: a current folder that is gone, variables of any content."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from elastic_moe.cli.here import to_blame
from elastic_moe.cli.main import main
from elastic_moe.errors import UserError
from elastic_moe.trainer.world import check_meeting
from launcher import UsageError, Worker
from launcher.workers.forked import _go_to
from storage import JobIdentity
from storage import UsageError as StorageUsageError
from storage.agent import num_local_ranks
from tests import sample
from tests.template import child_environment

ROOT = Path(__file__).parents[2]


def in_a_folder_that_is_gone(folder: Path, *arguments: str, **environ: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command."""
    (folder / "gone").mkdir()
    go = f'cd "{folder}/gone" && rmdir ../gone && exec "{sys.executable}" -m elastic_moe "$@"'
    done = subprocess.run(
        ["bash", "-c", go, "bash", *arguments],
        env=child_environment(OMP_NUM_THREADS="1", **environ),
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("command", "code", "says"),
    [
        (["--version"], 0, ""),
        (["plan", "--experts", "8", "--slots-per-node", "8", "--nodes", "1"], 0, ""),
        (["ckpt", "ls", "runs"], 2, "no checkpoint at runs"),
        sample.rest(["ckpt", "import", "{folder}", "--out", "job.toml"], 2, ""),
        (["report", "logs"], 2, "logs: no such file or folder"),
        (["demo"], 2, "/proc/demo-out: No such file or directory"),
        (["train", "job.toml"], 2, "job file job.toml does not exist"),
        sample.rest(["train", "{folder}/job.toml"], 2, ""),
        sample.rest(["run", "--standalone", "--nproc-per-node", "1", "x.py"], 2, "script 'x.py': no such file"),
        (["run", "--standalone", "--nproc-per-node", "1", "--log-dir", "logs", "{folder}/x.py"], 2, "--log-dir logs: "),
    ],
)
def test_a_command_in_a_folder_that_is_gone(command: list[str], code: int, says: str, tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text("[checkpoint]\nurl = 'runs'\n[model]\nnum_experts = 2\n")
    (tmp_path / "x.py").touch()
    arguments = [word.replace("{folder}", str(tmp_path)) for word in command]
    returned, _, told = in_a_folder_that_is_gone(tmp_path, *arguments)
    assert (returned, "Traceback" in told) == (code, False), told
    assert told.count("\n") == (code != 0), told
    assert told.startswith(f"elastic-moe: error: {says}" if code else ""), told
    assert ("the current folder has been deleted: go to another one, or give whole paths" in told) == (code == 2), told


@pytest.mark.parametrize(
    "how",
    [
        ["{script}"],
        sample.rest(["-m", "script"]),
        sample.rest(["--cold-workers", "{script}"]),
        sample.rest(["--cold-workers", "-m", "script"]),
    ],
)
def test_a_script_runs_in_a_folder_that_is_gone(how: list[str], tmp_path: Path) -> None:
    """As under Python itself: its own modules, from where it lies or from PYTHONPATH, are found."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "beside.py").write_text("NAME = 'beside'\n")
    (home / "script.py").write_text("import sys, beside\nprint('ran', beside.NAME, __name__, '' in sys.path)\n")
    arguments = [word.replace("{script}", str(home / "script.py")) for word in how]
    environ = {"PYTHONPATH": f"{child_environment()['PYTHONPATH']}:{home}"}
    run = ["run", "--standalone", "--nproc-per-node", "1", *arguments]
    code, out, told = in_a_folder_that_is_gone(tmp_path, *run, **environ)
    assert code == 0, told
    assert "ran beside __main__ False" in out, told


def test_a_folder_that_may_not_be_looked_into(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    refused = PermissionError(13, "Permission denied", "job.toml")
    assert to_blame(refused) == ""
    monkeypatch.setattr("os.access", lambda *_: False)
    assert to_blame(refused).startswith(f"job.toml: this user may not look into the current folder, {tmp_path}: go to")
    whole = PermissionError(13, "Permission denied", f"{tmp_path}/demo-out")
    assert to_blame(whole).startswith(f"{tmp_path}/demo-out: this user may not look into the current folder")
    assert to_blame(PermissionError(13, "Permission denied", "/job.toml")) == ""
    assert to_blame(OSError(28, "No space left on device")) == ""


def test_a_forked_worker_stays_in_a_folder_that_it_may_not_enter(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as shut:
        shut.setattr("os.chdir", refuse)
        _go_to(str(tmp_path))
        with pytest.raises(PermissionError):
            _go_to("/elsewhere")


# --- variables

GARBAGE = ["x", "-1", "1.5", "0x2", "\xb2", "9" * 5000, "1 2"]


@pytest.mark.parametrize("value", GARBAGE)
@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "WORLD_SIZE", "ELASTIC_MOE_GENERATION"])
def test_a_worker_names_the_variable_that_is_none(name: str, value: str) -> None:
    with pytest.raises(UsageError) as caught:
        Worker({name: value}).context(set_device=False)
    assert str(caught.value).startswith(f"{name} is {value[:80]!r}; it must be a whole number >= ")


@pytest.mark.parametrize("value", ["x", "[]", "{}", '{"replicate": 1}'])
def test_a_mesh_that_is_none(value: str) -> None:
    with pytest.raises(UsageError, match=f"ELASTIC_MOE_MESH is {re.escape(repr(value))}: not a mesh plan"):
        Worker({"ELASTIC_MOE_MESH": value}).context(set_device=False)


def test_what_is_empty_is_not_set() -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "ELASTIC_MOE_GENERATION", "ELASTIC_MOE_MESH", "LOCAL_WORLD_SIZE")
    here = Worker(dict.fromkeys(names, "")).context()
    assert (here.rank, here.local_rank, here.world_size, here.generation, here.mesh) == (0, 0, 1, 0, None)
    assert (num_local_ranks({"LOCAL_WORLD_SIZE": ""}), JobIdentity().resolve(dict.fromkeys(names, "")).generation) == (
        1,
        0,
    )


MEETING = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({}, ""),
        ({"RANK": "", "WORLD_SIZE": ""}, ""),
        ({"RANK": "x"}, "RANK is 'x'; it must be a whole number >= 0"),
        ({"RANK": "2"}, "RANK is 2 and WORLD_SIZE is 2: ranks are counted from 0 on"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'; it must be a whole number >= 1"),
        ({"WORLD_SIZE": ""}, "RANK is set and WORLD_SIZE is not"),
        ({"RANK": ""}, "WORLD_SIZE is 2 and RANK is not set"),
        ({"MASTER_ADDR": ""}, "RANK is set and MASTER_ADDR is not"),
        ({"MASTER_PORT": "x"}, "MASTER_PORT is 'x'; it must be a whole number >= 1"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT is 65536; a port is below 65536"),
    ],
)
def test_variables_by_which_ranks_meet(changed: Mapping[str, str], says: str) -> None:
    refused = pytest.raises((UserError, UsageError), match=f"^{re.escape(says)}")
    with refused if says else contextlib.nullcontext():
        check_meeting({**MEETING, **changed})


@pytest.mark.parametrize("name", ["RANK", "LOCAL_WORLD_SIZE", "ELASTIC_MOE_GENERATION"])
def test_a_checkpointer_names_the_variable_that_is_none(name: str) -> None:
    with pytest.raises(StorageUsageError, match=f"{name} is 'x'; it must be a whole number"):
        JobIdentity().resolve({name: "x"})


JOB = "[model]\nnum_experts = 2\n[train]\ndevice = 'cpu'\n"


@pytest.mark.parametrize(
    ("variables", "argv", "says"),
    [
        ({"RANK": "x"}, ["train", "job.toml"], "RANK is 'x'; it must be"),
        ({"RANK": "x"}, ["ckpt", "ls", "."], "no checkpoint at ."),
        ({"WORLD_SIZE": "many"}, ["train", "job.toml"], "WORLD_SIZE is 'many'; it must be"),
        ({"LOCAL_RANK": "-1"}, ["train", "job.toml"], "LOCAL_RANK is '-1'; it must be"),
        ({**MEETING, "MASTER_PORT": "x"}, ["train", "job.toml"], "MASTER_PORT is 'x'; it must be"),
        ({**MEETING, "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "x"}, ["train", "job.toml"], "LOCAL_WORLD_SIZE is 'x'; it"),
        ({"ELASTIC_MOE_MESH": "x"}, ["train", "job.toml"], "ELASTIC_MOE_MESH is 'x': not a mesh plan"),
        ({"ELASTIC_MOE_GENERATION": "x"}, ["train", "job.toml"], "ELASTIC_MOE_GENERATION is 'x'; it must be"),
        ({"ELASTIC_MOE_GENERATION": "x"}, ["run", __file__], "ELASTIC_MOE_GENERATION is 'x'; it must be"),
        ({"ELASTIC_MOE__TRAIN__STEPS": "x"}, ["train", "job.toml"], "ELASTIC_MOE__TRAIN__STEPS"),
        (
            {"ELASTIC_MOE_TRAIN__STEPS": "3"},
            ["train", "job.toml"],
            "ELASTIC_MOE_TRAIN__STEPS: did you mean ELASTIC_MOE__",
        ),
        ({"LOCAL_WORLD_SIZE": "x"}, ["ckpt", "ls", "s3://bucket/run"], "LOCAL_WORLD_SIZE is 'x'; it must be"),
        ({"LOGLEVEL": "info"}, ["run", __file__], "LOGLEVEL is 'info'; torch wants one of CRITICAL, ERROR"),
        ({"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "x"}, ["run", __file__], "TORCH_ELASTIC_SHUTDOWN_TIMEOUT is 'x'; it must"),
        ({"PYTHON_EXEC": "none-such"}, ["run", __file__], "PYTHON_EXEC is 'none-such': no such program"),
        ({"PET_NNODES": "x"}, ["run", __file__], "--nnodes x: it must be N or MIN:MAX"),
        ({"PET_MASTER_PORT": "x"}, ["run", __file__], "argument --master-port/--master_port: invalid int value: 'x'"),
    ],
)
def test_a_command_names_the_variable_that_is_none(
    variables: Mapping[str, str],
    argv: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[Any],
) -> None:
    (tmp_path / "job.toml").write_text(JOB)
    monkeypatch.chdir(tmp_path)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(argv) == 2
    told = capsys.readouterr().err
    assert told.splitlines()[-1].startswith(f"elastic-moe: error: {says}"), told


def test_no_number_is_read_from_the_environment_but_by_the_functions_that_name_it() -> None:
    read = re.compile(r"\b(int|float)\([^()\n]*(environ|\benv\b|_env\b)")
    found = [
        f"{file.relative_to(ROOT)}: {line.strip()}"
        for package in ("elastic_moe", "launcher", "storage")
        for file in sorted((ROOT / package).rglob("*.py"))
        for line in file.read_text().splitlines()
        if read.search(line)
    ]
    doc = ["elastic_moe/integrations/lightning.py"]  # an example for scripts
    assert [line for line in found if line.partition(":")[0] not in doc] == []
