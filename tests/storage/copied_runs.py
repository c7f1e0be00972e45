"""Runs to copy, of several objects a step, and `ckpt push` and `pull` on them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from elastic_moe.cli.main import main
from storage import Checkpointer, open_store
from storage.saving import writing

COPIED = ("manifest.json", ".metadata", ".distcp")


def make_state(number: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(number)
    parts = {f"part{index}": torch.randn(300, 1000, generator=generator) for index in range(3)}
    return {**parts, "large": torch.randn(3000, 1000, generator=generator), "bias": torch.randn(7), "n": number}


def save(url: str, *steps: int) -> None:
    with pytest.MonkeyPatch.context() as patch, Checkpointer(url, keep=9) as ckpt:
        patch.setattr(writing, "OBJECT_SIZE_BYTES", 2 << 20)
        for step in steps:
            ckpt.save(step, make_state(step), wait=True)
            assert ckpt.wait()


def contents(url: str) -> dict[str, bytes]:
    """All that is copied of a run, by name."""
    store = open_store(url)
    return {info.key: store.read(info.key) for info in store.list("") if info.key.endswith(COPIED)}


def run(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["ckpt", *argv, "--json", "--quiet"]) == code
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result
