"""A state with something of everything, and what a checkpointer told of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.storage.small_runs import Events


def make_state(number: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(number)
    return {
        "model": {
            "weight": torch.randn(300, 70, generator=generator),
            "bias": torch.randn(7, generator=generator).bfloat16(),
            "scale": torch.randn((), generator=generator),
            "turned": torch.randn(5, 9, generator=generator).t(),
            "empty": torch.empty(0, 4),
        },
        "blocks": [torch.randn(40000, generator=generator), {"count": number}],
        "step": number,
        "names": ["a", str(number)],
        "nothing": None,
    }


def flat(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for key in sorted(value) for leaf in flat(value[key])]
    if isinstance(value, list):
        return [leaf for entry in value for leaf in flat(entry)]
    return [value]


def same(left: Any, right: Any) -> bool:
    return all(
        torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(flat(left), flat(right), strict=True)
    )


def names(events: Events) -> list[str]:
    return [name for name, _ in events[0]]


def every_object(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
