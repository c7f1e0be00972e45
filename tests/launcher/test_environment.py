"""The project's own environment variables: read, written, documented, and spelt in one place."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from launcher.environment import Environment
from launcher.errors import UsageError
from storage.agent import AgentEnvironment

ROOT = Path(__file__).parents[2]
FULL = Environment(
    generation=3,
    lineage="etcd-7",
    run_id="job",
    node="a-1",
    zone="z-2",
    address="10.0.0.7",
    mesh='{"replicate":1}',
    channel=Path("/run/worker-3-0"),
    stacks=Path("/run/worker-3-0.stacks"),
    events=Path("/log/events.jsonl"),
    checkpoint=Path("/run/checkpoint"),
    service=Path("/run/service/service.sock"),
    keep_children=True,
    token="secret-1",
    etcd_password="secret-2",
)
FIELDS = {field.name for field in dataclasses.fields(Environment)}


def test_what_is_written_is_read() -> None:
    assert all(getattr(FULL, f.name) != f.default for f in dataclasses.fields(Environment)), "the test has every field"
    assert Environment.from_env(FULL.to_env()) == FULL
    assert set(FULL.to_env()) == {Environment.variable(name) for name in FIELDS}


def test_what_is_not_there_is_the_default() -> None:
    assert Environment.from_env({}) == Environment()
    assert Environment.from_env({Environment.variable(name): "" for name in FIELDS}) == Environment()
    unset = {"mesh", "channel", "stacks", "events", "checkpoint", "service", "keep_children", "token", "etcd_password"}
    assert set(Environment().to_env()) == {Environment.variable(name) for name in FIELDS - unset}


def test_a_generation_that_is_no_number_is_told_by_its_variable() -> None:
    with pytest.raises(UsageError, match=r"^ELASTIC_MOE_GENERATION is 'seven'; it must be a whole number >= 0$"):
        Environment.from_env({"ELASTIC_MOE_GENERATION": "seven"})


def test_secrets_are_not_shown() -> None:
    assert "secret" not in repr(FULL)


def test_storage_reads_the_same_variables() -> None:
    told = dataclasses.asdict(AgentEnvironment.from_env(FULL.to_env()))
    assert told == {name: str(getattr(FULL, name)) for name in told}


def test_one_file_of_each_leaf_spells_the_names() -> None:
    spelling = {
        str(file.relative_to(ROOT))
        for package in ("elastic_moe", "launcher", "storage")
        for file in (ROOT / package).rglob("*.py")
        if Environment.prefix in file.read_text()
    }
    assert spelling == {"launcher/environment.py", "storage/agent.py"}


def test_every_variable_is_documented() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    documented = set(re.findall(rf"^\| `{Environment.prefix}(\w+)` \|", page, re.MULTILINE))
    assert documented == {name.upper() for name in FIELDS}
