"""One job under faults: nodes on hosts of a network of its own, an etcd beside them, and what must hold at the end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from launcher.reports.goodput import Cause, Goodput, Interruption, account
from storage import inspection, open_store
from storage.run import catalog
from tests.certificates import Authority
from tests.chaos import history
from tests.chaos.network import Host, Loopback, Network
from tests.cluster import Cluster, Node, until
from tests.etcd import ALONE, Beside, Server, etcdctl, leader_of
from tests.s3 import BUCKET, KEY, MOTO, ROOT, SECRET, S3Server, SeaweedFS, short_folder
from tests.template import Forked, template

SCRIPT = str(Path(__file__).parent / "scripts" / "job.py")
STORES = ("plain", "secure", "beside")
ON_OBJECTS = ("folder", "s3")
"""Stores on the shared storage, and on an S3 server: for tests in which the store is not hurt."""
S3_SERVER = os.environ.get("CHAOS_S3", "moto")
"""Which one: "moto", or "seaweedfs", which takes longer to start."""
ENDS_SOON = "lease_ttl=4"
"""For tests that wait for a lease to end."""
_LEASE = "lease_ttl=30"
_PASSWORD = "s3cret-words"
_NUM_UNCOMMITTED = 60
"""Steps of 20 ms that may pass, on a busy machine, until one that was saved is committed."""
BUSY_S = 1.5
"""What busy cores take at most to wake a process: so much later it may tell what has happened."""


@dataclass(frozen=True)
class Store:
    """The etcd of a job: its members, each on a host of its own, and what `--rdzv-conf` says of the way in."""

    members: tuple[Server, ...]
    hosts: tuple[Host, ...]
    conf: tuple[str, ...]
    tls: dict[str, str]
    objects: S3Server | None = None

    def leader(self) -> int:
        """Which member leads."""
        return self.members.index(leader_of(self.members, self.tls))

    def stop(self) -> None:
        """SIGKILL to all members."""
        for member in self.members:
            member.kill()

    def start(self) -> None:
        """Start those that do not run."""
        for member in self.members:
            member.start()

    def signal(self, signum: signal.Signals) -> None:
        """To all members."""
        for member in self.members:
            member.signal(signum)


class Job(Cluster):
    """Nodes that share an etcd, and a folder that stands for the shared storage.

    Every node has a host of its own, which stays when the node is started again. Leases are longer than a busy machine
    keeps a process waiting; where a test waits for one to end, it says `ENDS_SOON`.
    """

    def __init__(self, folder: Path, network: Network | Loopback, store: Store, saves: str = "file") -> None:
        super().__init__(folder)
        self.saves = saves
        self.network = network
        self.store = store
        self.work = folder / "work"
        self.work.mkdir()
        self.hosts: dict[str, Host] = {}
        self.endpoint = ",".join(member.endpoint for member in store.members) or str(folder / "meet")
        if store.objects is not None:
            self.endpoint = store.objects.url("meet")
            self.environment.update(store.objects.environment)
        self.backend = "etcd3" if store.members else "bucket"

    def spawn(self, name: str, arguments: list[str], environment: dict[str, str], log: int) -> Forked:
        """Fork the node on its host."""
        if name not in self.hosts:
            self.hosts[name] = self.network.host(name)
        return template().start("elastic-moe", arguments, environment, log, host=self.hosts[name])

    def nodes(
        self, *names: str, nnodes: str, conf: str = "", options: tuple[str, ...] = (), script: tuple[str, ...] = ()
    ) -> list[Node]:
        """Start nodes in this order; the first is the oldest. With `last_call=60` the first round has max nodes."""
        started = []
        for name in names:
            joined = len(self.events("node_joined"))
            started.append(self.node(name, nnodes=nnodes, conf=conf, options=options, script=script))
            until(f"{name} has joined", lambda n=joined: len(self.events("node_joined")) > n)  # type: ignore[misc]
        return started

    def node(
        self, name: str, *, nnodes: str, conf: str = "", options: tuple[str, ...] = (), script: tuple[str, ...] = ()
    ) -> Node:
        """Start a node."""
        settings = ",".join((_LEASE, *self.store.conf, *([conf] if conf else [])))
        if self.saves == "direct":
            options = (*options, "--no-checkpoint-service")
        if "--stock" not in script:
            script = (*script, "--saves", self.saves)
        return self.start(name, *options, SCRIPT, str(self.work), *script, nnodes=nnodes, conf=settings)

    def gate(self, name: str) -> tuple[str, ...]:
        """Options with which a node has done all that comes before it joins, and waits for `open_gate` to do so."""
        wait = f"until [ -e '{self.work}/gate' ]; do sleep 0.05; done"
        return ("--preflight", f"touch '{self.work}/at-gate-{name}'; {wait}")

    def open_gate(self, *names: str, meanwhile: Callable[[], object] = lambda: None) -> None:
        """Let nodes join at one moment, once all of these are at the gate and `meanwhile` was called."""
        for name in names:
            until(f"{name} is at the gate", (self.work / f"at-gate-{name}").exists)
        meanwhile()
        (self.work / "gate").touch()

    # --- what it did

    def history(self) -> history.History:
        """What the workers wrote down so far."""
        return history.read(self.work)

    def steps(self, world_size: int, num: int = 5, after: int = 0, within_s: float = 60.0) -> int:
        """Wait for `num` steps by a world of this size, in a generation later than `after`; which one."""

        def enough() -> list[int]:
            done = [s for s in self.history().steps if s.world_size == world_size and s.generation > after]
            return [g for g in {s.generation for s in done} if len({s.step for s in done if s.generation == g}) >= num]

        try:
            return max(until(f"{num} steps by {world_size} workers after generation {after}", enough, within_s))
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.told()}") from None

    def told(self, *more: object) -> str:
        """All that is known, for a person who looks for what went wrong."""
        events = "\n".join(json.dumps(event) for event in self.events())
        logs = "\n".join(f"--- {node.name}\n{node.output}" for node in self._nodes)
        return "\n".join([*map(str, more), events, logs])

    def finish(self, *nodes: Node, thawed: tuple[str, ...] = (), redone: int = 1) -> None:
        """Let the job end: these nodes exit with 0, and the history shows nothing that must not be."""
        (self.work / "finish").touch()
        for node in nodes:
            code = node.wait()
            assert code == 0, f"{node.name} ended with {code}\n{self.told()}"
        self.check(thawed=thawed, redone=redone)

    def account(self) -> Goodput:
        """What `report` makes of the events so far."""
        return account(self.events())

    def told_as(self, cause: Cause, *names: str, generation: int = 1, within_s: float = BUSY_S) -> Interruption:
        """The report's account of what ended this generation: this cause, these nodes, and the seconds that the steps'
        own times show, give or take a tenth (`within_s` at least).
        """
        found = [i for i in self.account().interruptions if i.generation == generation]
        assert [i.cause for i in found] == [cause], self.told(found)
        assert sorted(n.rpartition("-")[0] for n in found[0].nodes) == sorted(names), self.told(found)
        ended_s, began_s = self.history().pause(generation)
        assert found[0].seconds == pytest.approx(began_s - ended_s, rel=0.1, abs=within_s), self.told(found)
        if found[0].steps_redone is not None:
            again = self.history().done(generation)[-1] - self.history().done(generation + 1)[0] + 1
            assert abs(found[0].steps_redone - again) <= 1, self.told(found)  # the node that is gone may be one ahead
        return found[0]

    def check(self, thawed: tuple[str, ...] = (), redone: int = 1) -> None:
        """Nothing happened that must not, whatever the fault."""
        allowed = redone if self.saves == "file" else max(redone, _NUM_UNCOMMITTED)
        found = history.violations(self.history(), thawed=thawed, redone=allowed)
        assert not found, "\n".join([*found, self.told()])
        if (run := self.work / "run").exists():
            for step in catalog.committed_steps(open_store(run)):
                problems = inspection.verify(open_store(run), f"step-{step:09d}/").problems
                assert not problems, self.told(*problems)


def freeze(node: Node) -> None:
    """SIGSTOP to a whole node."""
    for process in _all_of(node):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.suspend()


def thaw(node: Node) -> None:
    """SIGCONT to a whole node."""
    for process in _all_of(node):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.resume()


def _all_of(node: Node) -> list[psutil.Process]:
    return [psutil.Process(node.process.pid), *node.tree()]


@contextlib.contextmanager
def etcd_on(folder: Path, network: Network | Loopback, flavour: str, num_members: int) -> Iterator[Store]:
    """An etcd of that flavour, each member on a host of its own; gone afterwards.

    "beside" is what `elastic-moe etcd` starts on them. "folder" and "s3" are none: nodes meet on the shared storage, or
    on an S3 server. "secure" wants client certificates, and a user with a password who may write under one prefix only.
    """
    if flavour == "folder":
        yield Store((), (), (), {})
        return
    if flavour == "s3":
        with s3_on(folder, network.host("s3")) as objects:
            yield Store((), (), (), {}, objects)
        return
    hosts = tuple(network.host(f"etcd-{i}") for i in range(num_members))
    tls: dict[str, str] = {}
    options: tuple[str, ...] = ()
    if flavour == "secure":
        authority = Authority(folder, "chaos", sorted({host.address for host in hosts} - {"127.0.0.1"}))
        served, tls = authority.issue("server"), authority.issue("client")
        options = ("--cert-file", served["cert"], "--key-file", served["key"], "--client-cert-auth")
        options += ("--trusted-ca-file", served["cacert"])
        options += ("--bcrypt-cost", "4")  # the default costs etcd a tenth of a second of processor time per login
    if num_members == 1:
        options += ALONE
    scheme = "https" if tls else "http"
    kind = Beside if flavour == "beside" else Server
    members = tuple(
        kind(folder, host.name, *options, scheme=scheme, address=host.address, enter=host.enter) for host in hosts
    )
    everyone = ",".join(member.cluster for member in members)
    store = Store(members, hosts, _conf(folder, tls), tls)
    try:
        for member in members:
            member.cluster = everyone
        store.start()
        store.leader()
        if tls:
            for command in _USERS:
                etcdctl(members[0], *command.split(), tls=tls)
        yield store
    finally:
        store.stop()


@contextlib.contextmanager
def s3_on(folder: Path, host: Host) -> Iterator[S3Server]:
    """An S3 server on a host, with one bucket; gone afterwards."""
    place = f"{host.address}:9000"
    with short_folder() as short, (folder / "s3.log").open("ab") as log:
        seaweedfs = SeaweedFS(short, host.address)
        command, environment = [*MOTO, host.address, "9000"], dict(os.environ)
        asked = [(place, "PUT", f"/{BUCKET}", "201")]
        if S3_SERVER == "seaweedfs":
            command, environment = seaweedfs.command(9000), seaweedfs.environment
            asked = [(seaweedfs.filer, "POST", f"/buckets/{BUCKET}/", "202"), (place, "GET", "/", "500")]
        server = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *host.enter, *command], stdout=log, stderr=log, env=environment, cwd=ROOT
        )
        try:
            for words in asked:
                ask = [*host.enter, sys.executable, "-c", _ASK, *words]
                until(
                    "the S3 server answers",
                    lambda ask=ask: subprocess.run(ask, stderr=log, check=False).returncode == 0,  # type: ignore[misc]
                )
            yield S3Server(S3_SERVER, f"http://{place}", KEY, SECRET)
        finally:
            server.kill()
            server.wait(60)


_ASK = """
import http.client, sys
place, method, path, below = sys.argv[1:]
connection = http.client.HTTPConnection(place, timeout=5)
connection.request(method, path)
sys.exit(connection.getresponse().status >= int(below))
"""
_USERS = (
    f"user add root:{_PASSWORD} --interactive=false",
    "user grant-role root root",
    f"user add limited:{_PASSWORD} --interactive=false",
    "role add jobs",
    "user grant-role limited jobs",
    "role grant-permission jobs --prefix=true readwrite /jobs/",
    "auth enable",
)


def _conf(folder: Path, tls: dict[str, str]) -> tuple[str, ...]:
    if not tls:
        return ()
    password = folder / "password"
    password.write_text(_PASSWORD + "\n")
    return (*(f"{k}={v}" for k, v in tls.items()), "user=limited", f"password_file={password}", "prefix=/jobs/")
