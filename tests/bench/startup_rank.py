"""One rank of `python -m tests.bench.startup`: the trainer as it is, with a clock at its stages."""

from __future__ import annotations

import time

BEGAN_S = time.perf_counter()

import contextlib  # noqa: E402 - what is imported from here on is a stage
import functools  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch._dynamo  # noqa: E402, F401 - FSDP2 does so at its first use; the agent has it imported ahead

from elastic_moe.config import JobConfig  # noqa: E402
from elastic_moe.trainer import run  # noqa: E402
from elastic_moe.trainer.step import Stepper  # noqa: E402


def timed(function: Callable[..., Any], times_s: list[float]) -> Callable[..., Any]:
    """The same function; each call's seconds go to `times_s`."""

    @functools.wraps(function)
    def clocked(*args: Any, **kwargs: Any) -> Any:
        began_s = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            times_s.append(time.perf_counter() - began_s)

    return clocked


def entered(manager: Callable[..., Any], times_s: list[float]) -> Callable[..., Any]:
    """The same context manager; the seconds of entering it go to `times_s`."""

    @contextlib.contextmanager
    def clocked(*args: Any, **kwargs: Any) -> Iterator[Any]:
        began_s = time.perf_counter()
        with manager(*args, **kwargs) as value:
            times_s.append(time.perf_counter() - began_s)
            yield value

    return clocked


IMPORTED_S = 120.0


@contextlib.contextmanager
def all_there(folder: Path) -> Iterator[None]:
    """Begin when every rank has imported: which of them is last says nothing of a start by the agent."""
    mine = folder / f"imported-{os.environ['MASTER_PORT']}-{os.environ['RANK']}"
    mine.touch()
    deadline_s = time.monotonic() + IMPORTED_S
    while len(list(folder.glob(f"imported-{os.environ['MASTER_PORT']}-*"))) < int(os.environ["WORLD_SIZE"]):
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"not every rank has imported within {IMPORTED_S:g} s")
        time.sleep(0.002)
    try:
        yield
    finally:
        mine.unlink()


def main() -> None:
    """Train the job whose JSON is the argument, and print the stages' seconds and when the first step was done."""
    job = JobConfig.model_validate_json(sys.argv[1])
    imports_s = time.perf_counter() - BEGAN_S
    stages: dict[str, list[float]] = {}
    for owner, name, clock in (
        (run, "process_group", entered),
        (run, "build_mesh", timed),
        (run, "set_up", timed),
        (run, "Checkpointer", timed),
        (run, "restore", timed),
        (run, "first_weights", timed),
        (run, "open_teller", entered),
        (Stepper, "step", timed),
    ):
        setattr(owner, name, clock(getattr(owner, name), stages.setdefault(name, [])))
    ready_s = []
    step = Stepper.step

    def noting(*args: Any) -> Any:
        result = step(*args)
        ready_s.append(time.perf_counter())
        return result

    Stepper.step = noting  # type: ignore[method-assign]
    assert job.checkpoint.url is not None
    with all_there(Path(job.checkpoint.url).parent):
        began_s = time.perf_counter()
        run.train(job)
    sys.stdout.write(json.dumps({"imports_s": imports_s, "until_first_step_s": ready_s[0] - began_s, **stages}) + "\n")


if __name__ == "__main__":
    main()
