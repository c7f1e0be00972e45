"""Starts processes in every way that leads out of a worker's sight, and tells their pids; then does as it is told.

`leaves.py FOLDER`: fails in the first generation, after that waits. Before it starts any, it tells which of those of
earlier generations are still there.
"""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

folder = Path(sys.argv[1])
generation = int(os.environ["ELASTIC_MOE_GENERATION"])


def tell(kind: str, pid: int) -> None:
    with (folder / "pids.jsonl").open("a") as file:
        file.write(json.dumps({"kind": kind, "pid": pid, "generation": generation}) + "\n")


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def stubborn() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    tell("multiprocessing", os.getpid())
    time.sleep(600)


def daemon() -> None:
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            tell("double fork", os.getpid())
            time.sleep(600)
        os._exit(0)


told = folder / "pids.jsonl"
before = [json.loads(line) for line in told.read_text().splitlines()] if told.exists() else []
with (folder / "seen.jsonl").open("a") as seen:
    seen.write(
        json.dumps({"generation": generation, "there": [b["kind"] for b in before if is_there(b["pid"])]}) + "\n"
    )

shell = subprocess.run(["sh", "-c", "sleep 600 >/dev/null 2>&1 & echo $!"], stdout=subprocess.PIPE, check=True)
tell("shell", int(shell.stdout))
tell("setsid", subprocess.Popen(["sleep", "600"], start_new_session=True).pid)
tell("no environment", subprocess.Popen(["sleep", "600"], start_new_session=True, env={}).pid)
multiprocessing.get_context("fork").Process(target=stubborn, daemon=True).start()
daemon()
if "torch" in sys.modules:
    from torch.utils.data import DataLoader

    loader = DataLoader(range(100), num_workers=1, persistent_workers=True)  # type: ignore[arg-type]
    batches = iter(loader)
    next(batches)
    tell("data loader", batches._workers[0].pid)  # type: ignore[attr-defined]
while len([line for line in told.read_text().splitlines() if json.loads(line)["generation"] == generation]) < 5:
    time.sleep(0.01)
if generation == 1:
    os._exit(3)
(folder / "ready").touch()
time.sleep(600)
