"""Stock `torchrun --rdzv-backend=etcd3`, with scripts that know nothing of us, on a real etcd."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from torch.distributed.elastic.rendezvous.api import RendezvousParameters

from launcher.coordination.run_id_reuse import reopen_failed
from launcher.elastic.handlers import create_handler
from launcher.kv.etcd.client import EtcdKV
from launcher.rounds.records import Node, Participant, Round, Status
from tests.cluster import Node as RunNode
from tests.cluster import free_port, read_lines, until
from tests.etcd import Server, client
from tests.template import child_environment, template

SCRIPTS = Path(__file__).parent / "scripts"
STOCK, PLAIN, FAILS = (str(SCRIPTS / name) for name in ("stock.py", "plain.py", "fails.py"))

pytestmark = pytest.mark.slow


class StockNode(RunNode):
    """A stock torchrun and the workers it starts."""

    def __init__(self, folder: Path, name: str, arguments: list[str], *, is_fresh: bool = False) -> None:
        self.name = name
        self._log = folder / f"{name}.log"
        environment = child_environment(OMP_NUM_THREADS="1")
        with self._log.open("ab") as log:
            if not is_fresh:
                self.process = template().start("torchrun", arguments, environment, log.fileno())
                return
            self.process = subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", *arguments],
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )

    def freeze(self) -> None:
        """Stop the agent and its workers at once, as a hung machine does."""
        for process in (psutil.Process(self.process.pid), *self.tree()):
            process.suspend()

    def thaw(self) -> None:
        """Let them go on."""
        for process in (psutil.Process(self.process.pid), *self.tree()):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()


class Job:
    """Nodes of one run id."""

    def __init__(self, server: Server, folder: Path) -> None:
        self.folder = folder
        self.endpoint = server.endpoint
        self.run_id = uuid.uuid4().hex[:8]
        self.is_fresh = False
        """Whether nodes are new interpreters, and not forks of one that has made their imports."""
        self._nodes: list[StockNode] = []

    def start(
        self,
        name: str,
        script: str,
        *script_arguments: str,
        nnodes: str = "1:2",
        nproc: int = 1,
        max_restarts: int = 3,
        conf: str = "last_call=60",
    ) -> StockNode:
        """Start a node. A script's argument is the job's folder, if none is given. Leases are long."""
        conf = conf if "lease_ttl" in conf else f"{conf},lease_ttl=15"
        arguments = ["--rdzv-backend=etcd3", f"--rdzv-endpoint={self.endpoint}", f"--rdzv-id={self.run_id}"]
        arguments += [f"--nnodes={nnodes}", f"--nproc-per-node={nproc}", f"--max-restarts={max_restarts}"]
        arguments += [f"--rdzv-conf={conf}", script, *(script_arguments or (str(self.folder),))]
        node = StockNode(self.folder, name, arguments, is_fresh=self.is_fresh)
        self._nodes.append(node)
        return node

    def start_two(self, script: str, conf: str) -> tuple[StockNode, StockNode]:
        """Two nodes of one first round, whose workers have started."""
        nodes = self.start("first", script, conf=conf), self.start("second", script, conf=conf)
        self.wait_started(2)
        return nodes

    @contextlib.contextmanager
    def store(self) -> Iterator[EtcdKV]:
        """A look into the store."""
        kv = client(self.endpoint)
        try:
            yield kv
        finally:
            kv.close()

    def started(self) -> list[dict[str, Any]]:
        """What the workers told as they started, in order."""
        return read_lines(self.folder / "started.jsonl")

    def wait_started(self, num: int) -> list[dict[str, Any]]:
        """Wait until so many workers have started in all; the last of them."""
        try:
            return until(f"{num} workers started", lambda: self.started()[num - 1 :] and self.started())
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.logs()}") from None

    def logs(self) -> str:
        return "\n".join(f"--- {node.name}\n{node.output}" for node in self._nodes)

    def node_of(self, started: dict[str, Any]) -> StockNode:
        """The node whose worker told this."""
        return next(node for node in self._nodes if started["pid"] in [p.pid for p in node.tree()])

    def finish(self) -> None:
        """Let the scripts end."""
        (self.folder / "finish").touch()

    def end(self) -> None:
        for node in self._nodes:
            node.end()


@pytest.fixture
def job(server: Server, tmp_path: Path) -> Iterator[Job]:
    made = Job(server, tmp_path)
    yield made
    made.end()


def other(nodes: tuple[StockNode, StockNode], node: StockNode) -> StockNode:
    return nodes[1] if node is nodes[0] else nodes[0]


def test_a_killed_node_is_lost_and_taken_in_again(job: Job) -> None:
    job.is_fresh = True
    nodes = job.start_two(STOCK, conf="last_call=60,join_cooldown=0.5")
    victim = job.node_of(next(s for s in job.started() if s["RANK"] == 0))  # it hosts the workers' store
    victim.kill()
    alone = job.wait_started(3)[2]
    assert (alone["RANK"], alone["WORLD_SIZE"]) == (0, 1)
    survivor = other(nodes, victim)
    again = job.start("again", STOCK)
    both = job.wait_started(5)[3:]
    assert sorted((s["RANK"], s["WORLD_SIZE"]) for s in both) == [(0, 2), (1, 2)]
    assert job.node_of(next(s for s in both if s["RANK"] == 0)) is survivor, "survivors keep their order"
    job.finish()
    assert (survivor.wait(), again.wait()) == (0, 0), job.logs()


def test_a_frozen_node_is_lost_joins_again_when_it_thaws_and_may_die_unnoticed(job: Job) -> None:
    conf = "last_call=60,join_cooldown=0.5,lease_ttl=4"
    nodes = job.start("larger", PLAIN, nproc=2, conf=conf), job.start("smaller", PLAIN, conf=conf)
    assert sorted((s["RANK"], s["WORLD_SIZE"]) for s in job.wait_started(3)) == [(0, 3), (1, 3), (2, 3)]
    larger, smaller = nodes
    larger.freeze()
    alone = job.wait_started(4)[3]
    assert (alone["RANK"], alone["WORLD_SIZE"], alone["GENERATION"]) == (0, 1, 2)
    assert re.search(r"generation 1 ends: node .* lost: its lease ended", smaller.output)
    larger.thaw()
    again = job.wait_started(7)[4:]
    assert sorted((s["RANK"], s["WORLD_SIZE"]) for s in again) == [(0, 3), (1, 3), (2, 3)]
    larger.freeze()
    job.wait_started(8)
    larger.kill()
    job.finish()
    assert smaller.wait() == 0, job.logs()
    assert re.search(r"generation 2 ends: join: ", smaller.output)
    assert len(job.started()) == 8, "a node that was lost already dies without restarting anybody"


def test_a_node_that_is_terminated_leaves_at_once(job: Job) -> None:
    nodes = job.start_two(PLAIN, conf="last_call=60,lease_ttl=300")  # too long to wait for
    leaver = job.node_of(job.started()[0])
    leaver.signal(signal.SIGTERM)
    assert leaver.wait() != 0
    assert job.wait_started(3)[2]["WORLD_SIZE"] == 1
    job.finish()
    assert other(nodes, leaver).wait() == 0, job.logs()


def test_nodes_that_finish_at_different_times_do_not_restart_each_other(job: Job) -> None:
    nodes = job.start_two(PLAIN, conf="last_call=60,join_cooldown=0")
    (job.folder / "finish-0").touch()
    until("rank 0 is done", lambda: Status.DONE in [node.status for node in node_records(job)])
    late = job.start("late", PLAIN, conf="last_call=60,join_cooldown=0,lease_ttl=60")
    until("the late node waits", lambda: len(node_records(job)) == 3)
    job.finish()
    assert [node.wait() for node in nodes] == [0, 0], job.logs()
    assert len(job.started()) == 2, "no worker was started twice"
    assert late.wait() == 0, "a node that was not needed is no failure"
    assert "has succeeded, this node is not needed" in late.output


def test_a_script_that_fails_ends_the_job_for_all(job: Job) -> None:
    nodes = [job.start(name, FAILS, "3", max_restarts=1) for name in ("first", "second")]
    assert [node.wait() for node in nodes] == [1, 1]
    with job.store() as kv:
        entry = kv.get(f"elastic-moe/{job.run_id}/job/round")
    assert entry is not None
    assert Round.from_json(entry.value).outcome.startswith("failed: worker of rank")


def test_one_node_that_fails_for_good_ends_the_others(job: Job) -> None:
    waits = job.start("waits", PLAIN, nnodes="2")
    fails = job.start("fails", FAILS, "3", nnodes="2", max_restarts=0)
    assert fails.wait() == 1
    assert waits.wait() != 0
    assert "failed with exit code 3" in waits.output, "the other node says why"


def node_records(job: Job) -> list[Node]:
    """The live nodes as the store has them."""
    with job.store() as kv:
        entries = kv.list(f"elastic-moe/{job.run_id}/nodes/").entries
    return [Node.from_json(entry.value, entry.create_revision) for entry in entries]


def test_a_mistake_is_told_in_one_line(tmp_path: Path) -> None:
    arguments = ["--rdzv-backend=etcd3", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--rdzv-conf=connect_timeout=2"]
    node = StockNode(tmp_path, "n", [*arguments, FAILS, "0"])
    try:
        assert node.wait() == 2
        asked_again, line = node.output.splitlines()
        assert "cannot be used yet: connection refused; asked again for 2 s" in asked_again
        assert line.startswith("torchrun: error: --rdzv-endpoint 127.0.0.1:")
        assert line.endswith("cannot be used: connection refused")
    finally:
        node.end()


@pytest.mark.parametrize(
    ("conf", "told"),
    [
        ({"lease_tl": "3"}, "--rdzv-conf lease_tl: no such key; did you mean lease_ttl?"),
        (
            {"user": "me", "password": "hidden"},
            "--rdzv-conf password: every user of a machine can read its command lines",
        ),
        ({"user": "me", "password_file": "/none"}, "--rdzv-conf password_file=/none: No such file"),
    ],
)
def test_mistakes_in_options(conf: dict[str, str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    params = RendezvousParameters("etcd3", "127.0.0.1:1", "r", 1, 2, None, timeout=900, **conf)
    with pytest.raises(SystemExit) as ended:
        create_handler(params)
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith(f"torchrun: error: {told}")
    assert "hidden" not in err


def test_an_address_of_another_machine(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        create_handler(RendezvousParameters("etcd3", server.endpoint, "r", 1, 2, "192.0.2.1"))
    assert capsys.readouterr().err.startswith("torchrun: error: --local-addr 192.0.2.1: cannot listen there: ")


class TestReopening:
    """A run id that was used before."""

    @pytest.mark.parametrize(
        ("outcome", "with_node", "reopened"),
        [("failed: x", False, True), ("failed: x", True, False), ("succeeded", False, False), ("", False, False)],
    )
    def test_only_what_failed_and_is_empty(self, server: Server, outcome: str, with_node: bool, reopened: bool) -> None:
        kv, run_id = client(server.endpoint), uuid.uuid4().hex
        try:
            assert not reopen_failed(kv, run_id)
            ended = Round(1, "lineage", (Participant("a", 1),), None, (), "first round", outcome=outcome)
            kv.put(f"elastic-moe/{run_id}/job/round", ended.to_json())
            if with_node:
                node = Node("a", "a", "127.0.0.1", 1, 1)
                kv.put(f"elastic-moe/{run_id}/nodes/a", node.to_json())
            assert reopen_failed(kv, run_id) is reopened
            assert (kv.get(f"elastic-moe/{run_id}/job/round") is None) is reopened
        finally:
            kv.close()
