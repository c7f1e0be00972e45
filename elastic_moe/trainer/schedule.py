"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from elastic_moe.trainer.config import OptimConfig


def learning_rate(step: int, horizon: int, optim: OptimConfig) -> float:
    """The rate of the step that follows `step` completed ones.

    Grows linearly over the warm-up, then falls along half a cosine to `lr * lr_min_ratio` at step `horizon`, and stays.
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    decay_steps = max(1, horizon - 1 - optim.warmup_steps)
    done = min(1.0, (step - optim.warmup_steps) / decay_steps)
    low = optim.lr * optim.lr_min_ratio
    return low + (optim.lr - low) * (1 + math.cos(math.pi * done)) / 2
