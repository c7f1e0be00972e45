"""What `run` makes of torchrun's options."""

from __future__ import annotations

import os
from pathlib import Path
from signal import SIGTERM, SIGUSR1

import pytest
from torch.distributed.run import config_from_args

from elastic_moe.cli.main import main
from elastic_moe.cli.processors import num_usable
from elastic_moe.cli.run import _name_zone, _parse
from elastic_moe.cli.torchrun_options import check_machine
from launcher.drain.signals import HANDLED


@pytest.mark.parametrize(
    ("given", "environment", "cap", "workers_see"),
    [
        ([], "", None, 0),
        (["--max-restarts", "0"], "", 0, 0),
        (["--max_restarts", "3"], "", 3, 3),
        ([], "2", 2, 2),
        ([], "0", 0, 0),
        (["--max-restarts", "4"], "2", 4, 4),
    ],
)
def test_a_number_of_restarts_is_a_cap_only_if_it_is_given(
    monkeypatch: pytest.MonkeyPatch, given: list[str], environment: str, cap: int | None, workers_see: int
) -> None:
    if environment:
        monkeypatch.setenv("PET_MAX_RESTARTS", environment)
    parsed = _parse([*given, __file__])
    assert (parsed.max_restarts_given, parsed.max_restarts) == (cap, workers_see)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--rdzv-id", "a b/../c"], "--rdzv-id 'a b/../c': may not hold a '/'"),
        (["--rdzv-id", "x\udcff"], "--rdzv-id 'x\\udcff': it must be text without line breaks and the like"),
        (["--node-name", "a/b"], "--node-name 'a/b': may not hold a '/'"),
        (["--node-name", "a\nb"], "--node-name 'a\\nb': it must be text without"),
        (["--node-name", "n\udcff"], "--node-name 'n\\udcff': it must be text without"),
        (["--node-name", "n" * 101], f"--node-name '{'n' * 40}'...: is too long, 100 bytes at most"),
        (["--nproc-per-node", "0"], "--nproc-per-node 0: a node runs at least one worker"),
        (["--nproc-per-node", "-2"], "--nproc-per-node -2: a node runs at least one worker"),
        (["--nproc-per-node", "two"], "--nproc-per-node two: it must be a number, or auto, cpu, gpu or xpu"),
        (["--nproc-per-node", "xpu"], "--nproc-per-node xpu: this torch sees no such device on this machine"),
        (["--nnodes", "two"], "--nnodes two: it must be N or MIN:MAX, with 1 <= MIN <= MAX"),
        (["--nnodes", "2:1"], "--nnodes 2:1: it must be N or MIN:MAX"),
        (["--nnodes", "1:2:3"], "--nnodes 1:2:3: it must be N or MIN:MAX"),
        (["--nnodes", "0"], "--nnodes 0: it must be N or MIN:MAX"),
        (["--tee", "4"], "--tee 4: it must be 0 (none), 1 (stdout), 2 (stderr) or 3 (both)"),
        (["-r", "0:3,1"], "--redirects 0:3,1: it must be"),
        (["--max-restarts", "-1"], "--max-restarts -1: it must be 0 or more"),
        (["--monitor-interval", "0"], "--monitor-interval 0: it must be a number of seconds above 0"),
        (["--monitor-interval", "nan"], "--monitor-interval nan: it must be a number of seconds above 0"),
        (["--shutdown-timeout", "-3"], "--shutdown-timeout -3: it must be a number of seconds, 0 or more"),
        (["--run-path"], "--run-path: not supported; leave it out"),
        (["--no-python", "-m"], "--no-python: not together with --module"),
        (
            ["--log-dir", "s3://bucket/logs"],
            "--log-dir 's3://bucket/logs' is a URL, and must be a path on this machine",
        ),
        (["--signals-to-handle", "SIGKILL"], "--signals-to-handle SIGKILL: no signal that an agent can handle"),
        (["--signals-to-handle", "USR1"], "--signals-to-handle USR1: no signal that an agent can handle"),
        (["--no-python", "none-such"], "--no-python 'none-such': no such program, or it may not be"),
        (["--logs-specs", "zork"], "--logs-specs zork: no installed package has such specs (entry points of torchrun."),
        (["--nnodes", "1:"], "--nnodes 1:: it must be N or MIN:MAX"),
        (["--nnodes", "1" * 5000], "--nnodes 111"),
        (["--nproc-per-node", "1" * 5000], "--nproc-per-node 111"),
        (
            ["--nnodes", "2", "--rdzv-backend", "memory"],
            "--rdzv-backend memory: such a job is one node, and --nnodes 2",
        ),
        (["--rdzv-endpoint", "memory://x"], "--rdzv-endpoint memory://x is the memory of this command"),
        (["-m", "none_such.sub"], "-m none_such.sub: no such module here, in PYTHONPATH, or among what is installed"),
        (["-m", ".relative"], "-m .relative: no such module here"),
        (["-m", ""], "-m : no such module here"),
        ([str(Path(__file__).parent)], f"script '{Path(__file__).parent}': a folder without a __main__.py"),
        (["/dev/null"], "script '/dev/null': a pipe or a device"),
        (["a\0b"], "script 'a\\x00b': embedded null byte"),
        (["x" * 300], "script 'xxx"),
        (["--event-log-handler", "nosuch"], "--event-log-handler nosuch: nobody has registered such a handler"),
        (["--local-ranks-filter", "a"], "--local_ranks_filter must be a comma-separated list of integers"),
        (["--start-method", "x"], "argument --start-method/--start_method: invalid choice: 'x'"),
        (["--rdzv-backend", "zookeeper"], "--rdzv-backend zookeeper: "),
        (["--zone", "b", "--rdzv-conf", "zone=a"], "--zone b: --rdzv-conf names another one, zone=a"),
    ],
)
def test_what_torch_takes_without_a_word_is_refused_in_one_line(
    given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", *given, __file__]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"elastic-moe: error: {message}")
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    ("given", "environment", "endpoint", "backend"),
    [
        (["--nnodes", "2", "--master-addr", "host-1"], {}, "host-1:29500", "embedded"),
        (["--nnodes", "1:2", "--master_port", "7", "--node-rank", "1"], {}, "127.0.0.1:7", "embedded"),
        ([], {"PET_NNODES": "2", "PET_MASTER_ADDR": "host-1", "PET_MASTER_PORT": "7"}, "host-1:7", "embedded"),
        (["--nnodes", "2", "--master-addr", "host-1", "--rdzv-endpoint", "x:1"], {}, "x:1", "embedded"),
        (["--master-addr", "host-1"], {}, "", "memory"),
        (["--standalone", "--rdzv-backend", "etcd3", "--rdzv-endpoint", "x:1"], {}, "", "memory"),
        ([], {"PET_STANDALONE": "1", "PET_NNODES": "2"}, "", "memory"),
        ([], {"PET_RDZV_ID": "", "PET_RDZV_ENDPOINT": ""}, "", "memory"),
    ],
)
def test_where_nodes_meet_by_the_options_that_torchrun_has_for_it(
    monkeypatch: pytest.MonkeyPatch, given: list[str], environment: dict[str, str], endpoint: str, backend: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    parsed = _parse([*given, __file__])
    assert (parsed.rdzv_endpoint, parsed.rdzv_backend) == (endpoint, backend)


def test_a_job_of_this_node_alone_waits_for_nobody(caplog: pytest.LogCaptureFixture) -> None:
    parsed = _parse(["--standalone", "--nnodes", "2:4", "--rdzv-endpoint", "x:1", "--rdzv-id", "7", __file__])
    assert parsed.nnodes == "1"
    told = [f"--standalone: --{one} is not used" for one in ("nnodes 2:4", "rdzv-endpoint x:1", "rdzv-id 7")]
    assert [message.partition(",")[0] for message in caplog.messages] == told


def test_a_script_whose_name_begins_like_an_option_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "-x.py").touch()
    assert _parse(["--", "-x.py", "--its", "own"]).training_script == "./-x.py"


