"""torch's private names, as the launcher uses them: a line for each that is gone or has changed in this torch.

What is found here is mended in `launcher/torch_private.py`.
"""

from __future__ import annotations

import importlib.util
import inspect
import signal
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.elastic.agent.server import api
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std, start_processes
from torch.distributed.elastic.multiprocessing.api import SubprocessContext

from launcher.elastic.rendezvous import MemberRendezvous
from launcher.torch_private import (
    FILES_OF_WRAPPERS,
    IMPORTED_BY_FSDP,
    AgentSteps,
    ask_no_dns,
    is_of_exit_barrier,
)
from tests.private_names import own_names, used_in, uses

STEPS = {
    "_invoke_run": (["role"], "AgentSteps.run_generations, our agent's loop"),
    "_assign_worker_ranks": (
        ["store", "group_rank", "group_world_size", "spec"],
        "AgentSteps.assign_ranks, ranks that follow from the round",
    ),
    "_start_workers": (["worker_group"], "AgentSteps.start_workers and start_group"),
    "_set_local_rank_env": (["worker_env", "local_rank", "spec"], "AgentSteps.add_environment, ELASTIC_MOE_*"),
    "_shutdown": (["death_sig", "timeout"], "AgentSteps.stop_workers and kill_group"),
    "_initialize_workers": (["worker_group"], "AgentSteps.form_group"),
    "_monitor_workers": (["worker_group"], "AgentSteps.check_group"),
}
FIELDS = {
    "_worker_group": "AgentSteps: the group that torch's steps are given",
    "_pcontext": "AgentSteps.processes, which worker processes there are",
    "_remaining_restarts": "AgentSteps.start_group, the count in the names of log folders",
}


def broken(what: str, where: str) -> str:
    return f"torch {torch.__version__}: {what}, which launcher/torch_private.py uses for {where}"


@pytest.mark.parametrize("name", STEPS)
def test_a_step_of_torchs_agent_is_there_and_takes_what_it_took(name: str) -> None:
    parameters, where = STEPS[name]
    step = getattr(LocalElasticAgent, name, None)
    assert step is not None, broken(f"LocalElasticAgent has no {name}", where)
    taken = [*inspect.signature(step).parameters][1:]
    assert taken == parameters, broken(f"{name} takes {taken}, not {parameters}", where)


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_of_torchs_agent_is_there(name: str) -> None:
    assert name in own_names(LocalElasticAgent), broken(f"LocalElasticAgent keeps no {name}", FIELDS[name])


def test_the_processes_of_an_agent_are_told_with_their_files(tmp_path: Path) -> None:
    class Agent(AgentSteps):
        _pcontext: Any = None

    agent = Agent()  # type: ignore[call-arg]
    assert agent.processes() == [], "none before the first start"
    specs = DefaultLogsSpecs(log_dir=str(tmp_path), redirects=Std.ALL)
    started = start_processes("t", "/bin/sleep", {0: ("60",)}, {0: {}}, specs, start_method="spawn")
    try:
        assert isinstance(started, SubprocessContext)
        agent._pcontext = started
        (found,) = agent.processes()
        where = broken("SubprocessContext has no such handler", "AgentSteps.processes")
        assert found.local_rank == 0, where
        assert found.is_alive, where
        assert found.process.pid == started.pids()[0], where
        assert [found.stdout, found.stderr, found.error_file] == [
            started.stdouts[0],
            started.stderrs[0],
            started.error_files[0],
        ]
        found.send(signal.SIGTERM)
        assert found.process.wait(60) == -signal.SIGTERM, broken("the handler's `close` sends no signal", "send")
        assert not found.is_alive
    finally:
        started.close()


