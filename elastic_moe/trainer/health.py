"""Numbers that are not finite: whether a step may change the model, and whether a state may be gone on from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def why_to_skip(loss: float, grad_norm: float) -> str:
    """What is wrong with a step, "" if nothing is: one infinite gradient in an update ruins the model for good.

    Loss and norm are those of all ranks together, so all of them get the same answer. What is wrong with a term of the
    objective that is no part of the loss (balance, z-loss) shows in the gradient.
    """
    wrong = [f"the loss is {loss}"] if not math.isfinite(loss) else []
    if not math.isfinite(grad_norm):
        wrong.append(f"the gradient's norm is {grad_norm}")
    return " and ".join(wrong)


def first_not_finite(state: Mapping[str, Any]) -> str:
    """The first tensor of this rank's part of a nested state that holds a NaN or an infinity; "" if none does.

    Reads all of it once, without a copy.
    """
    found = [(name, local) for name, tensor in _tensors(state) if (local := _local(tensor)).numel()]
    by_device: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for name, local in found:
        # both ends are NaN if one element is
        by_device.setdefault(local.device, []).append((name, torch.stack(torch.aminmax(local)).float()))
    for named in by_device.values():
        finite = torch.stack([ends for _, ends in named]).isfinite().all(dim=1)  # one look at the device for all
        if bad := [name for (name, _), good in zip(named, finite.tolist(), strict=True) if not good]:
            return bad[0]
    return ""


def _tensors(state: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Tensor]]:
    for key, value in state.items():
        if isinstance(value, Mapping):
            yield from _tensors(value, f"{path}{key}.")
        elif isinstance(value, Tensor) and value.is_floating_point():
            yield f"{path}{key}", value


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def go_back_to(healthy_steps: Iterable[int], step: int, in_row: int) -> tuple[int, int]:
    """A run's newest healthy checkpoint, and the one to go back to; -1 where there is none.

    They differ where the newest is of the very state that fails: the last `in_row` of `step` steps were skipped, so
    nothing has changed the model since.
    """
    known = sorted(set(healthy_steps), reverse=True)
    newest = known[0] if known else -1
    older = [one for one in known if not (in_row and one >= step - in_row)]
    return newest, older[0] if older else newest
