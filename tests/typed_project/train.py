"""A user's script, with all three packages."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import elastic_moe
import launcher
import storage
from elastic_moe import worker
from launcher import Check, EventName, MeshPlan, MeshSpec, Notice, Watcher, plan
from storage import Checkpointer, CheckpointEvent, Corrupt, ObjectStore, PerRank, open_store


class EnoughSwap:
    name = "swap"
    timeout_s = 0.0

    def run(self) -> str:
        return ""


class Maintenance:
    poll_s = 1.0

    def poll(self) -> Notice | None:
        return Notice("maintenance", within_s=60.0)


def heard(event: str, fields: Mapping[str, Any]) -> None:
    if event == CheckpointEvent.COMMITTED:
        worker.event("mine", step=fields["step"])


def train(url: str, steps: int) -> int:
    here = worker.context()
    mesh: MeshPlan | None = here.mesh
    state = {"seen": PerRank(0)}
    with Checkpointer(url, keep=3) as ckpt:
        step = ckpt.restore(state)
        while step < steps:
            step += 1
            worker.heartbeat(step)
            reason: str | None = worker.should_stop()
            ckpt.save(step, state)
            if reason:
                worker.yielded(step)
                break
    return mesh.replicate if mesh else 1


def look(path: Path) -> int:
    store: ObjectStore = open_store(str(path))
    try:
        found = list(store.list(""))
    except Corrupt as error:
        raise SystemExit(error.exit_code) from error
    with launcher.open_job("etcd3", "here:2379", "job") as job:
        names = [node.node_id for node in job.nodes()]
    return len(found) + len(names)


check: Check = EnoughSwap()
watcher: Watcher = Maintenance()
best: MeshPlan = plan(8, MeshSpec(global_batch=8, num_experts=1, top_k=1), ranks_per_node=8)
rules = launcher.PreflightRules(min_shm_mib=1.0)
lost: str = EventName.NODE_LOST
job: elastic_moe.JobConfig = elastic_moe.load_job("JOB.toml", environ={})
tree: tuple[type[Exception], ...] = (launcher.LauncherError, storage.StorageError, elastic_moe.UserError)
