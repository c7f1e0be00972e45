"""All of tests/moe with other layers: `MOE_VARIANT=recompute pytest tests/moe`, or `compile`, or both with a comma.

Whatever decoder is built in a process of such a run, by whomever, computes as `train.recompute` and `train.compile`
would have it; `MOE_BACKEND` is what torch.compile hands its graphs to: inductor if it is not given, which needs a C++
compiler, or `aot_eager`, which needs none. Layers of exact mode are not compiled: a job may not have both. A test that
has nothing to say of a variant is skipped with its reason, and none runs by itself as if it were not compiled: where
torch would give up compiling, it fails.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

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
    },
}
"""Why a test has nothing to say of a variant, by the variant and the test's name."""


def apply(variant: str = VARIANT, backend: str = BACKEND) -> None:
    """Have this process build all its decoders so, once and for good."""
    if unknown := set(filter(None, variant.split(","))) - set(KNOWN):
        raise ValueError(f"MOE_VARIANT = {variant}: {', '.join(unknown)} is none of {', '.join(KNOWN)}")
    if "recompute" in variant:
        # A field of the class, so that the trainer cannot switch it off.
        Decoder.recompute = property(lambda model: True, lambda model, value: None)  # type: ignore[assignment]
    if "compile" in variant:
        _compile_all(backend)


def _compile_all(backend: str) -> None:
    from torch._dynamo import config

    # By default torch runs as it is what it has compiled eight times, and these tests have more shapes than that.
    config.recompile_limit, config.accumulated_recompile_limit = 1000, 10_000
    config.fail_on_recompile_limit_hit = True
    build = Block.__init__

    def build_compiled(block: Block, model: ModelConfig) -> None:
        build(block, model)
        eager = block._attend
        block.compile_attention(backend)
        compiled = block._attend

        def attend(x_BSD: Tensor, mask_B1SS: Tensor | None) -> Tensor:
            return (eager if block.moe.experts.exact else compiled)(x_BSD, mask_B1SS)

        block._attend = attend

    Block.__init__ = build_compiled  # type: ignore[method-assign]


def environment() -> dict[str, str]:
    """The variant for commands, which read it as a part of their job."""
    return {f"ELASTIC_MOE_TRAIN__{name.upper()}": "true" for name in KNOWN if name in VARIANT}


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
