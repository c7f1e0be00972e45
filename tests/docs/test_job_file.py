"""The job file that README and `train --help` show runs."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import textwrap
from pathlib import Path

import pytest

from elastic_moe.cli import main as cli
from elastic_moe.cli.train import EXAMPLE
from elastic_moe.config import load

README = (Path(__file__).parents[2] / "README.md").read_text()
SETS = ["train.steps=4", "train.validate_every=2", "model.num_layers=1", "train.seq_len=16", "data.url=text.txt"]

_context = multiprocessing.get_context("forkserver")


def test_readme_and_help_show_the_same_file(capsys: pytest.CaptureFixture[str]) -> None:
    (shown,) = re.findall(r"```toml\n# job\.toml\n(.*?)```", README, re.DOTALL)
    assert shown == EXAMPLE
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    assert textwrap.indent(EXAMPLE, "  ") in capsys.readouterr().out


def train_here(folder: Path) -> None:
    from elastic_moe.trainer.run import train

    os.chdir(folder)
    train(load("job.toml", sets=SETS, environ={}))


def test_it_runs(tmp_path: Path) -> None:
    """But for the length of the training, and the text: reading all of Python's sources takes its time."""
    (tmp_path / "job.toml").write_text(EXAMPLE)
    (tmp_path / "text.txt").write_text(README * 3)
    process = _context.Process(target=train_here, args=(tmp_path,))
    process.start()
    try:
        process.join(120)
        assert process.exitcode == 0
    finally:
        process.kill()
        process.join()
    told = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["val_loss"] is not None) for line in told] == [(n, n % 2 == 0) for n in range(1, 5)]
    assert (tmp_path / "checkpoints" / "moe" / "step-000000004" / ".metadata").is_file()
