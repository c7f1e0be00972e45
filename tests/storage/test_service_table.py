"""What a rank hands to the service is stored as the rank would have stored it, byte for byte."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest
import torch

from storage.arena.slot import Slot
from storage.errors import Corrupt
from storage.format.containers import Container
from storage.format.framing import FramedItem
from storage.format.manifest import TensorEntry, ValueEntry
from storage.format.tensors import tensor_over
from storage.format.values import encode_value
from storage.run.attempt import StateContents
from storage.saving.saveplan import Chunk
from storage.saving.writing import Payload, write_payloads
from storage.service import table
from storage.stores.memory import MemoryStore

ATTEMPT = "a" * 8
CONTENTS = StateContents(
    {"w": TensorEntry(dtype="float32", shape=(3, 1000), path=("w",))},
    {"n": ValueEntry(path=("n",))},
    (Container(path=(), kind="dict", keys=("w", "n"), names=("w", "n")),),
)


def chunk(key: str, tensor: torch.Tensor | None = None) -> Chunk:
    if tensor is None:
        return Chunk(key, (key,), None, None, None, "", 0)
    shape = tuple(tensor.shape)
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Chunk(key, (key,), (0,) * len(shape), shape, shape, dtype, tensor.nbytes)


def payloads(slot: Slot | None) -> list[Payload]:
    """Tensors of some kinds, several of one, and values."""
    found, at = [], 0
    for number, (dtype, shape) in enumerate(
        [*[(torch.float32, (3, 1000))] * 3, (torch.bfloat16, ()), (torch.int64, (7,)), (torch.uint8, (2 << 20,))]
    ):
        tensor = torch.arange(torch.Size(shape).numel()).add(number).to(dtype).reshape(shape)
        if slot is not None:
            copy = tensor_over(slot.memory[at:], dtype, shape)
            copy.copy_(tensor)
            tensor, at = copy, at + -(-tensor.nbytes // 64) * 64
        found.append(Payload(chunk(f"t{number}", tensor), tensor))
    return [*found, Payload(chunk("n"), encode_value("n", {"a": [1, "b"]}))]


def stored(found: list[Payload]) -> tuple[dict[str, bytes], object]:
    store = MemoryStore("x")
    objects, items = write_payloads(store, "", ATTEMPT, 3, found)
    return {entry.name: store.read(entry.name) for entry in objects}, items


@pytest.mark.parametrize("has_slot", [True, False])
def test_a_table_stores_what_the_payloads_would(has_slot: bool) -> None:
    slot = Slot.create(8 << 20) if has_slot else None
    mine = payloads(slot)
    written = table.write(mine, slot, CONTENTS, None)
    read = table.read(Slot.from_fd(_copy(written)), None if slot is None else Slot.from_fd(_copy(slot)))
    assert read.contents == CONTENTS
    assert read.staging_error is None
    assert any(isinstance(payload.content, FramedItem) for payload in read.payloads), "the framing travels"
    assert stored(read.payloads) == stored(mine)
    if slot is not None:
        assert written.size_bytes < 1 << 20, "tensors that lie in the slot are not copied"


def test_why_nothing_was_staged_travels_as_well() -> None:
    read = table.read(table.write([], None, None, "MemoryError: no room"), None)
    assert (read.payloads, read.contents, read.staging_error) == ([], None, "MemoryError: no room")


def test_a_damaged_table_is_refused() -> None:
    written = table.write(payloads(None), None, CONTENTS, None)
    written.memory[200] ^= 1
    with pytest.raises(Corrupt, match="damaged"):
        table.read(written, None)
    written.memory[:8] = b"\x7f" * 8
    with pytest.raises(Corrupt, match="longer than its slot"):
        table.read(written, None)


def test_a_table_that_reaches_out_of_its_slot_is_refused() -> None:
    slot = Slot.create(8 << 20)
    written = table.write(payloads(slot), slot, None, None)
    with pytest.raises(Corrupt, match="bytes that are not in its slot"):
        table.read(written, Slot.create(4096))
    with pytest.raises(Corrupt, match="bytes that are not in its slot"):
        table.read(written, None)


def test_what_is_not_sealed_is_no_slot() -> None:
    fd = os.memfd_create("x")
    os.ftruncate(fd, 4096)
    with pytest.raises(ValueError, match="no slot"):
        Slot.from_fd(fd)


def test_the_service_needs_no_torch() -> None:
    script = "import sys, storage.service.process\nprint('torch' in sys.modules, 'boto3' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_every_field_of_the_contents_travels() -> None:
    assert {field.name for field in dataclasses.fields(StateContents)} == {
        field.name for field in dataclasses.fields(table.ContentsRow)
    }


def _copy(slot: Slot) -> int:
    return os.dup(slot.fd)
