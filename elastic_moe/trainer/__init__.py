"""The trainer: `elastic_moe.trainer.run.train(job)`.

`config` needs no torch and is imported by the command line; `run` is for commands that train.
"""

from elastic_moe.trainer.config import CheckpointConfig, OptimConfig, TrainConfig

__all__ = ["CheckpointConfig", "OptimConfig", "TrainConfig"]
