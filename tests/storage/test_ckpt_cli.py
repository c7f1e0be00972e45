"""`elastic-moe ckpt ls | show | verify`: what it prints and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from elastic_moe.cli import ckpt
from elastic_moe.cli.parser import Parser
from storage import Checkpointer, JobIdentity
from storage.errors import NoCheckpoint


def run(*argv: str) -> int:
    parser = Parser(prog="elastic-moe")
    ckpt.register(parser.add_subparsers())
    args = parser.parse_args(["ckpt", *argv])
    code: int = args.handler(args)
    return code


@pytest.fixture
def url(tmp_path: Path) -> str:
    state = {"model": {"weight": torch.randn(300, 70)}, "step": 10}
    mesh = {"replicate": 1, "shard": 2, "expert": 1, "idle": 0}
    with Checkpointer(str(tmp_path), job=JobIdentity(generation=3, lineage="launch", mesh=mesh)) as ckpt:
        for step in (10, 20):
            ckpt.save(step, state, wait=True)
    with pytest.warns(UserWarning, match="single process"):
        dcp.save(state, checkpoint_id=tmp_path / "step-000000030")
    return str(tmp_path)


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_ls(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    for path in Path(url, "step-000000010").rglob("manifest.json"):
        path.write_text("{}")
    (Path(url) / "step-000000040").mkdir()
    (Path(url) / "step-000000040/quarantined-12345678.metadata").write_text("")
    assert run("ls", url) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["STEP", "STATE", "SIZE", "AGE", "WORLD", "GENERATION", "MESH"]
    assert [line.split()[:2] for line in lines[1:5]] == [
        ["40", "quarantined"],
        ["30", "stock"],
        ["20", "committed"],
        ["10", "damaged"],
    ]
    assert lines[3].endswith("replicate 1 x shard 2 x expert 1")
    assert "step 10: step-000000010/manifest.json is damaged" in lines[5]
    assert run("ls", url, "--json") == 0
    rows: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    assert [row["step"] for row in rows] == [40, 30, 20, 10]
    assert rows[2]["world_size"] == 1
    assert (rows[2]["generation"], rows[2]["lineage"], rows[2]["mesh"]["shard"]) == (3, "launch", 2)
    assert rows[2]["size_bytes"] > 300 * 70 * 4


@pytest.mark.parametrize("step", [20, 30])
def test_show(url: str, capsys: pytest.CaptureFixture[str], step: int) -> None:
    assert run("show", f"{url}/step-{step:09d}") == 0
    out = capsys.readouterr().out
    assert f"step {step}" in out
    assert "model.weight" in out
    assert "[300, 70]" in out
    assert "values: step" in out
    assert run("show", f"{url}/step-{step:09d}", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    (tensor,) = shown["tensors"]
    assert (tensor["key"], tensor["dtype"], tensor["shape"]) == ("model.weight", "float32", [300, 70])
    assert tensor["shards"][0]["object"].endswith("__0_0.distcp")


def test_verify(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", url) == 0
    assert capsys.readouterr().out.count("good") == 3
    for victim in ("step-000000020/attempt-*/*.distcp", "step-000000030/*.distcp"):
        damage(next(Path(url).glob(victim)))
    assert run("verify", url) == 1
    out = capsys.readouterr().out
    assert out.count("DAMAGED") == 2
    assert "checksum" in out
    assert run("verify", f"{url}/step-000000010") == 0
    assert run("verify", url, "--json") == 1
    assert "good" in capsys.readouterr().out


def test_verify_reads_no_torch_for_our_own_format(url: str) -> None:
    import subprocess
    import sys

    code = (
        "import sys; from storage import inspection as i; l = i.locate(sys.argv[1]);"
        "assert not i.verify(l.store, l.prefix).problems; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, f"{url}/step-000000020"], check=True)


@pytest.mark.parametrize("action", ["ls", "show", "verify"])
@pytest.mark.parametrize("where", ["nothing", "empty", "empty/step-000000010"])
def test_no_checkpoint_is_one_line_and_exit_code_2(tmp_path: Path, action: str, where: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(NoCheckpoint, match="no checkpoint at") as caught:
        run(action, str(tmp_path / where))
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "nothing").exists()
