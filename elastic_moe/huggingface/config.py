"""Mixtral's `config.json` and our `ModelConfig`: each key is used, is known to change nothing here, or is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError

from elastic_moe.errors import UserError
from elastic_moe.model.config import ModelConfig

_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "rms_norm_eps": "norm_eps",
    "intermediate_size": "expert_dim",
    "num_local_experts": "num_experts",
    "num_experts_per_tok": "top_k",
    "initializer_range": "init_std",
}
_DEFAULTS = {"num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5}
"""What `transformers` takes for keys of `MixtralConfig` that a file leaves out, where ours would be another."""
_THETA = 1e6

_REQUIRED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model_type": (lambda value: value == "mixtral", "only mixtral is read"),
    "hidden_act": (lambda value: value == "silu", "experts here are SwiGLU, with silu"),
    "sliding_window": (lambda value: value is None, "attention here sees all positions before a token"),
    "tie_word_embeddings": (lambda value: not value, "embedding and head are two matrices here"),
    "attention_bias": (lambda value: not value, "projections here have no bias"),
    "mlp_bias": (lambda value: not value, "experts here have no bias"),
    "attention_dropout": (lambda value: not value, "there is no dropout here"),
    "router_jitter_noise": (lambda value: not value, "the router here adds no noise"),
    "rope_scaling": (lambda value: value is None, "rotary positions are not scaled here"),
    "quantization_config": (lambda value: value is None, "quantized weights are not read"),
    "partial_rotary_factor": (lambda value: value in (None, 1.0), "the whole of a head is rotated here"),
}
_WITHOUT_EFFECT = frozenset(
    {
        *("_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings", "use_cache", "return_dict"),
        *("output_attentions", "output_hidden_states", "output_router_logits", "router_aux_loss_coef"),
        "pretraining_tp",
    }
)


def model_config(theirs: Mapping[str, Any], origin: str) -> ModelConfig:
    """The model that a `config.json` describes.

    Args:
        theirs: the file's keys.
        origin: the file, for errors.

    Raises:
        UserError: it is not Mixtral, or a key would change what the model computes in a way that is not known here.
    """
    if "model_type" not in theirs:
        raise UserError(f"{origin}: there is no model_type; only mixtral is read")
    for key, value in theirs.items():
        if key in _REQUIRED:
            fits, why = _REQUIRED[key]
            if not fits(value):
                raise UserError(f"{origin}: {key} is {value!r}: {why}")
        elif key not in _FIELDS and key not in _WITHOUT_EFFECT and key not in ("rope_theta", "rope_parameters"):
            raise UserError(f"{origin}: {key} is {value!r}, and it is not known here what that changes")
    given = {ours: theirs.get(key, _DEFAULTS.get(key)) for key, ours in _FIELDS.items()}
    fields = {name: value for name, value in given.items() if value is not None}
    try:
        return ModelConfig.model_validate({**fields, "rope_theta": _rope_theta(theirs, origin)})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{origin}: {name + ': ' if name else ''}{first['msg'].removeprefix('Value error, ')}"
        ) from None


def _rope_theta(theirs: Mapping[str, Any], origin: str) -> float:
    """Base of the rotary embedding: `transformers` 5 keeps it with what scales the positions."""
    parameters = theirs.get("rope_parameters") or {}
    if not isinstance(parameters, Mapping):
        raise UserError(f"{origin}: rope_parameters is {parameters!r}, not an object")
    for key, value in parameters.items():
        if key == "rope_theta" or (key == "rope_type" and value == "default"):
            continue
        if key == "partial_rotary_factor" and value in (None, 1.0):
            continue
        raise UserError(f"{origin}: rope_parameters.{key} is {value!r}: rotary positions are not scaled here")
    theta = parameters.get("rope_theta", theirs.get("rope_theta"))
    return _THETA if theta is None else float(theta)


def mixtral_config(ours: ModelConfig, *, num_positions: int, dtype: str) -> dict[str, Any]:
    """The `config.json` of a model of ours.

    Args:
        num_positions: `max_position_embeddings`; nothing here depends on it.
        dtype: of the weights, as torch names it.

    Raises:
        UserError: Mixtral has no such model.
    """
    lacks = {
        f"model.shared_expert_dim = {ours.shared_expert_dim}": ours.shared_expert_dim > 0,
        f"model.score = {ours.score!r}": ours.score != "softmax",
        f"model.norm_topk = {str(ours.normalizes).lower()} (model.top_k = {ours.top_k})": not ours.normalizes,
        f"model.route_scale = {ours.route_scale:g}": ours.route_scale != 1.0,
        f"model.balance = {ours.balance!r}, whose biases choose experts,": ours.balance == "bias",
    }
    if missing := [name for name, is_set in lacks.items() if is_set]:
        raise UserError(f"a Mixtral has nothing for {missing[0]}: this model cannot be exported as one")
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        **{key: getattr(ours, name) for key, name in _FIELDS.items()},
        "head_dim": ours.head_width,
        "hidden_act": "silu",
        "max_position_embeddings": num_positions,
        "rope_theta": ours.rope_theta,  # as transformers 4 reads it
        "rope_parameters": {"rope_theta": ours.rope_theta, "rope_type": "default"},
        "sliding_window": None,
        "tie_word_embeddings": False,
        "attention_dropout": 0.0,
        "torch_dtype": dtype,
        "bos_token_id": None,
        "eos_token_id": None,
    }
