"""A real Slurm on this machine: a controller and two nodes from Debian's packages, ended whatever a test does."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.cluster import free_port, until

TOOLS = ("slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol")
_PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin", "/sbin"])

# No munge: everything stays on the loopback, with one user.
_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
KillWait=5
SchedulerParameters=sched_interval=1
MinJobAge=300
{nodes}
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """A cluster of virtual nodes, all on this host, with names that lead to it."""

    nodes = ("127.0.0.1", "127.0.0.2")

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []
        self.environment = {**os.environ, "PATH": _PATH, "SLURM_CONF": str(folder / "slurm.conf")}
        self.environment["PYTHONPATH"] = os.pathsep.join(sys.path)
        host = socket.gethostname().partition(".")[0]
        lines = [
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} CPUs=2 State=UNKNOWN"
            for name in self.nodes
        ]
        conf = _CONF.format(host=host, port=free_port(), user=getpass.getuser(), folder=folder, nodes="\n".join(lines))
        (folder / "slurm.conf").write_text(conf)
        for name in ("state", *(f"spool-{node}" for node in self.nodes)):
            (folder / name).mkdir()

    def start(self) -> None:
        """Start it and wait until every node is idle."""
        self._spawn("slurmctld", "-D", "-i")
        for node in self.nodes:
            self._spawn("slurmd", "-D", "-N", node)
        until("all nodes are idle", lambda: self.call("sinfo", "-h", "-N", "-o", "%T").split() == ["idle"] * 2)

    def _spawn(self, *command: str) -> None:
        with (self._folder / "daemons.log").open("ab") as log:
            self._processes.append(subprocess.Popen(command, env=self.environment, stdout=log, stderr=log))

    def call(self, *command: str, cwd: Path | None = None) -> str:
        """What a command of Slurm's prints; "" where it fails (the controller is not up yet)."""
        done = subprocess.run(
            command, env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=30, check=False
        )
        return done.stdout if done.returncode == 0 else ""

    def submit(self, *arguments: str, cwd: Path, **variables: str) -> str:
        """Submit a job; its id."""
        command = ["sbatch", "--parsable", *arguments]
        environment = {**self.environment, **variables}
        done = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def job(self, job_id: str) -> dict[str, str]:
        """The fields of a job as `scontrol show job` tells them."""
        words = self.call("scontrol", "--oneliner", "show", "job", job_id).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def end(self) -> None:
        """End jobs, then daemons; a daemon's step managers end with their jobs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.call("scancel", "--user", getpass.getuser(), "--full", "--signal=KILL")
            self.call("scancel", "--user", getpass.getuser())
            with contextlib.suppress(AssertionError):
                until("no job is left", lambda: not self.call("squeue", "-h"), within_s=15)
        for process in reversed(self._processes):
            process.terminate()
        for process in self._processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)


@contextlib.contextmanager
def slurm() -> Iterator[Slurm]:
    """A cluster that is gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: Slurm's sockets are in there
    cluster = Slurm(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.end()
        shutil.rmtree(folder, ignore_errors=True)
