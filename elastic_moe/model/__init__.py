"""The Mixture-of-Experts decoder.

`config` needs no torch and is imported by the command line; the modules are in `decoder`.
"""

from elastic_moe.model.config import ModelConfig

__all__ = ["ModelConfig"]
