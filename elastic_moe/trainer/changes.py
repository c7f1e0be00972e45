"""What a job may train with from a resume on, other than its checkpoint was trained with: a line for each. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from elastic_moe.model.config import TRAINING_FIELDS, ModelConfig
from elastic_moe.trainer.config import OptimConfig

if TYPE_CHECKING:
    from elastic_moe.config import JobConfig
    from elastic_moe.trainer.state import DataState

MAY_CHANGE = TRAINING_FIELDS - {"balance"}
"""Fields of the model that say how it is trained, and nothing of its state."""
_INIT_FROM = "train.init_from"
_TOLD = {
    "optim": tuple(OptimConfig.model_fields),
    "train": ("steps", "dtype", "exact", "compile", "expert_replicas", "init_from"),
}


def settings_of(job: JobConfig) -> str:
    """What decides about the numbers beside model and data, as JSON that a checkpoint holds."""
    given = {section: getattr(job, section) for section in _TOLD}
    return json.dumps(
        {f"{section}.{name}": getattr(given[section], name) for section, names in _TOLD.items() for name in names}
    )


def whole_model(saved: DataState) -> dict[str, Any]:
    """The model's fields that a checkpoint was trained with, those among them of which it did not know yet."""
    return {name: info.default for name, info in ModelConfig.model_fields.items()} | dict(saved.model)


def meant(model: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a model with what those stand for that are none: written out, they are no other model."""
    stands_for = {
        "head_dim": model["dim"] // model["num_heads"],
        "norm_topk": model["top_k"] > 1,
        "top_groups": model["num_groups"],
    }
    return {name: stands_for.get(name) if value is None else value for name, value in model.items()}


def changes(saved: DataState, now: DataState) -> list[str]:
    """What has changed that may; nothing of what the checkpoint does not say."""
    before, after = _settings(saved), _settings(now)
    return [_line(name, before[name], after[name]) for name in after if name in before and before[name] != after[name]]


def _settings(state: DataState) -> dict[str, Any]:
    model = whole_model(state) if state.model else {}
    of_model = {f"model.{name}": model[name] for name in sorted(MAY_CHANGE) if name in model}
    others: dict[str, Any] = json.loads(state.settings or "{}")
    return of_model | others


def _line(name: str, before: Any, after: Any) -> str:
    if name == _INIT_FROM:
        began = "random weights" if before is None else f"those in {before}"
        return f"{name} is {in_words(after)} and is not read: the checkpoint's weights go on, which began as {began}"
    return f"{name} is {in_words(after)} from here on; the checkpoint was trained with {in_words(before)}"


def in_words(value: Any) -> str:
    """A value as a job file has it, but for text."""
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)
