"""The user's side of `ckpt push` and `pull`: what may be asked, what is told, and each mistake in one line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from elastic_moe.cli.main import main
from elastic_moe.cli.transfer import ProgressLines
from storage.errors import NoCheckpoint
from storage.transfer.copyplan import choose
from tests.storage.copied_runs import run


def test_mistakes_are_one_line_and_exit_code_2(
    source: Path, other: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.warns(UserWarning, match="single process"):
        dcp.save({"w": torch.ones(3)}, checkpoint_id=tmp_path / "bare")
    (tmp_path / "empty").mkdir()
    step = f"{source}/step-000000020"
    for argv, says in (
        (("push", f"{tmp_path}/nothing", f"{tmp_path}/a"), "no checkpoint at"),
        (("push", f"{tmp_path}/empty", f"{tmp_path}/a"), "no checkpoint at"),
        (("push", str(source), f"{tmp_path}/a", "--step", "30"), "step 30 is not committed in .*there are: 20, 10"),
        (("pull", str(source), other), "step-000000020 holds another checkpoint"),
        (("pull", str(source), str(source)), "two different places"),
        (("pull", str(source), f"{tmp_path}/a/step-000000020"), "give the folder above it"),
        (("pull", str(source), f"{tmp_path}/bare"), "is one checkpoint and no run"),
        (("pull", f"{tmp_path}/bare", other), "has steps in it; give the one to make"),
        (("pull", step, f"{tmp_path}/a/step-000000030"), "give the same step"),
        (("pull", step, f"{tmp_path}/a", "--last", "1"), "no steps to choose from"),
        (("push", "s3://bucket/run", str(source)), "the other way round"),
        (("pull", str(source), "gs://x"), "the other way round"),
        (("pull", str(source), f"{tmp_path}/a", "--profile", "x"), "--profile is for s3:// URLs"),
        (("pull", str(source), "nowhere://x"), "the other way round|no store"),
    ):
        assert main(["ckpt", *argv]) == 2, argv
        error = capsys.readouterr().err
        assert error.count("\n") == 1, error
        assert re.search(says, error), (says, error)
    assert not (tmp_path / "a").exists()
    for argv in (("--step", "-1"), ("--last", "0"), ("--step", "1", "--last", "1")):
        with pytest.raises(SystemExit) as caught:
            main(["ckpt", "pull", "a", "b", *argv])
        assert caught.value.code == 2


def test_choose() -> None:
    assert choose([30, 20, 10], "it", None, None) == [30, 20, 10]
    assert choose([30, 20, 10], "it", 20, None) == [20]
    assert choose([30, 20, 10], "it", None, 2) == [30, 20]
    with pytest.raises(NoCheckpoint):
        choose([30], "it", 20, None)


def test_a_dry_run_writes_nothing(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ckpt", "pull", str(source), f"{tmp_path}/to", "--dry-run"]) == 0
    assert capsys.readouterr().out.count("would copy") == 2
    assert not (tmp_path / "to").exists()
    result = run(capsys, "pull", str(source), f"{tmp_path}/to", "--dry-run")
    assert (result["dry_run"], result["num_objects_sent"], result["steps"][0]["state"]) == (True, 10, "planned")


def test_progress_without_a_terminal() -> None:
    now_s, lines = [100.0], list[str]()
    progress = ProgressLines(40 << 20, lambda: now_s[0], lines.append)
    progress.advance(10 << 20)
    now_s[0] += 5
    progress.advance(10 << 20)
    now_s[0] += 4
    progress.advance(10 << 20)
    assert lines == ["20.0 MiB of 40.0 MiB, 4.0 MiB/s, 5 s left"]


def test_what_is_told(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for says in ("step-000000020: copied, ", "step-000000020: there already, "):
        assert main(["ckpt", "pull", str(source), f"{tmp_path}/to"]) == 0
        assert says in capsys.readouterr().out
