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
            ["optim.clip_norm=0"],
            {},
            '--set optim.clip_norm: optim.clip_norm = 0: it must be greater than 0, or "none"',
        ),
        ([f"train.steps={'9' * 5000}"], {}, None),
        ([f"train.steps=0x{'f' * 5000}"], {}, None),
        ([f"train.steps={'[' * 5000}"], {}, None),
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
            "some expert-parallel ranks would never hold an expert, lower it",
        ),
        (
            ["train.steps=0", "train.seed=-1"],
            {},
            "--set train.steps: train.steps = 0: it must be greater than or equal to 1 (and 1 more)",
        ),
    ],
)
def test_mistakes_outside_the_file(job: Path, sets: list[str], environ: dict[str, str], line: str | None) -> None:
    with pytest.raises(UserError) as caught:
        config.load(job, sets=sets, environ=environ)
    if line is None:
        assert len(str(caught.value)) < 300
    else:
        assert str(caught.value) == line.replace("{job}", str(job))


@pytest.mark.parametrize(
    ("sets", "line"),
    [
        (
            "optim.decay_steps=10",
            "optim: decay_steps = 10 is not after warmup_steps = 10, where the rate begins to fall",
        ),
        ("optim.decay_steps=5 optim.schedule=wsd", "optim: decay_steps = 5 is not after warmup_steps = 10"),
        ("optim.decay_steps=11", ""),
        ("train.steps=3", ""),  # a try of a job whose warm-up is longer
        ("optim.lr_min_ratio=1.01", "optim.lr_min_ratio = 1.01: it must be less than or equal to 1"),
        ("model.top_k=9", "model: top_k = 9 is more than num_experts = 8: lower top_k, or raise num_experts"),
        ("model.top_k=8", ""),
        ("model.num_experts=1 model.top_k=1", ""),
        ("model.num_heads=3", "model: num_heads = 3 is not a multiple of num_kv_heads = 2: change one"),
        ("model.num_kv_heads=8", "model: num_heads = 4 is not a multiple of num_kv_heads = 8: change one"),
        ("model.dim=66", "model: dim = 66 is not a multiple of num_heads = 4: set head_dim"),
        ("model.dim=20", "model: head_dim = 5 is odd, and rotary embeddings turn pairs: set an even head_dim"),
        ("model.num_groups=3", "model: num_experts = 8 is not a multiple of num_groups = 3: change one"),
        ("model.num_groups=2 model.top_groups=3", "model: top_groups = 3 is more than num_groups = 2: lower"),
        (
            "model.num_groups=8 model.top_groups=1",
            "model: top_k = 2 is more than the 1 experts of top_groups = 1 groups",
        ),
        (
            "model.num_groups=4 model.top_groups=2 model.balance=quantile",
            'model: balance = "quantile" cannot be had with',
        ),
        ("model.top_k=1 model.norm_topk=true", "model: norm_topk = true with top_k = 1 makes every weight 1"),
        ("mesh.expert=9", "mesh.expert = 9 is more than model.num_experts = 8: some"),
        ("train.expert_replicas=9", "train.expert_replicas = 9 is more than model.num_experts = 8: a rank takes no"),
        ("train.expert_replicas=8", ""),
        (
            "train.exact=true train.dtype=bfloat16",
            'train: exact = true needs dtype = "float32", not "bfloat16": change',
        ),
        ("train.exact=true train.compile=true", "train: exact = true cannot be compiled: set train.compile to false"),
        ("train.exact=true train.expert_replicas=1", "train: exact = true computes an expert's rows on one rank"),
        ("train.exact=true train.max_micro_batch=2", "train: exact = true trains in micro-batches of 1, not max_micro"),
        ("train.validate_every=5", "train.validate_every = 5 has nothing to validate on: set data.validation"),
        ("train.validate_every=500 data.validation=0.1", ""),  # after the last step then
        (
            "data.end_of_document=256 data.format=tokens",
            "data.end_of_document = 256 is no token of model.vocab_size = 256",
        ),
        ("data.end_of_document=255 data.format=tokens", ""),
        ("data.end_of_document=x", "data: end_of_document = 'x' is a token of a tokenizer, and there is none"),
        ("checkpoint.ram_every=50", "checkpoint: ram_every = 50 keeps no state between the checkpoints of every = 50"),
        ("checkpoint.ram_every=100", "checkpoint: ram_every = 100 keeps no state between"),
        ("checkpoint.ram_every=70", ""),
        ("checkpoint.ram_every=5min checkpoint.every=300s", "checkpoint: ram_every = '5min' keeps no state between"),
        ("checkpoint.ram_every=1min checkpoint.every=5min", ""),
        ("checkpoint.ram_every=10min", ""),
        (f"checkpoint.every={'9' * 400}h", "checkpoint.every: every is '999"),
        ("checkpoint.check_replicas=5 mesh.replicate=1", "checkpoint.check_replicas = 5 has nothing to compare with"),
    ],
)
def test_fields_that_contradict_each_other(job: Path, sets: str, line: str) -> None:
    """One line that names both with their values, and what to do; and none where a job may well be so."""
    if not line:
        config.mesh_spec(config.load(job, sets=sets.split(), environ={}))
        return
    with pytest.raises(UserError) as caught:
        config.load(job, sets=sets.split(), environ={})
    told = str(caught.value)
    assert line in told
    assert "\n" not in told


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
