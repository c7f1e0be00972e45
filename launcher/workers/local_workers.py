"""The workers of one generation on this node by their channels: what they have done, and whether they are to stop."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from launcher.workers.channel import Channel, Progress, StopReason, WorkerPhase
from launcher.workers.reaping import kill_group


class LocalWorkers:
    """One channel for each local rank. Times are the monotonic clock's. For the agent's thread only."""

    def __init__(self, folder: Path, generation: int, local_ranks: Sequence[int]) -> None:
        self._channels = {rank: Channel.create(folder / f"worker-{generation}-{rank}") for rank in local_ranks}
        for channel in self._channels.values():
            self._stacks_path(channel).touch(0o600)

    def path(self, local_rank: int) -> Path:
        """The file that a worker attaches."""
        return self._channels[local_rank].path

    def stacks_path(self, local_rank: int) -> Path:
        """The file into which a worker writes its Python stacks when it is told to."""
        return self._stacks_path(self._channels[local_rank])

    @staticmethod
    def _stacks_path(channel: Channel) -> Path:
        return channel.path.with_name(f"{channel.path.name}.stacks")

    def forked_pid(self, local_rank: int) -> int | None:
        """The pid that a worker has claimed, while it runs; None before, and once it has ended."""
        return self._channels[local_rank].forked_pid()

    def claimed_pids(self) -> list[int]:
        """The pids that workers have claimed, whether they still run or not."""
        return [pid for channel in self._channels.values() if (pid := channel.claimed_pid())]

    def progress(self) -> dict[int, Progress]:
        """What each worker has said last, by local rank."""
        return {local_rank: channel.progress() for local_rank, channel in self._channels.items()}

    def last_step(self) -> int:
        """The last step that any worker has said to be complete, -1 if none has."""
        return max((progress.step for progress in self.progress().values()), default=-1)

    def last_step_fields(self) -> dict[str, float]:
        """The last step for an event, with the time (epoch seconds) at which the first worker was done with it."""
        step = self.last_step()
        beats = [progress.beat_s for progress in self.progress().values() if progress.step == step and progress.beat_s]
        ts = {"step_ts": round(time.time() - time.monotonic() + min(beats), 3)} if beats else {}
        return {"step": step, **ts}

    def is_cooperative(self) -> bool:
        """Whether the script reports its progress, and so can be asked to stop."""
        return any(progress.phase is not WorkerPhase.STARTING for progress in self.progress().values())

    def request_stop(self, reason: StopReason) -> None:
        """Ask all workers to stop at their next step boundary."""
        for channel in self._channels.values():
            channel.request_stop(reason)

    def kill(self) -> bool:
        """Kill the workers with their process groups; returns whether all of them had said which process they are."""
        pids = [channel.forked_pid() for channel in self._channels.values()]
        for pid in filter(None, pids):
            with contextlib.suppress(ProcessLookupError):
                kill_group(pid)
        return all(pids)

    def end_forked_workers(self, within_s: float) -> list[int]:
        """Kill forked workers that outlive what stands for them, and wait until they are gone.

        Returns:
            The pids of those that are still there after `within_s`.
        """
        ends_s = time.monotonic() + within_s
        while pids := [pid for channel in self._channels.values() if (pid := channel.forked_pid())]:
            if time.monotonic() > ends_s:
                return pids
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.005)
        return []

    def close(self) -> None:
        """Remove the files, once the workers are gone."""
        for channel in self._channels.values():
            channel.close()
            channel.path.unlink(missing_ok=True)
            self._stacks_path(channel).unlink(missing_ok=True)
        self._channels = {}
