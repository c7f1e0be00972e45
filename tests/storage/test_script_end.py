"""Scripts that end without closing their Checkpointer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from storage import open_store
from storage.run import catalog
from tests.template import template


def run(folder: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The script to its end, without torch's import."""
    (folder / "script.py").write_text(script)
    return template().run("python", str(folder / "script.py"), *arguments, folder=folder)


_ENDS = """
import sys, torch, storage
ckpt = storage.Checkpointer(sys.argv[1])
ckpt.save(1, {"w": torch.ones(4)}, wait=True)
if sys.argv[2] == "raises":
    raise RuntimeError("on purpose")
"""


@pytest.mark.parametrize(("how", "code"), [("returns", 0), ("raises", 1)])
def test_a_script_that_ends_without_closing_lets_the_run_go(tmp_path: Path, how: str, code: int) -> None:
    found = run(tmp_path, _ENDS, str(tmp_path / "run"), how)
    assert found.returncode == code, found.stderr
    assert open_store(str(tmp_path / "run")).list("beat-") == []


_ENDS_WHILE_SAVING = """
import sys, threading, torch, storage
from concurrent.futures import ThreadPoolExecutor
from storage.stores.local import LocalStore

main_has_ended = threading.Event()

class Slow(LocalStore):
    def put(self, key, buffers, **options):
        if key.endswith(".distcp"):
            assert main_has_ended.wait(60)
        with ThreadPoolExecutor(1) as pool:  # as those do that put a large object in parts
            return pool.submit(super().put, key, buffers, **options).result()

storage.register_scheme("slow", lambda rest: Slow(rest))
ckpt = storage.Checkpointer("slow://" + sys.argv[1])
ckpt.save(1, {"w": torch.ones(4)})
threading._register_atexit(main_has_ended.set)  # the last one to come is called first
if sys.argv[2] == "raises":
    raise RuntimeError("on purpose")
"""


@pytest.mark.parametrize(("how", "code"), [("returns", 0), ("raises", 1)])
def test_a_script_that_ends_while_it_saves_keeps_the_save(tmp_path: Path, how: str, code: int) -> None:
    command = [sys.executable, "-c", _ENDS_WHILE_SAVING, str(tmp_path / "run"), how]
    if how == "returns":  # of a new interpreter
        found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    else:
        found = run(tmp_path, _ENDS_WHILE_SAVING, str(tmp_path / "run"), how)
    assert found.returncode == code, found.stderr
    assert catalog.committed_steps(open_store(str(tmp_path / "run"))) == [1], found.stderr
    assert open_store(str(tmp_path / "run")).list("beat-") == []


_ENDS_WHILE_DCP_SAVES = """
import concurrent.futures.thread, sys, threading, time, torch, storage
import torch.distributed as dist, torch.distributed.checkpoint as dcp
from concurrent.futures import ThreadPoolExecutor
from storage.stores.local import LocalStore

main_has_ended = threading.Event()

class Pooling(LocalStore):
    def put(self, key, buffers, **options):
        if key.endswith(".distcp"):
            assert main_has_ended.wait(60)
            with ThreadPoolExecutor(1) as pool:  # as a client of another package may have one
                return pool.submit(super().put, key, buffers, **options).result()
        return super().put(key, buffers, **options)

class Late(LocalStore):
    def put(self, key, buffers, **options):
        while not concurrent.futures.thread._shutdown:
            time.sleep(0.01)
        return super().put(key, buffers, **options)

def save(how):
    writer = storage.ShardWriter("slow://" + sys.argv[1])
    how({"w": torch.ones(4), "n": 3}, storage_writer=writer)

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
if sys.argv[2] == "thread":
    storage.register_scheme("slow", Late)
    threading.Thread(target=save, args=(dcp.save,)).start()
else:
    storage.register_scheme("slow", Pooling)
    save(dcp.async_save)
threading._register_atexit(main_has_ended.set)  # the last one to come is called first
if sys.argv[2] == "raises":
    raise RuntimeError("on purpose")
"""


@pytest.mark.parametrize(("how", "code"), [("raises", 1), ("thread", 0)])
def test_a_script_that_ends_while_dcp_saves_keeps_the_save(tmp_path: Path, how: str, code: int) -> None:
    (runs := tmp_path / "runs").mkdir()
    found = run(tmp_path, _ENDS_WHILE_DCP_SAVES, str(runs / "step-000000001"), how)
    assert found.returncode == code, found.stderr
    assert catalog.committed_steps(open_store(runs)) == [1], found.stderr


_ENDS_WHILE_A_PROCESS_SAVES = """
import sys, torch, storage
import torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

if __name__ == "__main__":
    rank = int(sys.argv[2])
    dist.init_process_group("gloo", store=dist.FileStore(sys.argv[1] + "-store", 2), rank=rank, world_size=2)
    writer = storage.ShardWriter(sys.argv[1])
    state = {f"w{rank}": torch.full((4,), float(rank)), "n": 3}
    dcp.async_save(state, storage_writer=writer, async_checkpointer_type=AsyncCheckpointerType.PROCESS)
    raise RuntimeError("on purpose")
"""


def test_a_script_that_ends_while_another_process_saves_for_it_keeps_the_save(tmp_path: Path) -> None:
    script, url = tmp_path / "script.py", str(tmp_path / "step-000000001")
    script.write_text(_ENDS_WHILE_A_PROCESS_SAVES)
    ranks = [
        subprocess.Popen([sys.executable, script, url, str(rank)], stderr=subprocess.PIPE, text=True) for rank in (0, 1)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert all("RuntimeError: on purpose" in error for error in errors), errors
    assert catalog.committed_steps(open_store(tmp_path)) == [1], errors
    index = catalog.open_checkpoint(open_store(tmp_path), "step-000000001/")
    assert sorted(index.entries) == ["n", "w0", "w1"]
