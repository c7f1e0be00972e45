"""Accelerators that a test makes up, in place of this machine's."""

from __future__ import annotations

import pytest
import torch

BACKENDS = [
    ("cpu:gloo", 0, "cpu"),  # what init_process_group() makes of no backend without an accelerator
    ("cpu:gloo", 2, "cpu"),
    ("cpu:gloo,cuda:gloo", 2, "cpu"),
    ("cuda:nccl,cpu:gloo", 2, "cpu"),
    ("cpu:gloo,cuda:nccl", 2, "cpu"),
    ("cuda:nccl", 2, "cuda"),
    ("xpu:xccl", 2, "xpu"),
    ("cuda:nccl", 0, "cpu"),  # nothing works then; torch says so best itself
]
"""What a group's backends are told as, how many accelerators are there, and where its collectives' tensors lie."""


class Accelerators:
    """As many as a test wants, in place of this machine's; none of them can be used."""

    def __init__(self, patch: pytest.MonkeyPatch, num: int, current: int = 0) -> None:
        self.current = current
        patch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda"))
        patch.setattr(torch.accelerator, "is_available", lambda: num > 0)
        patch.setattr(torch.accelerator, "device_count", lambda: num)
        patch.setattr(torch.accelerator, "current_device_index", lambda: self._of(num).current)
        patch.setattr(torch.accelerator, "set_device_index", self._set)

    def _of(self, num: int) -> Accelerators:
        assert num, "none is touched where there is none"
        return self

    def _set(self, index: int) -> None:
        self.current = index
