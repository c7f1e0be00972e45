"""The unit: by systemd's own analysis where it is installed, and its command line by our own parser."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.deploy.tools import DEPLOY, conf_of, documented_exit_codes, fill_in, need, parse_run

UNIT = DEPLOY / "systemd" / "elastic-moe@.service"
EXAMPLE = DEPLOY / "systemd" / "job.env.example"


def settings() -> dict[str, str]:
    """The unit's assignments, continued lines joined."""
    text = UNIT.read_text().replace("\\\n", " ")
    return dict(re.findall(r"^(\w+)=(.*)$", text, re.MULTILINE))


def environment() -> dict[str, str]:
    return dict(re.findall(r"^(\w+)=(.*)$", EXAMPLE.read_text(), re.MULTILINE))


def command() -> list[str]:
    """As systemd makes it: `${NAME}` within a word, `$NAME` as words of its own."""
    line = settings()["ExecStart"].replace("%i", "job")
    line = re.sub(r"\$(\w+)", lambda match: environment()[match[1]], line)
    return shlex.split(fill_in(line, environment()))


def installed(tmp_path: Path, text: str) -> Path:
    """A root folder in which the unit is installed, and what it starts."""
    unit = tmp_path / "etc" / "systemd" / "system" / "elastic-moe@.service"
    program = tmp_path / command()[0].lstrip("/")
    for path in (unit, program):
        path.parent.mkdir(parents=True)
    unit.write_text(text)
    shutil.copy("/bin/true", program)
    for target in ("sysinit", "basic", "shutdown", "network-online", "multi-user"):
        (unit.parent / f"{target}.target").write_text("[Unit]\nDescription=stands for the system's own\n")
    return tmp_path


def analyze(root: Path, verb: str, *options: str) -> subprocess.CompletedProcess[str]:
    asked = ["systemd-analyze", verb, f"--root={root}", "--recursive-errors=no", *options, "elastic-moe@job.service"]
    return subprocess.run(asked, capture_output=True, text=True, timeout=60, check=False)


def test_systemd_finds_no_fault(tmp_path: Path) -> None:
    need("systemd-analyze", package="systemd")
    done = analyze(installed(tmp_path, UNIT.read_text()), "verify")
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_systemd_would_find_a_fault(tmp_path: Path) -> None:
    need("systemd-analyze", package="systemd")
    wrong = UNIT.read_text().replace("KillMode=mixed", "KillMode=gently").replace("OOMPolicy", "OOMPolice")
    done = analyze(installed(tmp_path, wrong), "verify")
    assert "kill mode" in done.stderr.lower()
    assert "OOMPolice" in done.stderr


def test_the_unit_is_confined(tmp_path: Path) -> None:
    need("systemd-analyze", package="systemd")
    done = analyze(installed(tmp_path, UNIT.read_text()), "security", "--offline=true", "--threshold=40")
    assert done.returncode == 0, done.stdout


def test_the_command_line_is_one() -> None:
    words = command()
    assert words[0] == "/opt/elastic-moe/bin/elastic-moe"
    given = parse_run(words[1:])
    assert (given.rdzv_backend, given.rdzv_id, given.nnodes) == ("etcd3", "job", "1:8")
    assert given.preemption_notice == ["aws"]
    assert (given.training_script, given.training_script_args[0]) == ("elastic_moe", "train")
    assert conf_of(given).user == "job"


def test_there_is_time_to_drain() -> None:
    unit = settings()
    assert (unit["KillMode"], unit["KillSignal"]) == ("mixed", "SIGTERM"), "workers are the agent's affair"
    drain_s = parse_run(command()[1:]).drain_grace
    assert drain_s <= 120, "a spot machine has two minutes"
    assert drain_s < int(unit["TimeoutStopSec"])


def test_it_comes_back_unless_there_is_no_point() -> None:
    unit = settings()
    assert unit["Restart"] == "on-failure"
    assert unit["SuccessExitStatus"] == str(128 + 15), "asked to leave: no failure, no restart"
    assert {int(code) for code in unit["RestartPreventExitStatus"].split()} <= documented_exit_codes()
    assert int(unit["StartLimitBurst"]) * int(unit["RestartSec"]) < int(unit["StartLimitIntervalSec"])
    patience_s = conf_of(parse_run(command()[1:])).connect_timeout
    assert patience_s is not None
    assert patience_s * int(unit["StartLimitBurst"]) > int(unit["StartLimitIntervalSec"]), (
        "an etcd that is away is waited for"
    )
    assert unit["OOMPolicy"] == "continue"


def test_secrets_are_for_root_alone() -> None:
    assert settings()["EnvironmentFile"].startswith("/etc/"), "and it has to exist: no leading -"
    assert "--mode=0600" in EXAMPLE.read_text()
    assert [value for name, value in environment().items() if re.search("PASSWORD|TOKEN", name)] == [""]


@pytest.mark.parametrize("name", sorted(environment()))
def test_every_variable_of_the_example_is_used(name: str) -> None:
    known_to_the_launcher = {"ELASTIC_MOE_ETCD_PASSWORD"}
    assert name in known_to_the_launcher or re.search(rf"\$\{{?{name}\b", settings()["ExecStart"])


def test_what_the_unit_reads_is_installed_before_it_starts() -> None:
    commands = re.findall(r"^# (.*)$", (DEPLOY / "systemd" / "README.md").read_text(), re.MULTILINE)[1:]
    (start,) = [i for i, c in enumerate(commands) if c.startswith("systemctl enable --now")]
    installed = " ".join(commands[:start])
    named = set(re.findall(r"/etc/elastic-moe/([\w.-]+)", " ".join(environment().values())))
    assert named == {"ca.pem", "job.toml"}
    for name in named:
        assert re.search(rf"\b{re.escape(name)}\b[^#]* /etc/elastic-moe/", installed), name
