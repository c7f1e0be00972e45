"""Asks `nvidia-smi` about the GPUs of this node: whether they answer, and whether dead workers still hold memory.

A worker that was killed is gone before its device memory is: the driver tears its context down later. New workers that
start meanwhile run out of memory. Nothing here costs anything on a node without `nvidia-smi`.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import re
import shutil
import subprocess
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

log = logging.getLogger(__name__)

_TOOL = "nvidia-smi"
_PERIOD_S = 0.1
_QUERY_TIMEOUT_S = 10.0
_KILL_S = 1.0
_TOLERANCE_MIB = 512
"""What a driver may hold more than at first (NVRx tolerates as much)."""


class DriverError(Exception):
    """`nvidia-smi` failed, or did not answer in time; the message is one line for a person."""


@dataclass(frozen=True)
class HeldMemory:
    """What dead workers still hold on the GPUs."""

    pids: tuple[int, ...]
    """Their pids, as far as the driver lists them."""
    excess_mib: Mapping[str, int]
    """The memory in use above the baseline, by the GPU's index."""

    def __bool__(self) -> bool:
        return bool(self.pids or self.excess_mib)

    def __str__(self) -> str:
        told = [f"GPU {gpu}: {excess} MiB above the start" for gpu, excess in self.excess_mib.items()]
        return ", ".join([*told, *(f"pid {pid} is on a GPU" for pid in self.pids)])


def visible(given: str | None) -> str | None:
    """Read `CUDA_VISIBLE_DEVICES` as CUDA does, for `nvidia-smi -i`. Pure.

    As CUDA reads it, the list ends at the first entry that is no device: -1, or Slurm's NoDevFiles. `nvidia-smi` knows
    whole GPUs only, so where a slice of one (MIG) is named, all are asked for.

    Returns:
        The GPUs by index or UUID, separated by commas; "" for none, None for all.
    """
    if given is None or "MIG-" in given:
        return None
    names = (name.strip() for name in given.split(","))
    return ",".join(itertools.takewhile(re.compile(r"\d+|GPU-[0-9a-fA-F-]+").fullmatch, names))


def present() -> bool:
    """Whether this node has `nvidia-smi`, and the job is allowed a GPU."""
    return visible(os.environ.get("CUDA_VISIBLE_DEVICES")) != "" and shutil.which(_TOOL) is not None


def query(what: str, fields: Sequence[str], timeout_s: float = _QUERY_TIMEOUT_S) -> list[list[str]]:
    """Ask `nvidia-smi` for some fields of each GPU that is visible to the job, or of each process on one.

    Args:
        what: "gpu" or "compute-apps".
        fields: as `nvidia-smi --query-WHAT` names them.
        timeout_s: for the tool to answer; one that hangs in the driver is then left behind.

    Returns:
        A row of `fields` for each GPU or process.

    Raises:
        DriverError: the tool failed or took longer than `timeout_s`.
    """
    chosen = visible(os.environ.get("CUDA_VISIBLE_DEVICES"))
    command = [_TOOL, *(["-i", chosen] if chosen else []), f"--query-{what}={','.join(fields)}"]
    try:
        process = subprocess.Popen(
            [*command, "--format=csv,noheader,nounits"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    except OSError as error:
        raise DriverError(f"{_TOOL}: {error.strerror}") from error
    try:
        stdout, stderr = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        # A broken driver holds it in the kernel, where SIGKILL does not reach it: it is not waited for any longer.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_KILL_S)
        raise DriverError(f"{_TOOL} did not answer within {timeout_s:g} s") from None
    finally:
        for pipe in filter(None, (process.stdout, process.stderr)):
            pipe.close()
    if process.returncode != 0:
        told = (stderr.strip() or stdout.strip()).partition("\n")[0]
        raise DriverError(f"{_TOOL} ended with exit code {process.returncode}: {told}")
    rows = [[field.strip() for field in line.split(",")] for line in stdout.splitlines() if line.strip()]
    if odd := next((row for row in rows if len(row) != len(fields)), None):  # "No devices were found", say
        raise DriverError(f"{_TOOL} said {','.join(odd)!r}")
    return rows


def used_mib() -> dict[str, int]:
    """Ask how many MiB are in use on each GPU, by its index.

    Raises:
        DriverError: as `query`.
    """
    rows = query("gpu", ("index", "memory.used"))
    return {index: int(used) for index, used in rows if used.isdigit()}


def held(
    pids: Collection[int], now_mib: Mapping[str, int], listed: Collection[int], before_mib: Mapping[str, int]
) -> HeldMemory:
    """Compare what is in use with what was in use before there were workers. Pure.

    Processes are compared by pid where the driver lists them, and memory is compared as well: inside a container the
    driver lists no processes, or gives them foreign pids.

    Args:
        pids: the workers that have ended.
        now_mib: memory in use by GPU, now.
        listed: pids that the driver lists.
        before_mib: memory in use by GPU before any worker started.
    """
    above = {gpu: used - before_mib[gpu] for gpu, used in now_mib.items() if gpu in before_mib}
    return HeldMemory(
        pids=tuple(sorted(set(pids) & set(listed))),
        excess_mib={gpu: excess for gpu, excess in above.items() if excess > _TOLERANCE_MIB},
    )


class DeviceMemory:
    """Makes sure that dead workers' device memory is free, as far as a bounded wait can."""

    def __init__(self) -> None:
        self._before_mib: dict[str, int] = {}
        self._present = False

    def take_baseline(self) -> None:
        """Note what is in use before any worker starts: that is not the workers'."""
        self._present = present()
        if self._present:
            try:
                self._before_mib = used_mib()
            except DriverError as error:
                log.warning("device memory of dead workers is not waited for: %s", error)
                self._present = False

    def wait_free(self, pids: Collection[int], within_s: float) -> str:
        """Wait until nothing of these processes is left on the GPUs.

        Returns:
            What is still held after `within_s`, or why that cannot be told; "" once all is free.
        """
        if not self._present:
            return ""
        ends_s = time.monotonic() + within_s
        while True:
            try:
                listed = [int(pid) for (pid,) in query("compute-apps", ("pid",)) if pid.isdigit()]
                left = held(pids, used_mib(), listed, self._before_mib)
            except DriverError as error:
                return str(error)
            if not left:
                return ""
            if time.monotonic() > ends_s:
                return str(left)
            time.sleep(_PERIOD_S)
