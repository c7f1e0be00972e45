"""`ShardReader` and `ShardWriter` under the names, and with the arguments, of stock DCP's for files and fsspec."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any

import torch

from storage import ShardReader, ShardWriter
from storage.dcp import Url
from storage.errors import UsageError

# `hf_storage` derives its own classes from stock's, which it must find
_FIRST = ("hf_storage", "quantized_hf_storage", "_fsspec_filesystem", "format_utils", "_storage_utils")


class Writer(ShardWriter):
    """Replaces what is there, as stock's do unless they are told otherwise. How it writes is its own business."""

    def __init__(
        self, path: Url, *how: Any, overwrite: bool = True, _extensions: Sequence[Any] | None = None, **more: Any
    ) -> None:
        if _extensions:
            raise UsageError("stream transforms are not written")
        super().__init__(path, overwrite=overwrite)


class Reader(ShardReader):
    """Reads the same."""

    def __init__(self, path: Url, **more: Any) -> None:
        super().__init__(path)


_NAMES = {"FileSystemWriter": Writer, "FsspecWriter": Writer, "FileSystemReader": Reader, "FsspecReader": Reader}


def let_run_without_gpus() -> None:
    """Where there is no accelerator, tests that ask for some number of them run on the CPU, as far as they can."""
    if torch.accelerator.is_available():
        return
    common = importlib.import_module("torch.testing._internal.common_distributed")
    for name in ("skip_if_lt_x_gpu", "requires_nccl", "requires_accelerator_dist_backend"):
        if hasattr(common, name):
            setattr(common, name, lambda *needs: lambda test: test)


def install() -> None:
    """Put them in the place of stock's in all of torch.distributed.checkpoint."""
    package = "torch.distributed.checkpoint"
    for name in _FIRST:
        importlib.import_module(f"{package}.{name}")
    for module in [module for name, module in sys.modules.items() if name.startswith(package)]:
        for name in _NAMES.keys() & vars(module).keys():
            setattr(module, name, _NAMES[name])
