"""Every private name of torch that the launcher uses: a release of torch that changes one is met here and nowhere else.

Each has a canary in tests/launcher/test_torch_private.py that says what broke and where it is used. Importing this
file imports nothing of torch: the zygote needs a name from it before it imports torch under its own eyes.
"""

from __future__ import annotations

import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import subprocess

    from torch.distributed.elastic.agent.server.api import RunResult, Worker, WorkerGroup, WorkerSpec
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent as _TorchAgent
else:
    _TorchAgent = object

IMPORTED_BY_FSDP = "torch._dynamo"
"""What FSDP2 imports when it first shards a module; the zygote imports it ahead."""

FILES_OF_WRAPPERS = ("/torch/_ops.py", "/torch/utils/_contextlib.py", "/torch/distributed/c10d_logger.py")
"""Files whose frames lie between a collective and the code that called it: they say nothing of what is waited for."""


def ask_no_dns() -> None:
    """Let torch's events name this host as the kernel does.

    torch puts the host's full name into an event for every worker that starts or ends, and asks DNS for it each time
    (`socket.getfqdn`). Where DNS does not answer, that is ten seconds per worker in every restart, twice the resolver's
    five. Our own events say which node it is, so torch's get the kernel's name.
    """
    from torch.distributed.elastic.agent.server import api

    api._get_fq_hostname = socket.gethostname


def is_of_exit_barrier(keys: Sequence[str]) -> bool:
    """Whether a key of the worker store belongs to the barrier in which torch's agents wait for each other's end."""
    from torch.distributed.elastic.agent.server.api import _TERMINAL_STATE_SYNC_ID

    return any(key.startswith(_TERMINAL_STATE_SYNC_ID) for key in keys)


@dataclass(frozen=True)
class WorkerProcess:
    """A child process of the agent, by its local rank, with the files that torch has given it ("": none)."""

    local_rank: int
    process: subprocess.Popen[bytes]
    error_file: str
    stdout: str
    stderr: str
    _handler: Any

    @property
    def is_alive(self) -> bool:
        """Whether it has not ended yet, as far as this process has been told."""
        return self.process.poll() is None

    def send(self, signum: signal.Signals) -> None:
        """Send a signal to its process group, and close this process's ends of its log files.

        Raises:
            ProcessLookupError: it has ended, and torch knows.
        """
        self._handler.close(death_sig=signum)


class AgentSteps(_TorchAgent):
    """The private steps of torch's agent under public names. List it before `LocalElasticAgent` among the bases.

    Five steps are the subclass's to do, in its own way; for four it can have torch do what torch does.
    """

    # --- steps that torch asks for

    def run_generations(self) -> RunResult:
        """Start workers and watch them, generation after generation, until the job ends for this node."""
        raise NotImplementedError

    def assign_ranks(self, group_rank: int, spec: WorkerSpec) -> list[Worker]:
        """Make the workers of the node that is at place `group_rank`."""
        raise NotImplementedError

    def start_workers(self) -> dict[int, Any]:
        """Start the workers of this node's group; their pids by local rank."""
        raise NotImplementedError

    def add_environment(self, environment: dict[str, str | None], local_rank: int) -> None:
        """Add to what torch has put into a worker's environment."""
        raise NotImplementedError

    def stop_workers(self, signum: signal.Signals, timeout_s: float) -> None:
        """Send the workers a signal, and SIGKILL to those that are still there after `timeout_s`."""
        raise NotImplementedError

    # --- steps that torch does

    def form_group(self) -> None:
        """Meet the other nodes, and start this node's workers."""
        self._initialize_workers(self._worker_group)

    def start_group(self, num_restarts_left: int) -> dict[int, Any]:
        """Start the processes of the group; their pids by local rank. Log folders are named by the restarts left."""
        self._remaining_restarts = num_restarts_left
        pids: dict[int, Any] = super()._start_workers(self._worker_group)
        return pids

    def check_group(self) -> RunResult:
        """What has become of the workers. Where one has failed, torch ends the others."""
        result: RunResult = self._monitor_workers(self._worker_group)
        return result

    def kill_group(self, timeout_s: float) -> None:
        """Kill the workers that are still there, and wait for them for at most `timeout_s`."""
        super()._shutdown(signal.SIGKILL, timeout=timeout_s)  # type: ignore[arg-type]

    def processes(self) -> list[WorkerProcess]:
        """The worker processes that were started last; none before the first start."""
        started: Any = self._pcontext
        handlers = started.subprocess_handlers.items() if started is not None else ()
        return [
            WorkerProcess(
                local_rank=rank,
                process=handler.proc,
                error_file=started.error_files[rank],
                stdout=started.stdouts[rank],
                stderr=started.stderrs[rank],
                _handler=handler,
            )
            for rank, handler in handlers
        ]

    # --- torch's names for the former

    def _invoke_run(self, role: str = "") -> RunResult:
        return self.run_generations()

    def _assign_worker_ranks(
        self, store: Any, group_rank: int, group_world_size: int, spec: WorkerSpec
    ) -> list[Worker]:
        return self.assign_ranks(group_rank, spec)

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        return self.start_workers()

    def _set_local_rank_env(self, worker_env: dict[str, str | None], local_rank: int, spec: WorkerSpec) -> None:
        super()._set_local_rank_env(worker_env, local_rank, spec)
        self.add_environment(worker_env, local_rank)

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        self.stop_workers(death_sig, timeout)
