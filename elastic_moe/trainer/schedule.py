"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from elastic_moe.trainer.config import OptimConfig


def learning_rate(step: int, horizon: int, optim: OptimConfig) -> float:
    """The rate of the step that follows `step` completed ones.

    Grows linearly over the warm-up, then falls to `lr * lr_min_ratio` at step `horizon`, and stays: along half a
    cosine, or, with "wsd", linearly over the last part of the steps and not before.
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    begin = decay_begin(horizon, optim)
    done = min(1.0, max(0, step - begin) / max(1, horizon - 1 - begin))
    low = optim.lr * optim.lr_min_ratio
    left = 1 - done if optim.schedule == "wsd" else (1 + math.cos(math.pi * done)) / 2
    return low + (optim.lr - low) * left


def decay_begin(horizon: int, optim: OptimConfig) -> int:
    """The step from which on the rate falls."""
    if optim.schedule == "wsd":
        return max(optim.warmup_steps, horizon - 1 - max(1, round(optim.wsd_decay * horizon)))
    return optim.warmup_steps


def may_move(step: int, before: int, after: int, optim: OptimConfig) -> bool:
    """Whether a run at `step` may go on with another horizon and no rate so far would have been another."""
    return step <= min(decay_begin(before, optim), decay_begin(after, optim))
