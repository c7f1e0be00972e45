"""Checkpoints: bytes with names, committed whole or not at all.

`Checkpointer` is the one class that a training script needs, and `PerRank` marks what each rank has of its own;
`ShardReader` and `ShardWriter` plug into `torch.distributed.checkpoint.load` and `save`; `open_store` opens the object
store behind a URL. Errors are in `storage.errors`. torch is imported only by the names that need it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from storage.stores.registry import open_store, register_scheme

if TYPE_CHECKING:
    from storage.checkpointer import Checkpointer
    from storage.dcp import ShardReader, ShardWriter
    from storage.state.per_rank import PerRank

__all__ = ["Checkpointer", "PerRank", "ShardReader", "ShardWriter", "open_store", "register_scheme"]

_LAZY = {
    "Checkpointer": "storage.checkpointer",
    "PerRank": "storage.state.per_rank",
    "ShardReader": "storage.dcp",
    "ShardWriter": "storage.dcp",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'storage' has no attribute {name!r}")
