"""The runner of torch's tests, on a file that stands in for them."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from tests.upstream import __main__ as runner
from tests.upstream import compare
from tests.upstream.compare import Difference, Outcome

_STAND_IN = """
import subprocess, sys, tempfile, unittest
import torch, torch.distributed.checkpoint as dcp

class TestSmall(unittest.TestCase):
    def test_that_passes_with_both(self):
        with tempfile.TemporaryDirectory() as path:
            for number in (1.0, 2.0):  # stock replaces what is there
                dcp.save({"w": torch.full((3,), number)}, storage_writer=dcp.FileSystemWriter(path, thread_count=2))
            found = {"w": torch.zeros(3)}
            dcp.load(found, checkpoint_id=path)
            self.assertEqual(found["w"].tolist(), [2.0] * 3)

    def test_that_passes_with_stock_only(self):
        ask = "import torch.distributed.checkpoint as dcp; print(dcp.FileSystemWriter.__module__)"
        told = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True).stdout
        self.assertEqual(dcp.FileSystemWriter.__module__, told.strip())  # a child has what its parent has
        self.assertTrue(told.startswith("torch."), told)

    def test_that_passes_with_none(self):
        self.fail("on purpose")
"""


@pytest.mark.whole  # the whole of a tool of ours, whose parts are below
def test_what_passes_with_stock_only_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "test" / "distributed" / "checkpoint"
    folder.mkdir(parents=True)
    (folder / "test_small.py").write_text(_STAND_IN)
    (folder / "test_other.py").write_text("# nothing of storage")
    found, files = runner.find(str(tmp_path), ())
    assert (found, files) == (folder, [folder / "test_small.py"])
    names = ("with_both", "with_stock_only", "with_none")
    stock = {f"TestSmall::test_that_passes_{name}": Outcome("passed") for name in names[:2]}
    stock[f"TestSmall::test_that_passes_{names[2]}"] = Outcome("failed")
    run = runner.run  # to ask stock as well takes as long again
    monkeypatch.setattr(runner, "run", lambda path, storage: stock if storage == "stock" else run(path, storage))
    assert runner.report(folder, files, {}) == 1
    told = capsys.readouterr().out
    assert "stock: 2 passed, 1 failed, 0 skipped" in told
    assert "ours:  1 passed, 2 failed, 0 skipped" in told
    assert "NEW: test_small.py::TestSmall::test_that_passes_with_stock_only: " in told


def test_a_listed_difference_has_its_reason() -> None:
    stock = {"T::a": Outcome("passed"), "T::b": Outcome("passed"), "T::c": Outcome("failed"), "T::d": Outcome("passed")}
    ours = {"T::a": Outcome("failed", "E"), "T::b": Outcome("passed"), "T::c": Outcome("failed")}
    assert compare.differences("f.py", stock, ours, {"f.py::T::a*": "why"}) == [
        Difference("f.py::T::a", "E", "why"),
        Difference("f.py::T::d", "it did not run", None),
    ]


def test_reasons_can_be_read() -> None:
    known = tomllib.loads((Path(runner.__file__).parent / "known.toml").read_text())["known"]
    assert all(pattern.count("::") == 2 and reason for pattern, reason in known.items())


@pytest.mark.parametrize("sources", ["", "/nowhere"])
def test_without_sources_one_line_says_how_to_give_them(
    sources: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_SOURCES", sources)
    assert runner.main(["test-upstream"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "make test-upstream TORCH_SOURCES=/path/to/pytorch" in told