def test_a_folder_with_a_main_is_run_as_python_does(tmp_path: Path) -> None:
    (tmp_path / "__main__.py").touch()
    assert _parse([str(tmp_path)]).training_script == str(tmp_path)


@pytest.mark.parametrize(
    ("files", "most"),
    [
        ({"proc/self/cgroup": "0::/"}, None),
        ({"proc/self/cgroup": "0::/", "fs/cpu.max": "max 100000"}, None),
        ({"proc/self/cgroup": "0::/", "fs/cpu.max": "150000 100000"}, 1),
        ({"proc/self/cgroup": "0::/a/b", "fs/a/cpu.max": "100000 100000", "fs/a/b/cpu.max": "max 100000"}, 1),
        ({"proc/self/cgroup": "0::/", "fs/cpu.max": "5000 100000"}, 1),
        ({"proc/self/cgroup": "0::/", "fs/cpu.max": "nothing"}, None),
        (
            {
                "proc/self/cgroup": "3:cpuacct,cpu:/pod",
                "fs/cpu/pod/cpu.cfs_quota_us": "100000\n",
                "fs/cpu/pod/cpu.cfs_period_us": "100000\n",
            },
            1,
        ),
        ({"proc/self/cgroup": "3:cpu:/", "fs/cpu/cpu.cfs_quota_us": "-1", "fs/cpu/cpu.cfs_period_us": "100000"}, None),
        ({}, None),
    ],
)
def test_processors_are_those_that_a_container_may_use(files: dict[str, str], most: int | None, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert num_usable(tmp_path / "proc", tmp_path / "fs") == (most or len(os.sched_getaffinity(0)))


def test_workers_by_processors_are_as_many_as_may_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elastic_moe.cli.torchrun_options.num_usable", lambda: 3)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    for text in ("auto", "cpu", "2"):
        parsed = _parse(["--nproc-per-node", text, __file__])
        check_machine(parsed)
        assert parsed.nproc_per_node == ("2" if text == "2" else "3")


def test_a_job_that_has_no_mesh_here_is_not_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "job.toml").write_text("[mesh]\nexpert = 2\n")
    assert main(["run", "--nproc-per-node", "3", "--mesh", str(tmp_path / "job.toml"), __file__]) == 2
    line = "no mesh for 3 slots: no 3 ranks can be laid out with expert = 2 (with mesh.max_idle = 1 there is one)"
    assert line in capsys.readouterr().err


