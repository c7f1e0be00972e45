"""The runs that are damaged, and what comes of reading one: each of its readers must say the truth or raise."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from storage import Checkpointer, ShardReader, inspection, register_scheme
from storage.errors import StorageError
from storage.stores.memory import MemoryStore
from tests.fuzz.faults import Objects

URL = "fuzz://run"
OLDER, NEWER = 1, 2
RIGHT, OLD, NOTHING, VERIFIED = "right bytes", "the older checkpoint", "no checkpoint", "verified"
PLANNER = "error: torch's planner, a key or size that is another"

_store = MemoryStore("fuzz")
register_scheme("fuzz", lambda rest: _store)


class Wrong(Exception):
    """What was read is not what was written."""


@dataclass(frozen=True)
class Specimen:
    """A run's objects, and how it is read: `read` returns an outcome, and raises Wrong or an error of `storage`."""

    name: str
    objects: Objects
    read: Callable[[], str]


def state(step: int) -> dict[str, Any]:
    """Of every kind a little."""
    generator = torch.Generator().manual_seed(step)
    return {
        "model": {
            "weight": torch.randn(40, 30, generator=generator),
            "half": torch.randn(33, generator=generator).bfloat16(),
            "large": torch.randn(64, 300, generator=generator),
            "scalar": torch.tensor(float(step)),
            "none": torch.empty(0, 3),
            "mask": torch.rand(5, generator=generator) > 0.5,
        },
        "ids": torch.arange(step, step + 7),
        "step": step,
        "name": f"step {step}",
        "position": {"file": f"shard-{step}", "offsets": [step, 2, (3, None)], "rate": 0.1 * step},
        "generator": generator.get_state(),
        "array": np.arange(step, step + 5, dtype=np.int16),
    }


def blank(value: Any) -> Any:
    """A state to be filled: of the same shape, with nothing of the content."""
    if isinstance(value, torch.Tensor):
        return torch.zeros_like(value)
    if type(value) is dict:
        return {key: blank(one) for key, one in value.items()}
    return np.zeros_like(value) if isinstance(value, np.ndarray) else type(value)()


def equal(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    return bool(one == other)


def _read_ours() -> str:
    found = blank(state(NEWER))
    with Checkpointer(URL) as ckpt:
        step = ckpt.restore(found)
    if step is None:
        return NOTHING
    if step not in (OLDER, NEWER) or not equal(found, state(step)):
        raise Wrong(f"step {step}: {found}")
    return RIGHT if step == NEWER else OLD


def _read_stock() -> str:
    found = blank(_without_arrays(state(NEWER)))
    reader = ShardReader(URL, no_dist=True)
    reader.read_metadata()  # what it raises, `dcp.load` puts into the text of an error of torch's
    try:
        dcp.load(found, storage_reader=reader, no_dist=True)
    except CheckpointException as error:
        first, _ = next(iter(error.failures.values()))
        # nothing but the file's own sense guards stock DCP's metadata, so that a key or a size may be another
        if str(first).startswith(("Missing key in checkpoint state_dict", "Size mismatch between saved")):
            return PLANNER
        raise first from None
    if not equal(found, _without_arrays(state(NEWER))):
        raise Wrong(str(found))
    return RIGHT


def _verify() -> str:
    """Says nothing of the content: a problem is found, or the run is read next."""
    location = inspection.locate(URL)
    for prefix in inspection.checkpoints(location):
        inspection.verify(location.store, prefix)
    return VERIFIED


def _without_arrays(value: dict[str, Any]) -> dict[str, Any]:
    return {key: one for key, one in value.items() if key != "array"}  # stock DCP cannot save one safely


def specimens(folder: Path | None = None) -> list[Specimen]:
    """One for each reader of each run; made anew, or of what `keep` left in a folder."""
    runs = {"ours": _save_ours(), "stock": _save_stock()} if folder is None else _kept(folder)
    readers = {"ours": (_read_ours, _read_ours, _verify), "stock": (_read_stock, _verify)}
    return [Specimen(name, runs[name], read) for name, of_run in readers.items() for read in of_run]


def keep(found: list[Specimen], folder: Path) -> None:
    """For `specimens`: names and times differ from run to run, so a seed alone says too little."""
    shutil.rmtree(folder, ignore_errors=True)
    for specimen in found:
        for name, data in specimen.objects.items():
            path = folder / specimen.name / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


def _kept(folder: Path) -> dict[str, Objects]:
    return {
        run.name: {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}
        for run in folder.iterdir()
    }


def _save_ours() -> Objects:
    put_in_place({})
    with Checkpointer(URL) as ckpt:
        for step in (OLDER, NEWER):
            ckpt.save(step, state(step), wait=True)
            assert ckpt.wait()
    return objects()


def _save_stock() -> Objects:
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "a single process"
        dcp.save(_without_arrays(state(NEWER)), checkpoint_id=folder, no_dist=True)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def put_in_place(found: Objects) -> None:
    """The store holds those objects and no others."""
    for info in _store.list(""):
        _store.delete(info.key)
    for name, data in found.items():
        _store.put(name, [data])


def objects() -> dict[str, bytes]:
    return {info.key: _store.read(info.key) for info in _store.list("")}


def outcome(specimen: Specimen, found: Objects) -> str:
    """What reading the damaged run comes to: an outcome of the reader's, or the name of an error of `storage`.

    Raises Wrong, and any other error that has no business there.
    """
    put_in_place(found)
    try:
        return specimen.read()
    except StorageError as error:
        if "\n" in str(error):
            raise Wrong(f"an error of several lines: {error}") from error
        return f"error: {type(error).__name__}"
