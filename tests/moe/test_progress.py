"""How far a training is: what the line says, how a terminal shows it, and what a device could do."""

from __future__ import annotations

import io
import logging
import math
import os

import pytest
import torch

from elastic_moe.model import ModelConfig
from elastic_moe.trainer import throughput
from elastic_moe.trainer.progress import LiveLine, Pace, Progress, duration, wants_line
from elastic_moe.trainer.throughput import flops_per_token, known_peak, peak_flops

SEEN = Progress(
    step=40,
    steps=100,
    loss=2.34567,
    val_loss=None,
    grad_norm=0.5,
    tokens_per_s=12345.6,
    utilisation=0.4123,
    mesh=(2, 1, 4),
    generation=3,
    left_s=245.0,
)


def test_a_line_says_all_that_is_known() -> None:
    assert str(SEEN) == (
        "step 40/100  loss 2.3457  grad norm 0.500  12,346 tokens/s  MFU 41.2%  mesh 2x1x4  generation 3  4:05 left"
    )
    bare = Progress(100, 100, math.nan, 2.5, math.inf, None, None, (1, 1, 1), 0, None)
    assert str(bare) == "step 100/100  loss nan  validation 2.5000  grad norm inf  mesh 1x1x1"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (59.4, "59 s"), (245, "4:05"), (3600, "1:00:00"), (183600, "2 d 03:00")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_pace_is_that_of_the_last_steps_with_what_lies_between() -> None:
    pace = Pace()
    assert pace.steps_per_s is None
    pace.saw(1, 100.0)
    assert pace.steps_per_s is None
    pace.saw(2, 102.0)
    assert pace.steps_per_s == pytest.approx(0.5)
    for step in range(3, 200):
        pace.saw(step, 102.0 + (step - 2) * 0.1)
    assert pace.steps_per_s == pytest.approx(10.0)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def seen(text: str) -> list[str]:
    """The lines that a terminal shows in the end."""
    return [line.rpartition("\x1b[2K")[2].rpartition("\r")[2] for line in text.split("\n")]


def test_a_line_is_drawn_anew_and_what_is_logged_goes_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "12")
    terminal = Terminal()
    handler = logging.StreamHandler(terminal)
    logger = logging.getLogger()
    logger.addHandler(handler)
    try:
        with LiveLine(terminal) as line:
            line.show("step 1", 0.0)
            line.show("step 2", 0.01)  # a moment later: not drawn
            assert "step 2" not in terminal.getvalue()
            logger.warning("a peer is slow")
            line.show("step 3 of very many", 0.02)
            assert terminal.getvalue().endswith("\r\x1b[2Kstep 3 of v")
        assert handler.filters == []
    finally:
        logger.removeHandler(handler)
    assert seen(terminal.getvalue()) == ["a peer is slow", "step 3 of v", ""]


def test_a_line_that_showed_nothing_leaves_nothing() -> None:
    terminal = Terminal()
    with LiveLine(terminal):
        pass
    assert terminal.getvalue() == ""


class GoneTerminal(Terminal):
    def write(self, text: str) -> int:
        raise OSError(5, "Input/output error")


def test_a_terminal_that_goes_away_ends_no_training() -> None:
    with LiveLine(GoneTerminal()) as line:
        line.show("step 1", 0.0)


def test_only_terminals_get_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    assert wants_line(Terminal())
    assert not wants_line(io.StringIO())
    monkeypatch.setenv("TERM", "dumb")
    assert not wants_line(Terminal())
    assert os.environ["TERM"] == "dumb"


def test_operations_of_a_token_are_those_of_the_model() -> None:
    """Against two for each parameter that a token meets, thrice, and the attention's scores."""
    model = ModelConfig(num_experts=8, top_k=2, shared_expert_dim=32)
    active = model.num_dense_params - model.vocab_size * model.dim  # the embedding multiplies nothing
    active -= model.dim * (2 * model.num_layers + 1)  # nor do norms
    active += model.num_expert_params * model.top_k // model.num_experts
    scores = model.num_layers * 2 * 2 * model.dim * (128 + 1) / 2
    assert flops_per_token(model, 128) == pytest.approx(3 * (2 * active + scores))


def test_mixtral_costs_what_its_active_parameters_say() -> None:
    mixtral = ModelConfig(
        vocab_size=32000,
        dim=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        num_experts=8,
        top_k=2,
        expert_dim=14336,
    )
    assert flops_per_token(mixtral, 1) == pytest.approx(6 * 12.9e9, rel=0.02)  # 13 B active, the embedding left out


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", None),  # slower than its name
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", None),
        ("NVIDIA B200", 2.25e15),
        ("NVIDIA GB200", None),  # public figures contradict one another
        ("Some GPU", None),
    ],
)
def test_peaks_by_name(name: str, peak: float | None) -> None:
    assert known_peak(name, torch.bfloat16) == peak


def test_a_cpu_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    throughput._measured.cache_clear()
    first = peak_flops(torch.device("cpu"), torch.float32)
    assert first is not None
    assert first > 1e8
    monkeypatch.setattr(throughput, "product", None)
    assert peak_flops(torch.device("cpu"), torch.float32) == first
    assert peak_flops(torch.device("meta"), torch.float32) is None