@pytest.mark.parametrize("given", [[], ["--rdzv-conf", "zone=a"], ["--rdzv-conf", "lease_ttl=3"]])
def test_a_zone_is_named_by_its_own_option(given: list[str]) -> None:
    config, *_ = config_from_args(_parse([*given, "--zone", "a", __file__]))
    _name_zone(config, "a")
    assert config.rdzv_configs["zone"] == "a"


def test_signals_are_those_that_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _parse([__file__]).signals == HANDLED
    assert _parse(["--signals-to-handle", "SIGTERM, sigusr1,SIGTERM", __file__]).signals == (SIGTERM, SIGUSR1)
    monkeypatch.setenv("PET_SIGNALS_TO_HANDLE", "SIGUSR1")
    assert _parse([__file__]).signals == (SIGUSR1,)


@pytest.mark.parametrize("name", ["STANDALONE", "MODULE", "NO_PYTHON", "VIRTUAL_LOCAL_RANK"])
def test_switches_of_the_environment_that_are_none(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(f"PET_{name}", "yes")
    assert main(["run", __file__]) == 2
    assert f"PET_{name}=yes: it is a switch, which must be 0 or 1" in capsys.readouterr().err


def test_an_empty_switch_is_named_and_no_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PET_NNODES", "1")
    monkeypatch.setenv("PET_STANDALONE", "")
    assert main(["run", __file__]) == 2
    assert "PET_STANDALONE=: it is a switch, which must be 0 or 1" in capsys.readouterr().err
