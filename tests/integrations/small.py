"""What the scripts of these tests share: a job that is small, slow until it is told to hurry, and leaves a trace."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

STEP_S = 0.05


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Inputs and what is to be made of them, by number; read slowly until FOLDER/hurry exists."""

    def __init__(self, folder: Path | None = None, num_rows: int = 4096) -> None:
        self._folder, self._num_rows = folder, num_rows

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if self._folder is not None and not (self._folder / "hurry").exists():
            time.sleep(STEP_S / 2)  # two rows a step
        x = torch.randn(8, generator=torch.Generator().manual_seed(index))
        return {"x": x, "labels": x.sum()[None]}


class Net(torch.nn.Module):
    """Two layers with dropout, so that random state matters; answers as `transformers.Trainer` wants it."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Dropout(dropout), torch.nn.Linear(16, 1))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": torch.nn.functional.mse_loss(self.body(x), labels)}


def build(dropout: float = 0.1) -> Net:
    """The same on every rank and at every start."""
    torch.manual_seed(0)
    return Net(dropout)


def note(folder: Path, name: str, **fields: Any) -> None:
    """A line in FOLDER/NAME.jsonl, with who says it."""
    who = {"rank": int(os.environ.get("RANK", "0")), "world_size": int(os.environ.get("WORLD_SIZE", "1"))}
    with (folder / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps({**who, **fields}) + "\n")


def updates(optimizer: torch.optim.Optimizer) -> int:
    """How many steps an Adam has seen."""
    return int(next(iter(optimizer.state.values()))["step"])
