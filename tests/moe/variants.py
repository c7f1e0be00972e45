"""All of tests/moe with other layers: `MOE_VARIANT=recompute pytest tests/moe`, or `compile`, or both with a comma.

`python -m tests.moe` (`make test-variants`) runs them one after another.

Whatever decoder is built in a process of such a run, by whomever, computes as `train.recompute` and `train.compile`
would have it; `MOE_BACKEND` is what torch.compile hands its graphs to: inductor if it is not given, which needs a C++
compiler, or `aot_eager`, which needs none. Layers of exact mode are not compiled: a job may not have both. A test that
has nothing to say of a variant is skipped with its reason, and none runs by itself as if it were not compiled: where
no graph is run, whatever torch thinks of it, it fails. `MOE_TALLY` is a file that gets a character for each layer that
was computed, see `Tally`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from elastic_moe.model.compiled import Compiling
from elastic_moe.model.config import ModelConfig
from elastic_moe.model.decoder import Block, Decoder

VARIANT = os.environ.get("MOE_VARIANT", "")
BACKEND = os.environ.get("MOE_BACKEND", "inductor")
KNOWN = ("compile", "recompute")

NOT_WITH = {
    "recompute": {
        "test_recomputed_layers_change_no_bit": "compares layers that are computed again with those that are not",
        "test_live_memory": "compares with what the planner says of the job, which knows of no variant",
    },
    "compile": {
        "test_compiled_layers_train_as_others_do": "compares layers that are compiled with those that are not",
        "test_where_nothing_can_be_compiled_layers_run_as_they_are": "compares the same",
    },
}
"""Why a test has nothing to say of a variant, by the variant and the test's name."""


class Tally(StrEnum):
    """How a layer was computed: what the file `MOE_TALLY` has a character for."""

    COMPILED = "c"
    EXACT = "e"  # not compiled, as exact mode has it
    AGAIN = "a"  # for the backward pass


def _tally(kind: Tally) -> None:
    """Add to the file, by one write: of processes that are killed at any time, each counts."""
    if path := os.environ.get("MOE_TALLY"):
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(fd, kind.encode())
        os.close(fd)


def apply(variant: str = VARIANT, backend: str = BACKEND) -> None:
    """Have this process build all its decoders so, once and for good."""
    if unknown := set(filter(None, variant.split(","))) - set(KNOWN):
        raise ValueError(f"MOE_VARIANT = {variant}: {', '.join(unknown)} is none of {', '.join(KNOWN)}")
    if "recompute" in variant:
        _compute_all_again()
    if "compile" in variant:
        _compile_all(backend)


def _compute_all_again() -> None:
    # A field of the class, so that the trainer cannot switch it off.
    Decoder.recompute = property(lambda model: True, lambda model, value: None)  # type: ignore[assignment]
    forward = Block.forward

    def counted(block: Block, *args: Any) -> Any:
        if torch._C._current_graph_task_id() >= 0:  # within a backward pass
            _tally(Tally.AGAIN)
        return forward(block, *args)

    Block.forward = counted  # type: ignore[method-assign]


class Graphs:
    """A backend of torch.compile that counts how many graphs it has made, and how often one of them was run."""

    def __init__(self, backend: str) -> None:
        self._backend = torch._dynamo.lookup_backend(backend)
        self.num_made = self.num_runs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        run = self._backend(graph, inputs)
        self.num_made += 1

        def counted(*args: Any) -> Any:
            self.num_runs += 1
            return run(*args)

        return counted


def _compile_all(backend: str) -> None:
    from torch._dynamo import config

    # By default torch runs as it is what it has compiled eight times, and these tests have more shapes than that.
    config.recompile_limit, config.accumulated_recompile_limit = 1000, 10_000
    build, graphs = Block.__init__, Graphs(backend)
    compiling = Compiling(graphs)

    def build_compiled(block: Block, model: ModelConfig) -> None:
        build(block, model)
        eager = block._attend
        compiled = compiling(eager)

        def attend(x_BSD: Tensor, mask_B1SS: Tensor | None) -> Tensor:
            if block.moe.experts.exact:
                _tally(Tally.EXACT)
                return eager(x_BSD, mask_B1SS)
            num_runs = graphs.num_runs
            out_BSD = compiled(x_BSD, mask_B1SS)
            assert graphs.num_runs == num_runs + 1, "torch has run as it is what it was to compile"
            _tally(Tally.COMPILED)
            return out_BSD

        block._attend = attend

    Block.__init__ = build_compiled  # type: ignore[method-assign]


def environment(variant: str = VARIANT) -> dict[str, str]:
    """The variant for commands, which read it as a part of their job."""
    return {f"ELASTIC_MOE__TRAIN__{name.upper()}": "true" for name in KNOWN if name in variant}


def mark(items: list[pytest.Item]) -> None:
    """Skip what has nothing to say of this run's variant."""
    here = Path(__file__).parent
    for item in items:
        if "compile" in VARIANT:  # torch's compiler looks at it of each tensor that it is given
            item.add_marker(pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"))
        for variant, reasons in NOT_WITH.items():
            name: Any = getattr(item, "originalname", item.name)
            if variant in VARIANT and here in item.path.parents and name in reasons:
                item.add_marker(pytest.mark.skip(reason=f"{variant}: {reasons[name]}"))


apply()
