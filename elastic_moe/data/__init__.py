"""Training data as a pure function of (seed, step, global batch): any world size sees the same samples in a step."""

from elastic_moe.data.config import DataConfig

__all__ = ["DataConfig"]
