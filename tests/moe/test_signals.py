"""A training without an agent is asked to stop: by a scheduler's SIGTERM, or at the keyboard."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from elastic_moe.errors import Stopped
from elastic_moe.trainer.signals import StopSignals
from tests.cluster import until
from tests.moe import variants
from tests.template import template

DEADLINE_S = 120.0
JOB = """
[model]
dim = 32
num_layers = 1
num_experts = 2
expert_dim = 32
[train]
steps = 100000
global_batch = 2
seq_len = 8
[checkpoint]
url = "checkpoints"
every = 100000
"""


class Training:
    """`elastic-moe train` in a folder, alone or on two ranks that torchrun's environment makes."""

    def __init__(self, folder: Path, world_size: int) -> None:
        self.folder = folder
        (folder / "job.toml").write_text(JOB)
        clean = {name: value for name, value in os.environ.items() if not name.startswith("ELASTIC_MOE_")}
        clean |= variants.environment()
        train = ("train", "job.toml")
        with (folder / "told").open("wb") as told:
            if world_size > 1:
                run = ("--standalone", f"--nproc-per-node={world_size}", "-m", "elastic_moe", *train)
                self.process = template().start("torchrun", run, clean, told.fileno(), cwd=folder)
            else:
                self.process = template().start("elastic-moe", train, clean, told.fileno(), cwd=folder)

    def reach(self, step: int) -> None:
        def is_there() -> bool:
            assert self.process.poll() is None, "the training ended"
            return self.step() >= step

        until(f"step {step}", is_there, DEADLINE_S)

    def step(self) -> int:
        path = self.folder / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1].splitlines()
        return int(json.loads(whole[-1])["step"]) if whole else 0

    def saved(self) -> list[int]:
        return sorted(int(path.name.split("-")[1]) for path in (self.folder / "checkpoints").glob("step-*"))


@pytest.fixture(params=[1, 2], ids=["alone", "two ranks of torchrun"])
def training(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Training]:
    started = Training(tmp_path, request.param)
    yield started
    started.process.kill()
    started.process.wait(DEADLINE_S)


def test_sigterm_saves_and_asks_to_be_started_again(training: Training, request: pytest.FixtureRequest) -> None:
    training.reach(3)
    training.process.send_signal(signal.SIGTERM)
    code = training.process.wait(DEADLINE_S)
    told = (training.folder / "told").read_text()
    assert training.saved() == [training.step()]
    if "alone" in request.node.callspec.id:  # torchrun has an exit code of its own
        assert code == 75
        step = training.step()
        assert f"SIGTERM stopped the training after step {step}, its state is in checkpoints" in told.splitlines()[-1]


def asked_to_stop(*numbers: signal.Signals, has_begun: bool) -> None:
    """The process is sent signals, within a library that catches whatever is an `Exception`."""
    with StopSignals(under_agent=False) as signals:
        if has_begun:
            signals.begin()
        with contextlib.suppress(Exception):
            for number in numbers:
                signal.raise_signal(number)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT interrupts, as it does not where a shell has started the tests in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_before_the_first_step_it_stops_at_once(number: signal.Signals) -> None:
    """There is nothing to save, and data may be read for hours."""
    before = signal.getsignal(number)
    with pytest.raises(Stopped, match=f"{number.name} stopped the training before its first step"):
        asked_to_stop(number, has_begun=False)
    assert signal.getsignal(number) is before
    asked_to_stop(number, has_begun=True)
    with pytest.raises(KeyboardInterrupt):
        asked_to_stop(number, signal.SIGINT, has_begun=True)


class Asked(Exception):
    """What the handler before ours does."""


def test_a_second_signal_does_what_it_would_have_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks twice does not want to wait for a save."""

    def earlier(number: int, frame: object) -> None:
        raise Asked

    before = signal.signal(signal.SIGTERM, earlier)
    try:
        with StopSignals(under_agent=False) as signals:
            signals.begin()
            assert not signals.asked()
            signal.raise_signal(signal.SIGTERM)
            assert signals.asked()
            assert signals.received is signal.SIGTERM
            with pytest.raises(Asked):
                signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is earlier
        with StopSignals(under_agent=True) as signals, pytest.raises(Asked):
            signal.raise_signal(signal.SIGTERM)
        assert not signals.asked()
    finally:
        signal.signal(signal.SIGTERM, before)
