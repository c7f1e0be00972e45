"""Scripts that end without closing their Checkpointer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from storage import open_store
from storage.run import catalog

_ENDS = """
import sys, torch, storage
ckpt = storage.Checkpointer(sys.argv[1])
ckpt.save(1, {"w": torch.ones(4)}, wait=True)
if sys.argv[2] == "raises":
    raise RuntimeError("on purpose")
"""


@pytest.mark.parametrize(("how", "code"), [("returns", 0), ("raises", 1)])
def test_a_script_that_ends_without_closing_lets_the_run_go(tmp_path: Path, how: str, code: int) -> None:
    found = subprocess.run(
        [sys.executable, "-c", _ENDS, str(tmp_path / "run"), how], capture_output=True, text=True, timeout=120
    )
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
            assert main_has_ended.wait(30)
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
    found = subprocess.run(
        [sys.executable, "-c", _ENDS_WHILE_SAVING, str(tmp_path / "run"), how],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert found.returncode == code, found.stderr
    assert catalog.committed_steps(open_store(str(tmp_path / "run"))) == [1], found.stderr
    assert open_store(str(tmp_path / "run")).list("beat-") == []
