"""Train Mixture-of-Experts models on machines that come and go.

In a script     worker, the calls by which a script takes part (the module of that name); elastic_moe.integrations has
                pieces for accelerate, Lightning and transformers that make them.
Training        load_job reads a JOB.toml and what is laid over it into a JobConfig, train trains it on this rank as
                `elastic-moe train` does (a TrainerEvent tells of what went wrong), and mesh_spec is what a planner has
                to know of it.
Packages        launcher runs the job and storage keeps its checkpoints; each has a front door of its own.

Names are imported when they are first used, and torch only by those that need it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from elastic_moe import errors, siblings
from elastic_moe.errors import *  # noqa: F403 - the tree, by its own __all__

siblings.find()

if TYPE_CHECKING:
    from elastic_moe import worker
    from elastic_moe.config import JobConfig, mesh_spec
    from elastic_moe.config import load as load_job
    from elastic_moe.events import TrainerEvent
    from elastic_moe.trainer.run import train

__all__ = ["JobConfig", "TrainerEvent", "load_job", "mesh_spec", "train", "worker"]
__all__ += errors.__all__

_PLACES = {
    "JobConfig": ("elastic_moe.config", "JobConfig"),
    "TrainerEvent": ("elastic_moe.events", "TrainerEvent"),
    "load_job": ("elastic_moe.config", "load"),
    "mesh_spec": ("elastic_moe.config", "mesh_spec"),
    "train": ("elastic_moe.trainer.run", "train"),
}

__doc__ = f"{__doc__}\n{errors.__doc__}"


if not TYPE_CHECKING:  # a type checker would believe in any name

    def __getattr__(name: str) -> Any:
        if name == "worker":
            return importlib.import_module("elastic_moe.worker")
        if name not in _PLACES:
            raise AttributeError(f"module 'elastic_moe' has no attribute {name!r}")
        room, original = _PLACES[name]
        value = globals()[name] = getattr(importlib.import_module(room), original)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