def test_torchs_events_ask_no_dns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A DNS that does not answer must not hold up a restart. torch's own code makes the event here."""
    where = "ask_no_dns, which keeps DNS out of each restart"
    assert hasattr(api, "_get_fq_hostname"), broken(f"{api.__name__} has no _get_fq_hostname", where)

    def ask(*_: object) -> str:
        raise AssertionError(broken("events ask DNS again", where))

    monkeypatch.setattr(socket, "getfqdn", ask)
    monkeypatch.setattr(api, "_get_fq_hostname", api._get_fq_hostname)
    ask_no_dns()

    class Agent(api.SimpleElasticAgent):
        def _start_workers(self, worker_group: object) -> dict[int, int]: ...
        def _stop_workers(self, worker_group: object) -> None: ...
        def _monitor_workers(self, worker_group: object) -> api.RunResult: ...
        def _shutdown(self, *_: object, **__: object) -> None: ...

    rendezvous = MemberRendezvous.__new__(MemberRendezvous)
    rendezvous._backend, rendezvous._run_id = "etcd3", "test"
    agent = Agent(api.WorkerSpec("default", 1, rendezvous, entrypoint=print))
    assert agent.get_event_succeeded().metadata["hostname"] == socket.gethostname()


def test_the_exit_barrier_of_torchs_agents_is_known_by_its_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which keys torch's own barrier uses is seen here by running it."""
    from torch.distributed.elastic.utils import store

    keys: list[str] = []
    monkeypatch.setattr(api.store_util, "barrier", lambda *_, key_prefix, **__: keys.append(key_prefix))
    group = SimpleNamespace(state=api.WorkerState.SUCCEEDED, store=None, group_rank=0, group_world_size=2)
    agent = SimpleNamespace(_worker_group=group, _store=None, _exit_barrier_timeout=1.0)
    assert store is api.store_util
    api.SimpleElasticAgent._exit_barrier(agent)  # type: ignore[arg-type]
    assert keys, broken("the exit barrier does not go through store_util.barrier", "is_of_exit_barrier")
    assert all(is_of_exit_barrier([f"{key}/0"]) for key in keys), broken(f"it waits for {keys}", "is_of_exit_barrier")
    assert not is_of_exit_barrier(["anything/else"])


def test_what_fsdp_imports_is_there_to_be_imported_ahead() -> None:
    found = importlib.util.find_spec(IMPORTED_BY_FSDP)
    assert found is not None, broken(f"there is no {IMPORTED_BY_FSDP}", "workers/imports_ahead.py")


@pytest.mark.parametrize("name", FILES_OF_WRAPPERS)
def test_a_file_whose_frames_are_passed_over_is_there(name: str) -> None:
    home = Path(torch.__file__).parent.parent
    assert Path(f"{home}{name}").is_file(), broken(
        f"there is no {name}", "health/stacks.py, whom a hung rank waits for"
    )


def test_no_other_file_of_the_launcher_uses_a_private_name_of_torchs() -> None:
    assert used_in("launcher") == [], "these belong into launcher/torch_private.py, with a canary here"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import torch._dynamo", ["torch._dynamo"]),
        ("from torch.distributed._tools import x", ["torch.distributed._tools.x"]),
        ("from torch.distributed import _functional_collectives as f", ["torch.distributed._functional_collectives"]),
        ("import torch.distributed as dist\ndist._world", ["torch.distributed: _world"]),
        ("import torch\ngetattr(torch, '_C')", ["torch: _C"]),
        ("from torch import Tensor\nTensor._base.shape", ["torch.Tensor: _base"]),
        ("NAMES = ['torch._inductor.config']", ["torch._inductor"]),
        ("import torch\nclass M(torch.nn.Module):\n    def f(self): self._parameters", ["M: _parameters"]),
        ("from torch.nn import Module\nclass M(Module):\n    def _apply(self): ...", ["M: def _apply"]),
        ("import torch\ntorch.ones(1).__class__", []),
        ("import torch\nclass M(torch.nn.Module):\n    def f(self): self._ours", []),
        ("def f():\n    '''As torch._dynamo does.'''", []),
        ("import os\nos._exit(0)", []),
    ],
)
def test_uses_of_private_names_are_found(source: str, found: list[str]) -> None:
    assert [name for _, name in uses(source)] == found
