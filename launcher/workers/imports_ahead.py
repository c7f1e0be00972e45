"""Imports ahead what workers will want, in a process from which they are forked, and tells whether it is fit for it."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Sequence

from launcher.torch_private import IMPORTED_BY_FSDP
from launcher.workers import early_variables, paths

MODULES = (
    "torch",
    "torch.distributed",
    "torch.distributed.tensor",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "torch.distributed.checkpoint.state_dict",
    IMPORTED_BY_FSDP,
    "numpy.ma",  # by the first `np.unique`
    "encodings.idna",  # by the first connection to a name
)
_EXITING = 0x4  # PF_EXITING of Linux: it runs nothing of the program's any more


class Imports:
    """What this process has imported ahead, and what that has read. A fork of the agent goes on with the agent's."""

    def __init__(self, also: Sequence[str] = ()) -> None:
        """`also`: modules to be imported ahead beside `MODULES`, where it is known what workers will run."""
        self.also = tuple(also)
        self.recorder = early_variables.Recorder()
        self.environment = dict(os.environ)
        self.with_torch: set[str] = set()
        self.half_imported = ""
        """Which part of torch could not be imported, and why; "" for none: the next may trip over what it left."""

    def make(self, name: str) -> None:
        """Import `name`; where that fails, say so on stderr and go on, without the rest of torch if it is of that."""
        is_torch = name.partition(".")[0] == "torch"
        if is_torch and self.half_imported:
            return
        before = _packages()
        try:
            with self.recorder:
                importlib.import_module(name)
        except Exception as error:  # noqa: BLE001 (whatever an import does, the worker may still want to do it)
            print(f"zygote: {name} is not imported ahead: {error}", file=sys.stderr)
            if is_torch:
                self.half_imported = f"{name} could not be imported ahead: {error}"
        if is_torch:
            self.with_torch |= _packages() - before - set(paths.OWN_PACKAGES)


def _packages() -> set[str]:
    return {name.partition(".")[0] for name in sys.modules}


def settle_threads() -> None:
    """Where there are threads, fork once for nothing: libraries that are prepared for forks (OpenBLAS) end their idle
    ones at the first.

    They start them again when they next compute, which the zygote never does. A fork of all that is imported takes
    15 ms, half of them to end it, and there is one after each import.
    """
    if num_threads_alive() == 1:
        return
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


def num_threads_alive(tasks: str = "/proc/self/task") -> int:
    """Count this process's threads. One that was waited for may be listed for a moment, and is none any more."""
    num_alive = 0
    for thread in os.listdir(tasks):
        with contextlib.suppress(OSError), open(f"{tasks}/{thread}/stat", "rb") as file:
            flags = int(file.read().rpartition(b")")[2].split()[6])  # proc_pid_stat(5)
            num_alive += not flags & _EXITING
    return num_alive


def unfit_to_fork() -> str:
    """Say why a fork of this process might not work, "" if nothing speaks against it."""
    num_threads = num_threads_alive()
    if num_threads > 1:
        return f"{num_threads - 1} thread(s) were started by an import"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return "CUDA was initialised by an import"
    return ""
