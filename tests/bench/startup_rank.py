"""One rank of `python -m tests.bench.startup`: the trainer as it is, with a clock at its stages."""

from __future__ import annotations

import time

BEGAN_S = time.perf_counter()

import functools  # noqa: E402 - what is imported from here on is a stage
import json  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable  # noqa: E402
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


def main() -> None:
    """Train the job whose JSON is the argument, and print the stages' seconds and when the first step was done."""
    imports_s = time.perf_counter() - BEGAN_S
    stages: dict[str, list[float]] = {}
    for owner, name in (
        (run, "build_mesh"),
        (run, "set_up"),
        (run, "restore"),
        (run, "first_weights"),
        (Stepper, "step"),
    ):
        setattr(owner, name, timed(getattr(owner, name), stages.setdefault(name, [])))
    ready_s = []
    step = Stepper.step

    def noting(*args: Any) -> Any:
        result = step(*args)
        ready_s.append(time.perf_counter() - BEGAN_S - imports_s)
        return result

    Stepper.step = noting  # type: ignore[method-assign]
    run.train(JobConfig.model_validate_json(sys.argv[1]))
    sys.stdout.write(json.dumps({"imports_s": imports_s, "until_first_step_s": ready_s[0], **stages}) + "\n")


if __name__ == "__main__":
    main()
