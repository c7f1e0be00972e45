"""A DNS that does not answer must not hold up a restart."""

from __future__ import annotations

import socket

import pytest
from torch.distributed.elastic.agent.server import api

from launcher.elastic.hostname import ask_no_dns
from launcher.elastic.rendezvous import MemberRendezvous


def test_torchs_events_ask_no_dns(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own code makes the event here, so this also tells when its private name for it has changed."""

    def ask(*_: object) -> str:
        raise AssertionError("asked DNS")

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
