"""Mixtral's `config.json` and our `ModelConfig`: each key is used, is known to change nothing here, or is refused.

So is that of a dense Llama or Mistral, whose layers can become experts: sparse upcycling (arXiv:2212.05055).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from pydantic import ValidationError

from elastic_moe.errors import UserError
from elastic_moe.model.config import ModelConfig


class Upcycling(NamedTuple):
    """What becomes of each feed-forward network of a dense model: so many experts, copies that begin alike."""

    num_experts: int
    top_k: int


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
_SIZES = {"vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
_DEFAULTS = _SIZES | {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-5,
}
"""What `transformers` takes for keys of `MixtralConfig` that a file leaves out, where ours would be another."""
_THETA = 1e6
_OF_EXPERTS = ("num_local_experts", "num_experts_per_tok")
_DENSE: dict[str, dict[str, Any]] = {
    "llama": _SIZES | {"rms_norm_eps": 1e-6, "intermediate_size": 11008},
    "mistral": _SIZES
    | {"rms_norm_eps": 1e-6, "intermediate_size": 14336, "num_key_value_heads": 8, "sliding_window": 4096},
}
"""The same of `LlamaConfig` and `MistralConfig`; the former has as many key heads as query heads."""
_DENSE_THETA = 1e4

_REQUIRED: dict[str, tuple[Callable[[Any], bool], str]] = {
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


def is_dense(theirs: Mapping[str, Any]) -> bool:
    """Whether a `config.json` describes a model without experts that can be given some."""
    return str(theirs.get("model_type")) in _DENSE


def is_tied(theirs: Mapping[str, Any]) -> bool:
    """Whether a dense model's embedding is its head too."""
    return is_dense(theirs) and bool(theirs.get("tie_word_embeddings", False))


def model_config(theirs: Mapping[str, Any], origin: str, upcycling: Upcycling | None = None) -> ModelConfig:
    """The model that a `config.json` describes.

    Args:
        theirs: the file's keys.
        origin: the file, for errors.
        upcycling: what becomes of a dense model's layers; none refuses such models.

    Raises:
        UserError: it is no Mixtral, nor a dense model to upcycle, or a key would change what the model computes in a
            way that is not known here.
    """
    kind = theirs.get("model_type")
    if kind != "mixtral" and not is_dense(theirs):
        told = "there is no model_type" if kind is None else f"model_type is {kind!r}"
        raise UserError(f"{origin}: {told}; mixtral is read, and {' and '.join(sorted(_DENSE))} to upcycle")
    if not is_dense(theirs):
        _check_keys(theirs, origin)
        given = {ours: theirs.get(key, _DEFAULTS.get(key)) for key, ours in _FIELDS.items()}
        if given["num_kv_heads"] is None:
            given["num_kv_heads"] = given["num_heads"]
        found = _validated(given | {"rope_theta": _rope_theta(theirs, origin, _THETA)}, origin)
        if not found.normalizes:
            raise UserError(
                f"{origin}: num_experts_per_tok is {found.top_k}: a Mixtral gives one expert the weight 1, and "
                "from that a router learns nothing here"
            )
        return found
    if upcycling is None:
        raise UserError(f"{origin}: a {kind} has no experts: import it with --upcycle-experts")
    whole = _DENSE[str(kind)] | dict(theirs)
    _check_keys({key: value for key, value in whole.items() if key != "tie_word_embeddings"}, origin)
    if upcycling.top_k < 2:
        raise UserError(
            "a model that is upcycled begins as the dense one only where the weights of a token's experts add up to 1: "
            f"with top_k {upcycling.top_k} they do not, it must be 2 or more"
        )
    given = {ours: whole.get(key) for key, ours in _FIELDS.items() if key not in _OF_EXPERTS}
    if given["num_kv_heads"] is None:
        given["num_kv_heads"] = given["num_heads"]
    return _validated(given | upcycling._asdict() | {"rope_theta": _rope_theta(theirs, origin, _DENSE_THETA)}, origin)


def _check_keys(theirs: Mapping[str, Any], origin: str) -> None:
    known = {*_FIELDS, *_WITHOUT_EFFECT, "model_type", "rope_theta", "rope_parameters"}
    if is_dense(theirs):
        known -= set(_OF_EXPERTS)
    for key, value in theirs.items():
        if key in _REQUIRED:
            fits, why = _REQUIRED[key]
            if not fits(value):
                raise UserError(f"{origin}: {key} is {value!r}: {why}")
        elif key not in known:
            raise UserError(f"{origin}: {key} is {value!r}, and it is not known here what that changes")


def _validated(given: Mapping[str, Any], origin: str) -> ModelConfig:
    try:
        return ModelConfig.model_validate({name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        ours = str(first["loc"][0]) if first["loc"] else ""
        name = next((key for key, field in _FIELDS.items() if field == ours), ours)
        told = f"{name} is {first['input']!r}: " if name else ""
        raise UserError(f"{origin}: {told}{first['msg'].removeprefix('Value error, ')}") from None


def _rope_theta(theirs: Mapping[str, Any], origin: str, default: float) -> float:
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
    told = [found["rope_theta"] for found in (parameters, theirs) if found.get("rope_theta") is not None]
    theta = told[0] if told else None
    if told and theta != told[-1]:
        raise UserError(f"{origin}: rope_theta is {told[-1]!r}, and rope_parameters.rope_theta {theta!r}: which is it?")
    if theta is not None and (isinstance(theta, bool) or not isinstance(theta, (int, float))):
        raise UserError(f"{origin}: rope_theta is {theta!r}, not a number")
    return default if theta is None else float(theta)


def end_of_text(theirs: Mapping[str, Any]) -> int | None:
    """The token that a `config.json` says texts end with, the first where there are several; None if it says none."""
    told = theirs.get("eos_token_id")
    first = told[0] if isinstance(told, list) and told else told
    return first if isinstance(first, int) and not isinstance(first, bool) and first >= 0 else None


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
        f"model.balance = {ours.balance!r}, whose biases choose experts,": ours.moves_bias,
        f"model.top_groups = {ours.top_groups}": ours.limits_groups,
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
