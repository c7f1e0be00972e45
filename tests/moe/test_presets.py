"""Presets: known shapes by name, which explicit fields win over."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from elastic_moe.cli.plan import mixtral
from elastic_moe.config import load
from elastic_moe.errors import UserError
from elastic_moe.machine import MachineSpeed
from elastic_moe.model import ModelConfig
from elastic_moe.model.decoder import Decoder
from elastic_moe.model.presets import PRESETS

BILLIONS = {"tiny": 0.0034, "small": 0.107, "mixtral-8x7b": 46.7, "dbrx-132b": 131.6, "deepseek-like": 16.3}


def load_text(tmp_path: Path, text: str, *sets: str, **environ: str) -> ModelConfig:
    path = tmp_path / "job.toml"
    path.write_text(text)
    return load(path, sets=sets, environ=environ).model


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_model_of_its_size(name: str) -> None:
    config = ModelConfig.model_validate({"preset": name})
    with torch.device("meta"):
        model = Decoder(config)
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    total = sum(p.numel() for p in model.parameters())
    assert config.num_expert_params == experts
    assert config.num_dense_params == total - experts
    assert total / 1e9 == pytest.approx(BILLIONS[name], rel=0.02)


def test_the_defaults_are_tiny() -> None:
    assert ModelConfig.model_validate({"preset": "tiny"}) == ModelConfig()


def test_fields_win_over_the_preset_wherever_they_stand(tmp_path: Path) -> None:
    text = '[model]\npreset = "mixtral-8x7b"\nnum_layers = 3\n'
    assert load_text(tmp_path, text).num_layers == 3
    assert load_text(tmp_path, text).dim == 4096
    assert load_text(tmp_path, text, "model.num_layers=5").num_layers == 5
    assert load_text(tmp_path, text, ELASTIC_MOE__MODEL__NUM_LAYERS="4").num_layers == 4
    # A preset from the command line is no field: what the file says of the model stays.
    smaller = load_text(tmp_path, text, "model.preset=small")
    assert (smaller.num_layers, smaller.dim) == (3, 512)


def test_a_model_does_not_depend_on_how_it_is_written(tmp_path: Path) -> None:
    """A resume compares fields; that they came from a preset is no difference."""
    named = load_text(tmp_path, '[model]\npreset = "small"\n')
    assert named.preset is None
    assert ModelConfig.model_validate(named.model_dump()) == named
    assert ModelConfig.model_validate({name: getattr(named, name) for name in PRESETS["small"]}) == named


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('preset = "mixtral"', "model.preset = 'mixtral': it must be 'tiny', 'small', 'mixtral-8x7b'"),
        ("preset = 7", "model.preset = 7: it must be 'tiny'"),
        ("preset = ['tiny']", r"model.preset = ['tiny']: it must be 'tiny'"),
        ('preset = "small"\nnum_heads = 7', "num_heads = 7 is not a multiple of num_kv_heads = 4"),
    ],
)
def test_a_wrong_preset_is_told_in_one_line(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(UserError) as caught:
        load_text(tmp_path, f"[model]\n{text}\n")
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_the_planner_knows_mixtral_without_a_job() -> None:
    """Its published sizes, which are written down in the preset alone."""
    spec = mixtral()
    assert (spec.dense_params, spec.expert_params) == (1_605_636_096, 45_097_156_608)
    assert (spec.num_layers, spec.num_experts, spec.top_k) == (32, 8, 2)
    assert (spec.model_dim, spec.ffn_dim, spec.query_dim, spec.key_dim) == (4096, 14_336, 4096, 1024)
    assert (spec.global_batch, spec.tokens_per_sample, spec.vocab_size) == (1024, 4096, 32_000)
    assert (spec.recompute, spec.activation_bytes, spec.memory_cap_bytes) == (True, 2, 141 << 30)
    machine = MachineSpeed().model_dump()  # described for jobs and for the planner, whose defaults are the same
    assert {name: getattr(spec, name) for name in machine} == machine
