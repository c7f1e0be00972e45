"""Jobs from files, the environment and `--set`: which one wins, and each mistake in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from elastic_moe import config
from elastic_moe.errors import UserError

JOB = """
[model]
num_experts = 8
dim = 64

[train]
steps = 20
global_batch = 16
"""


@pytest.fixture
def job(tmp_path: Path) -> Path:
    path = tmp_path / "job.toml"
    path.write_text(JOB)
    return path


def test_later_sources_win(job: Path) -> None:
    environ = {"ELASTIC_MOE__TRAIN__STEPS": "30", "ELASTIC_MOE__TRAIN__SEED": "5", "ELASTIC_MOE_RUN_ID": "r"}
    loaded = config.load(job, sets=["train.seed=6", "model.dim = 128"], environ=environ)
    assert loaded.train.log_every == 10, "default"
    assert loaded.train.global_batch == 16, "file over default"
    assert loaded.train.steps == 30, "environment over file"
    assert loaded.train.seed == 6, "--set over environment"
    assert loaded.model.dim == 128, "blanks around = are no part of the value"


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("s3://bucket/run?x=1", "s3://bucket/run?x=1"),
        ('"quoted"', "quoted"),
        ("a = b", "a = b"),
        ("1\nother = 2", "1\nother = 2"),
    ],
)
def test_bare_strings(job: Path, text: str, url: str) -> None:
    assert config.load(job, sets=[f"checkpoint.url={text}"], environ={}).checkpoint.url == url


def test_toml_values(job: Path) -> None:
    loaded = config.load(job, sets=["train.exact=true", "optim.lr=3e-4"], environ={})
    assert loaded.train.exact is True
    assert loaded.optim.lr == 3e-4


@pytest.mark.parametrize(
    ("sets", "environ", "line"),
    [
        (["model.num_expert=8"], {}, "--set model.num_expert: unknown key model.num_expert; did you mean num_experts?"),
        (["modle.dim=8"], {}, "--set modle.dim: unknown section modle; did you mean model?"),
        (
            ["checkpoint.zzz=8"],
            {},
            "--set checkpoint.zzz: unknown key checkpoint.zzz; known are url, every, ram_every, backlog, "
            "prefix_spread, check_replicas, keep, staging, take_over",
        ),
        (["steps=3"], {}, "--set steps: write SECTION.FIELD=VALUE; did you mean train.steps?"),
        (["train.steps"], {}, "--set train.steps: there is no value; write SECTION.FIELD=VALUE"),
        (
            ["train.steps=0"],
            {},
            "--set train.steps: train.steps = 0: it must be greater than or equal to 1",
        ),
        (
            ["train.steps=many"],
            {},
            "--set train.steps: train.steps = 'many': it must be a valid integer",
        ),
        (
            [],
            {"ELASTIC_MOE__TRAIN__DTYPE": "fp64"},
            "ELASTIC_MOE__TRAIN__DTYPE: train.dtype = 'fp64': it must be 'float32' or 'bfloat16'",
        ),
        (
            [],
            {"ELASTIC_MOE__STEPS": "3"},
            "ELASTIC_MOE__STEPS: write ELASTIC_MOE__SECTION__FIELD; did you mean train.steps?",
        ),
        (
            ["mesh.expert=9"],
            {},
            "{job}: mesh.expert = 9 is more than model.num_experts = 8: "
            "some expert-parallel ranks would never hold an expert",
        ),
        (["model.top_k=9"], {}, "{job}: model: top_k 9 is more than num_experts 8"),
        (
            ["train.steps=0", "train.seed=-1"],
            {},
            "--set train.steps: train.steps = 0: it must be greater than or equal to 1 (and 1 more)",
        ),
    ],
)
def test_mistakes_outside_the_file(job: Path, sets: list[str], environ: dict[str, str], line: str) -> None:
    with pytest.raises(UserError) as caught:
        config.load(job, sets=sets, environ=environ)
    assert str(caught.value) == line.replace("{job}", str(job))


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"[train]\nstep = 3\n", "{job}: unknown key train.step; did you mean steps?"),
        (b"[train]\nlr = 1.0\n", "{job}: unknown key train.lr; did you mean optim.lr?"),
        (b"[model]\ntokenizer = 'x'\n", "{job}: unknown key model.tokenizer; did you mean data.tokenizer?"),
        (b"[train]\nbatch = 3\n", "{job}: unknown key train.batch; did you mean global_batch?"),
        (b"steps = 3\n", "{job}: unknown section steps; did you mean train.steps?"),
        (b"[optimizer]\nlr = 1.0\n", "{job}: unknown section optimizer; did you mean optim?"),
        (b"[data]\ntext_field = 'a'\njsonl_field = 'b'\n", "{job}: unknown key data.jsonl_field; known are url"),
        (b"[train]\nsteps = '3 days'\n", "{job}: train.steps = '3 days': it must be a valid integer"),
        (b"train = 3\n", "{job}: train = 3: "),
        (b"[train\n", "{job} is not a TOML file: "),
        (b"\xff", "{job} is not a TOML file: 'utf-8' codec"),
    ],
)
def test_mistakes_in_the_file(job: Path, content: bytes, line: str) -> None:
    job.write_bytes(content)
    with pytest.raises(UserError) as caught:
        config.load(job, environ={})
    assert str(caught.value).startswith(line.replace("{job}", str(job)))
    assert "\n" not in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        config.load(tmp_path / "none.toml", environ={})
    with pytest.raises(UserError, match=r"cannot read job file .*: Is a directory"):
        config.load(tmp_path, environ={})


def test_a_value_where_a_section_should_be(job: Path) -> None:
    job.write_text("train = 3\n")
    with pytest.raises(UserError, match=r"train = 3 is a value; it must be a section, \[train\]"):
        config.load(job, sets=["train.steps=3"], environ={})


def test_mesh_spec(job: Path) -> None:
    sets = ["mesh.memory_gib=1.5", "mesh.expert=2", "mesh.max_idle=1", "train.dtype=bfloat16", "train.exact=false"]
    loaded = config.load(job, sets=sets, environ={})
    spec = config.mesh_spec(loaded)
    assert (spec.num_experts, spec.global_batch, spec.expert, spec.max_idle) == (8, 16, 2, 1)
    assert spec.memory_cap_bytes == 3 << 29
    assert spec.activation_bytes == 2
    assert spec.expert_params == loaded.model.num_expert_params > 0
    assert spec.dense_params == loaded.model.num_dense_params > 0
    assert spec.max_micro_batch is None
    assert config.mesh_spec(config.load(job, sets=["train.exact=true"], environ={})).max_micro_batch == 1
