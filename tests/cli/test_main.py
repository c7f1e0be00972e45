"""The command itself: help, exit codes, errors in one line, and what it does not import."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from elastic_moe.cli import main as cli
from elastic_moe.cli import plan, planning
from elastic_moe.cli.parser import node_range
from elastic_moe.cli.run import run_parser
from elastic_moe.errors import UserError
from launcher import MeshSpec, Priced, price

HELP = Path(__file__).parent / "help"
VERBS = ["", "train", "demo", "plan", "ckpt", "status", "drain", "report", "etcd"]


def call(*argv: str) -> int:
    """The exit code, argparse's own exits included."""
    try:
        return cli.main(argv)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else -1


@pytest.mark.parametrize("verb", VERBS)
def test_help(verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Changed on purpose? `ELASTIC_MOE_UPDATE_GOLDEN=1 pytest tests/cli/test_main.py` writes the files anew."""
    monkeypatch.setenv("COLUMNS", "80")
    assert call(*([verb] if verb else []), "--help") == 0
    text = capsys.readouterr().out
    golden = HELP / f"{verb or 'elastic-moe'}.txt"
    if "ELASTIC_MOE_UPDATE_GOLDEN" in os.environ:
        golden.write_text(text)
    assert text == golden.read_text()
    assert max(map(len, text.splitlines())) <= 80


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--version") == 0
    assert capsys.readouterr().out.count(".") == 2


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish", "tcsh"])
def test_completion(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Knows the options of each verb, torchrun's among them."""
    assert call("--print-completion", shell) == 0
    script = capsys.readouterr().out
    assert "elastic-moe" in script
    lacking = {option for option in all_options() if option not in script}
    assert not lacking
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def all_options() -> set[str]:
    verbs = next(a for a in cli.build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    parsers = [*(parser for name, parser in verbs.choices.items() if name != "run"), run_parser()]
    while nested := [a for p in parsers for a in p._actions if isinstance(a, argparse._SubParsersAction)]:
        parsers = [p for p in parsers if not any(a in p._actions for a in nested)]
        parsers += [inner for action in nested for inner in action.choices.values()]
    shown = (a for parser in parsers for a in parser._actions if a.help != argparse.SUPPRESS)
    return {name.lstrip("-") for action in shown for name in action.option_strings if name.startswith("--")}


@pytest.mark.parametrize(
    "code",
    [
        "main(['--version'])",
        "main(['ckpt', 'ls', 'checkpoints'])",
        "main(['--help'])",
        "main(['plan', '--experts', '8', '--slots-per-node', '8', '--nodes', '1:16', '--json'])",
        "main(['plan', '--job', 'job.toml'])",
        "main(['plan', '--experts', '8', '--expert-parallel', '3'])",
        "main(['train', 'job.toml', '--set', 'train.stepz=1'])",
        "main(['demo', '--steps', '1'])",
        "main(['drain', 'a', '--rdzv-endpoint', '127.0.0.1:9', '--rdzv-conf', 'connect_timeout=0.1'])",
        "main(['etcd', '--members', '127.0.0.1:9', '--binary', '/no/etcd'])",
        "main(['status', '--rdzv-endpoint', '127.0.0.1:1', '--rdzv-conf', 'connect_timeout=0.1'])",
        f"main(['report', {str(Path(__file__).parent / 'report')!r}])",
    ],
)
def test_torch_is_not_imported(code: str, tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text("[model]\nnum_experts = 4\n")
    script = f"""
import sys
import launcher.kv.connect
from elastic_moe.cli.main import main
launcher.kv.connect._LEAST_TIMEOUT_S = 0.1
try:
    {code}
except SystemExit:
    pass
sys.exit("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr.decode()


def test_plan_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("plan", "--experts", "8", "--slots-per-node", "8", "--nodes", "1:16", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert [row["slots"] for row in answer["plans"]] == list(range(8, 129, 8))
    for row in answer["plans"]:
        mesh = row["mesh"]
        assert mesh["replicate"] * mesh["shard"] * mesh["expert"] + mesh["idle"] == row["slots"]
        assert row["step_s"] > 0
        assert row["memory_bytes"] <= answer["spec"]["memory_cap_bytes"]
        assert row["node_loss"] == ("0 steps" if row["nodes"] > 1 else "to the last checkpoint")


def test_plan_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("plan", "--nodes", "1:2", "--memory-gib", "80") == 0
    head, infeasible, feasible = capsys.readouterr().out.splitlines()
    heads = ["nodes", "slots", "replicate", "shard", "expert", "idle", "batch", "step", "memory", "a", "lost", "node"]
    assert head.split() == heads
    assert "no mesh for 8 slots: the leanest needs" in infeasible
    assert feasible.split()[:6] == ["2", "16", "1", "2", "8", "0"]
    assert feasible.endswith("  to the last peer save")
    assert call("plan", "--nodes", "1", "--memory-gib", "1") == 1


def test_rows_of_a_plan_come_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not when the last of thousands is thought through."""
    args = argparse.Namespace(nodes=range(1, 2001), slots_per_node=8, json=False)
    priced: list[int] = []

    def noted(slots: int, spec: MeshSpec, *, ranks_per_node: int) -> Priced:
        priced.append(slots)
        return price(slots, spec, ranks_per_node=ranks_per_node)

    monkeypatch.setattr("elastic_moe.cli.planning.price", noted)
    rows = planning.table(plan.mixtral(), args)
    assert (next(rows).slots, next(rows).slots, priced) == (8, 16, [8, 16])


def test_a_plan_in_json_says_how_far_it_is(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "_TELL_EVERY_S", 0.0)
    assert call("plan", "--nodes", "2:4", "--json") == 0
    out, err = capsys.readouterr()
    assert [row["nodes"] for row in json.loads(out)["plans"]] == [2, 3, 4]
    assert err.splitlines()[-1] == "planned for 2 of 3 numbers of nodes"


def test_plan_of_a_job_with_flags_over_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = tmp_path / "job.toml"
    job.write_text("[model]\nnum_experts = 4\n[train]\nglobal_batch = 24\n[mesh]\nmax_idle = 1\n")
    flags = ["--set", "model.num_experts=6", "--global-batch", "30", "--nodes", "2", "--slots-per-node", "3", "--json"]
    assert call("plan", "--job", str(job), *flags) == 0
    spec = json.loads(capsys.readouterr().out)["spec"]
    assert (spec["num_experts"], spec["global_batch"], spec["max_idle"]) == (6, 30, 1)
    assert call("plan", "--job", str(job), "--experts", "0", "--json") == 0
    spec = json.loads(capsys.readouterr().out)["spec"]
    assert (spec["num_experts"], spec["expert_params"]) == (0, 0)


@pytest.mark.parametrize(("text", "nodes"), [("4", range(4, 5)), ("1:16", range(1, 17)), ("3:3", range(3, 4))])
def test_node_ranges(text: str, nodes: range) -> None:
    assert node_range(text) == nodes


JOB = "{tmp}/job.toml"
BAD_INPUT = [
    ([], "the following arguments are required: VERB (see elastic-moe --help)"),
    (["pla"], "argument VERB: invalid choice: 'pla'"),
    (["plan", "--expert", "8"], "unrecognized arguments: --expert 8"),  # no abbreviations
    (["plan", "--nodes", "4:2"], "argument --nodes: '4:2' is no range of node counts: 1 <= MIN <= MAX"),
    (["plan", "--nodes", "many"], "argument --nodes: 'many' is neither N nor MIN:MAX"),
    (["plan", "--slots-per-node", "0"], "argument --slots-per-node: '0' is not a whole number >= 1"),
    (["plan", "--experts", "8", "--expert-parallel", "9"], "--expert-parallel 9 is more than there are experts"),
    (["plan", "--set", "train.steps=3"], "--set changes a field of a job: name the job with --job JOB.toml"),
    (["plan", "--job", "{tmp}/none.toml"], "job file {tmp}/none.toml does not exist"),
    (["train", "{tmp}/none.toml"], "job file {tmp}/none.toml does not exist"),
    (["train", JOB, "--set", "train.stepz=3"], "--set train.stepz: unknown key train.stepz; did you mean steps?"),
    (["train", JOB, "--set", "mesh.expert=9"], JOB + ": mesh.expert = 9 is more than model.num_experts = 8"),
    (["demo", "--out", JOB], "--out " + JOB + ": not a directory"),
    (["demo", "--out", "{tmp}"], "--out {tmp}: not empty, and not of an earlier demo"),
    (["demo", "--steps", "3"], "--steps 3: too few for the killed node to come back in"),
    (["ckpt", "ls", "{tmp}/none"], "no checkpoint at {tmp}/none"),
    (["ckpt", "verify", "{tmp}/none"], "no checkpoint at {tmp}/none"),
    (["ckpt", "ls", "memory://x"], "memory://x is the memory of this command, which ends with it: give a folder or"),
    (["ckpt", "gc", "fsspec+memory://x"], "fsspec+memory://x is the memory of this command"),
    (["ckpt", "push", "{tmp}", "memory://x"], "memory://x is the memory of this command"),
    (["ckpt", "pull", "MEMORY://x", "{tmp}"], "MEMORY://x is the memory of this command"),
    (["ckpt", "push", "{tmp}", "zip://x::memory://y"], "zip://x::memory://y is the memory of this command"),
    (["ckpt", "ls", "simplecache::s3://b/x"], "'simplecache::s3://b/x' is a chain of file systems"),
    (["ckpt", "export", "memory://x", "{tmp}/out"], "memory://x is the memory of this command"),
    (["generate", "memory://x"], "memory://x is the memory of this command"),
    (["train", JOB, "--set", "checkpoint.url=memory://x"], "checkpoint.url = memory://x is the memory of this command"),
    (["status", "--rdzv-endpoint", "memory://x", "--rdzv-id", "x"], "--rdzv-endpoint memory://x is the memory of this"),
    (["report", "{tmp}/none"], "{tmp}/none: no such file or folder"),
    (["report", "{tmp}"], "no events in {tmp}; did `run` get --log-dir?"),
    (["status"], "--rdzv-endpoint: needed, the same as the job's nodes were given"),
    (
        ["status", "--rdzv-endpoint", "127.0.0.1:1", "--rdzv-conf", "connect_timeout=0.1"],
        "--rdzv-endpoint 127.0.0.1:1 cannot be reached",
    ),
    (["run", "--nnodes", "1:2", "x.py"], "--rdzv-endpoint: several nodes need HOST:PORT"),
    (["run", "--rdzv-conf", "is_host=flase", "{tmp}/job.toml"], "--rdzv-conf is_host=flase: expected true or false"),
    (
        ["run", "--rdzv-conf", "crash_lop=3", "{tmp}/job.toml"],
        "--rdzv-conf crash_lop: no such key; did you mean crash_",
    ),
    (
        ["status", "--rdzv-endpoint", "127.0.0.1:1", "--rdzv-conf", "is_host=flase"],
        "--rdzv-conf is_host=flase: expected true or false",
    ),
    (["run", "--silence-timeout", "5", "x.py"], "--silence-timeout: needs the workers' output in files to watch: add"),
    (["run", "--silence-timeout", "5", "--tee", "0:0,1:0", "x.py"], "--silence-timeout: needs the workers' output in"),
    (
        ["run", "--hang-timeout", "soon", "x.py"],
        "argument --hang-timeout: 'soon' is not a number > 0, nor one of auto, off",
    ),
    (["run", "--preflight", " ", "x.py"], "argument --preflight: ' ' is no command"),
    (["run", "--standalone", "--nproc-per-node", "1", "{tmp}/none.py"], "script '{tmp}/none.py': no such file"),
]


@pytest.mark.parametrize(
    ("argv", "line"), BAD_INPUT, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_bad_input(
    argv: list[str],
    line: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("launcher.kv.connect._LEAST_TIMEOUT_S", 0.1)
    (tmp_path / "job.toml").write_text("[model]\nnum_experts = 8\n")
    assert call(*(word.replace("{tmp}", str(tmp_path)) for word in argv)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("elastic-moe: error: " + line.replace("{tmp}", str(tmp_path)))
    assert captured.err.count("\n") == 1


class Harm(Exception):
    exit_code = 1


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (UserError("say\nwhat   is wrong"), 2, "elastic-moe: error: say what is wrong\n"),
        (Harm("it broke"), 1, "elastic-moe: error: it broke\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_errors_become_exit_codes(
    error: BaseException, code: int, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(args: object) -> int:
        raise error

    monkeypatch.setattr("elastic_moe.cli.plan.handle", fail)
    assert call("plan") == code
    assert capsys.readouterr().err == told


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(args: object) -> int:
        raise RuntimeError("a bug")

    monkeypatch.setattr("elastic_moe.cli.plan.handle", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["plan"])


def test_a_closed_pipe_is_quiet() -> None:
    command = [sys.executable, "-m", "elastic_moe", "plan", "--nodes", "1:200", "--json"]  # more than a pipe holds
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert [line for line in process.stderr if not line.startswith(b"planned for ")] == []  # on a busy machine
        assert process.wait(timeout=60) == 0


@pytest.mark.parametrize(("rank", "printed"), [("0", True), ("1", False)])
def test_a_mistake_is_told_once_and_to_the_agent(
    rank: str, printed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torch's agent reads the file when the worker ends, and so knows the reason from whichever rank ended first."""
    error_file = tmp_path / "error.json"
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(error_file))
    assert call("train", f"{tmp_path}/none.toml") == 2
    line = f"job file {tmp_path}/none.toml does not exist"
    assert capsys.readouterr().err == (f"elastic-moe: error: {line}\n" if printed else "")
    left = json.loads(error_file.read_text())["message"]
    assert left["message"] == line
    assert "Traceback" not in left["extraInfo"]["py_callstack"]
    assert int(left["extraInfo"]["timestamp"]) > 0


def test_a_mistake_of_a_rank_without_an_agent_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    assert call("train", f"{tmp_path}/none.toml") == 2
    assert "does not exist" in capsys.readouterr().err
