"""What the README shows is what happens."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests import sample
from tests.cluster import is_running, until
from tests.template import Forked, child_environment, template

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


(SCRIPT,) = re.findall(r"```python\n(# train\.py\n.*?)```", README, re.DOTALL)
ANSWER = re.compile(r"^step 100: every weight is within 0\.\d+ of the answer$", re.MULTILINE)
# PyPI's torch on a laptop: built for CUDA, and there is none
ABSENT = """
import torch
def absent(*_args):
    raise RuntimeError("Found no NVIDIA driver on your system.")
torch.accelerator.current_accelerator = lambda check_available=False: None if check_available else torch.device("cuda")
torch.accelerator.is_available = lambda: False
torch.accelerator.device_count = lambda: 0
torch.accelerator.current_device_index = torch.accelerator.set_device_index = torch.cuda._lazy_init = absent
"""
NUM_KILLS = int(os.environ.get("README_KILLS", "2" if sample.IS_WHOLE else "1"))
KILL_SEED = int(os.environ.get("README_SEED", "0"))


@pytest.mark.slow
def test_the_script_from_a_fresh_a_finished_and_a_half_finished_state(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    run = ("run", "--nproc-per-node", "2", "train.py")
    command = [sys.executable, "-m", "elastic_moe", *run]
    fresh = subprocess.run(
        command, cwd=tmp_path, env=child_environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert fresh.returncode == 0, fresh.stderr
    answers = [ANSWER.findall(fresh.stdout)]
    listed = elastic_moe(tmp_path, "ckpt", "ls", "checkpoints/linear")
    assert "100" in listed.stdout
    answers.append(ANSWER.findall(elastic_moe(tmp_path, *run).stdout))
    for step in (80, 100):
        shutil.rmtree(tmp_path / f"checkpoints/linear/step-{step:09d}")
    (tmp_path / "train.py").write_text(ABSENT + SCRIPT)
    answers.append(ANSWER.findall(elastic_moe(tmp_path, *run).stdout))
    assert len(answers[0]) == 1 and answers[0] == answers[1] == answers[2]


@pytest.mark.slow
def test_the_script_goes_on_as_if_it_had_not_been_killed(tmp_path: Path) -> None:
    """Killed at random moments, and gone on with on 1 and 2 ranks in turn, it has the losses of one that was not."""
    told = """        total = loss.detach().clone()
        dist.all_reduce(total)
        if rank == 0:
            with open("losses.jsonl", "a") as file:
                file.write(f"[{step}, {total.item() / world_size!r}]\\n")
        __import__("time").sleep(0.02)
        worker.heartbeat(step)
"""
    script = SCRIPT.replace("        worker.heartbeat(step)\n", told)
    # the job before is known to be dead, so that nobody has to look at its beat for 30 s
    script = script.replace("from storage import", "import storage\nfrom storage import").replace(
        "keep=3)", "keep=3, access=storage.Access.TAKE_OVER)"
    )
    assert script.count("losses.jsonl") == script.count("TAKE_OVER") == 1
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    for folder in (alone, killed):
        folder.mkdir()
        (folder / "train.py").write_text(script)
    elastic_moe(alone, "run", "--nproc-per-node", "2", "train.py")
    expected = dict(losses(alone))
    print(f"README_SEED={KILL_SEED} README_KILLS={NUM_KILLS}")
    pick = random.Random(KILL_SEED)
    for number in range(NUM_KILLS):
        with started(killed, "run", "--nproc-per-node", str(2 - number % 2), "train.py") as process:
            target = len(losses(killed)) + pick.randint(1, 30)
            until(f"{target} steps", lambda: len(losses(killed)) >= target or process.poll() is not None, within_s=90)  # noqa: B023
    done = elastic_moe(killed, "run", "--nproc-per-node", str(2 - NUM_KILLS % 2), "train.py")
    assert ANSWER.search(done.stdout)
    found = losses(killed)
    assert {step for step, _ in found} == set(expected)
    for step, loss in found:
        assert loss == pytest.approx(expected[step], abs=1e-6), step


def losses(folder: Path) -> list[tuple[int, float]]:
    path = folder / "losses.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []  # without one that is being written
    return [(step, loss) for step, loss in map(json.loads, lines)]


@contextlib.contextmanager
def started(folder: Path, *arguments: str) -> Iterator[Forked]:
    """A run of the command line, which is killed (SIGKILL: the agent, whose workers die with it) in the end."""
    with Path(os.devnull).open("wb") as nowhere:
        process = template().start("elastic-moe", arguments, child_environment(), nowhere.fileno(), cwd=folder)
    try:
        yield process
    finally:
        family = [process.pid]
        with contextlib.suppress(psutil.NoSuchProcess):  # it has come to its end
            family += [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
        process.kill()
        process.wait(60)
        until("the workers are gone", lambda: not any(map(is_running, family)))


def elastic_moe(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    done = template().run("elastic-moe", *arguments, folder=folder, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done


def test_every_make_target_it_names_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"\$ make ([a-z-]+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
