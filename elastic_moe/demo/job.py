"""The demo's job: 8 experts, top-2, trained on the standard library's sources read as bytes."""

from __future__ import annotations

import json
from pathlib import Path

# The first line of the job file, by which a later demo knows the folder as its own to overwrite.
MARK = "# Written by `elastic-moe demo`; its folder is overwritten by the next demo."

# Two expert-parallel ways, so that a node of two workers is a replica, and the other one holds all that it held. With
# one replica instead (`sharded`) four ranks shard every parameter (FSDP) beside that, two cannot, so the loss of a node
# takes a half of the state with it and moves all of it to another layout.
#
# Exact, because the losses are compared to the last bit: sums in another order differ by 1e-8 in fp32, and a router
# amplifies that (1e-5 after 90 steps, 1e-3 after 150), which would hide a fault as small.
_JOB = """\
{mark}

[model]
dim = 96
num_layers = 2
num_heads = 3
num_kv_heads = 1
num_experts = 8
top_k = 2
expert_dim = 192

[data]
url = "stdlib"

[optim]
lr = 2e-3
warmup_steps = 10

[train]
steps = {steps}
seed = {seed}
global_batch = 8
seq_len = 256
exact = true
metrics = {metrics}

[checkpoint]
url = {checkpoints}
every = 5
keep = 3

[mesh]
expert = 2
"""
_ONE_REPLICA = "replicate = 1\n"


def job_toml(*, steps: int, seed: int, metrics: Path, checkpoints: Path, sharded: bool) -> str:
    """The TOML text of the job whose metrics and checkpoints go to these paths."""
    job = _JOB + (_ONE_REPLICA if sharded else "")
    return job.format(
        mark=MARK,
        steps=steps,
        seed=seed,
        metrics=json.dumps(str(metrics)),  # a JSON string is a TOML basic string
        checkpoints=json.dumps(str(checkpoints)),
    )


def unbroken_sets(*, metrics: Path, checkpoints: Path) -> list[str]:
    """`--set` values that make the same job one process with files of its own."""
    return [
        "mesh.expert=1",
        f"train.metrics={json.dumps(str(metrics))}",
        f"checkpoint.url={json.dumps(str(checkpoints))}",
    ]
