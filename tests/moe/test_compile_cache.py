"""The folders of torch.compile's cache: what is torn in them is made anew, and one that is of no use ends no job."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._filelock import FileLock

from elastic_moe.model.compile_cache import cache_obstacle, named_in, remove_torn
from elastic_moe.model.compiled import Compiling
from elastic_moe.trainer import setup
from launcher import worker


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """That of the cache, with a blank in its name."""
    folder = tmp_path / "compiled here"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
    cache_obstacle.cache_clear()
    torch._dynamo.reset()
    yield folder
    cache_obstacle.cache_clear()


class Library:
    """A backend that has a file made where it is not there, and cannot load it where it is torn."""

    def __init__(self, path: Path, *, is_always_torn: bool = False) -> None:
        self.path = path
        self.content = b"" if is_always_torn else b"whole"
        self.num_made = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        if not self.path.exists():
            self.path.write_bytes(self.content)
            self.num_made += 1
        if not self.path.read_bytes():
            raise ImportError(f"{self.path}: file too short")
        return graph


def library(folder: Path, content: bytes, *, is_always_torn: bool = False) -> Library:
    (folder / "ab").mkdir(parents=True)
    (path := folder / "ab" / "cab.main.so").write_bytes(content)
    return Library(path, is_always_torn=is_always_torn)


def test_a_torn_library_is_made_anew_and_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    backend, told = library(folder, b""), list[str]()
    add = Compiling(backend, told.append)(lambda x: x + 1)
    assert [int(add(torch.zeros(1))) for _ in range(2)] == [1, 1]
    assert (backend.num_made, told) == (1, [])
    (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("elastic_moe")]
    assert line == f"torn by a process that was killed, to be made anew: {backend.path}"


def test_what_is_torn_again_is_not_made_for_ever(folder: Path) -> None:
    backend, told = library(folder, b"", is_always_torn=True), list[str]()
    add = Compiling(backend, told.append)(lambda x: x + 1)
    assert [int(add(torch.zeros(1))) for _ in range(2)] == [1, 1]
    assert (backend.num_made, len(told)) == (1, 1)
    assert "file too short" in told[0]


def test_what_another_rank_has_made_meanwhile_is_not_removed(folder: Path) -> None:
    backend, told = library(folder, b"whole"), list[str]()

    def fails_once(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        if not failed:
            failed.append(1)
            raise ImportError(f"{backend.path}: file too short")
        return backend(graph, inputs)

    failed: list[int] = []
    assert int(Compiling(fails_once, told.append)(lambda x: x + 1)(torch.zeros(1))) == 1
    assert (backend.num_made, told) == (0, [])


def test_files_that_an_error_names_are_of_the_cache_and_made_by_a_compiler(folder: Path, tmp_path: Path) -> None:
    headers = folder / "precompiled_headers"
    paths = [folder / "ab" / name for name in ("cab.main.so", "cab.o", "cab.cpp", "dab.so")]
    paths[2:2] = [headers / "c.h.gch"]
    paths += [headers / "f.h"]
    others = [tmp_path / "ab" / "cab.so", folder / "ab" / "x.so", folder / "lib" / "cab.so", folder / "c.h.gch"]
    for path in [*paths[:4], header := headers / "f.h.gch", *others]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    told = "; ".join(f"'{path}': no" for path in [*paths, *others])
    error = RuntimeError("no graph")
    error.__cause__ = OSError(told)
    assert named_in(error) == paths[:3]
    assert named_in(RuntimeError("no file")) == []
    error.__cause__.__cause__ = RuntimeError("fatal error: cannot read PCH file: No such file or directory")
    assert named_in(error) == [*paths[:3], header]


def test_a_library_that_ends_before_its_end_is_removed_but_where_it_is_made(folder: Path) -> None:
    whole = b"\x7fELF\2\1" + bytes(34) + struct.pack("<Q10xHH2x", 64, 64, 2) + bytes(2 * 64)
    real = Path(torch._C.__file__).read_bytes()
    contents = {"a": real, "a.main": whole, "b": whole[:-1], "c.main": b"", "d": bytes(1000), "e": whole[:60]}
    (folder / "ab").mkdir(parents=True)
    for name, content in contents.items():
        (folder / "ab" / f"{name[0]}ab{name[1:]}.so").write_bytes(content)
    with FileLock(str(folder / "locks" / "dab.lock")):  # as whoever makes it holds it
        remove_torn()
    assert sorted(path.stem for path in (folder / "ab").iterdir()) == ["aab", "aab.main", "dab"]
    remove_torn()
    assert sorted(path.stem for path in (folder / "ab").iterdir()) == ["aab", "aab.main"]


def test_what_torch_has_not_made_is_left_alone(folder: Path) -> None:
    """A user may name any folder as the cache, /usr/lib say, where libc.so is a text."""
    for path in (folder / "x86_64" / "libc.so", folder / "ab" / "mine.so"):
        path.parent.mkdir(parents=True)
        path.write_text("/* GNU ld script */")
    remove_torn()
    assert {path.name for path in folder.glob("*/*.so")} == {"libc.so", "mine.so"}


@pytest.mark.parametrize("kind", ["a file", "in a file", "not writable"])
def test_a_cache_that_is_of_no_use_is_told_and_replaced(
    kind: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "not writable":
        if os.geteuid() == 0:
            pytest.skip("root writes everywhere")
        folder.mkdir(mode=0o500)
    else:
        folder.touch()
    if kind == "in a file":
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder / "cache"))
    told: list[str] = []
    monkeypatch.setattr(worker, "event", lambda name, *, reason: told.append(f"{name}: {reason}"))
    setup.compile_layers(None, torch.device("cuda"))  # type: ignore[arg-type]  # nothing of a model is asked for
    (line,) = told
    assert line.startswith(f"compile_failed: its cache {folder}")
    assert line.endswith("(TORCHINDUCTOR_CACHE_DIR names another)")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == tempfile.gettempdir()


def test_torch_can_be_used_without_its_cache(folder: Path) -> None:
    """It makes the folder when it imports its compiler, for an optimizer say, of a job that compiles nothing."""
    folder.touch()
    code = (
        "import torch; from elastic_moe.model.compile_cache import cache_obstacle; assert cache_obstacle();"
        "torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))]).zero_grad()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
