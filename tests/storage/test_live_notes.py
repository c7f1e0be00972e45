"""What is noted of a state after a step, and what of it may change before it is copied."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import nn

from storage.errors import UnsupportedValue
from storage.format.framing import EncodedItem
from storage.format.values import decode_value
from storage.live import notes
from storage.live.capture import NotCaptured, room_for, stage
from storage.live.notes import Note, NoteTaker

LARGE = notes._COPIED_BYTES_MAX // 4 + 1


def content_of(note: Note) -> dict[str, Any]:
    """What a capture of the note makes, by key: copies of tensors, values as they are read back."""
    memory = memoryview(bytearray(max(1, room_for(note))))
    payloads = stage(note, memory, time.monotonic() + 60)
    return {
        payload.chunk.key: payload.content.clone()
        if isinstance(payload.content, torch.Tensor)
        else decode_value(b"".join(map(bytes, payload.content.buffers)), payload.chunk.key)
        for payload in payloads
    }


def trained() -> tuple[nn.Module, torch.optim.Optimizer, dict[str, Any]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    state = {"model": model, "optimizer": optimizer, "progress": {"step": 1, "seen": [1, 2]}}
    return model, optimizer, state


def test_a_note_is_of_the_moment_it_was_taken() -> None:
    model, optimizer, state = trained()
    taker = NoteTaker(0, [optimizer])
    for step in (1, 2):  # the first finds out how the state lies, the second has that
        state["progress"]["step"] = step
        expected = {f"model.{name}": value.clone() for name, value in model.state_dict().items()}
        expected |= {
            f"optimizer.state.{name}.exp_avg": optimizer.state[parameter]["exp_avg"].clone()
            for name, parameter in model.named_parameters()
        }
        note = taker.take(step, state)
        model(torch.randn(5, 3)).sum().backward()  # moves the running means
        state["progress"]["step"] = 99
        state["progress"]["seen"].append(step)
        assert not torch.equal(model.state_dict()["1.running_mean"], expected["model.1.running_mean"])
        found = content_of(note)
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        assert found["progress.step"] == step
        assert len(found["progress.seen"]) == step + 1
        assert found["optimizer.param_groups.0.lr"] == 0.1
        assert {chunk.key for chunk in taker.share.chunks} == set(found)


def test_what_an_optimizer_has_written_to_is_no_more_what_was_noted() -> None:
    _, optimizer, state = trained()
    note = NoteTaker(0, [optimizer]).take(1, state)
    optimizer.step()
    with pytest.raises(NotCaptured, match=r"was written to after step 1 was noted, and \d+ more were: what is changed"):
        content_of(note)


@pytest.mark.parametrize("foreach", [True, False])
def test_an_optimizer_moves_the_versions(foreach: bool) -> None:
    """A fused one does not, which is one reason for the lock."""
    parameter = nn.Parameter(torch.ones(4))
    parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.AdamW([parameter], lr=0.1, foreach=foreach)
    optimizer.step()
    state = {"parameter": parameter, "moment": optimizer.state[parameter]["exp_avg"]}
    note = NoteTaker(0, [optimizer]).take(1, state)
    assert all(noted.is_as_noted() for noted in note.tensors)
    optimizer.step()
    assert not any(noted.is_as_noted() for noted in note.tensors)


def test_a_large_tensor_that_no_optimizer_has() -> None:
    """It is copied when it is asked for, and refused if somebody has written to it since."""
    average = torch.ones(LARGE)
    state = {"average": average, "small": torch.ones(3)}
    note = NoteTaker(0, []).take(1, state)
    state["small"].zero_()
    found = content_of(note)
    assert found["small"].tolist() == [1, 1, 1]
    assert torch.equal(found["average"], torch.ones(LARGE))
    average[0] = 2
    with pytest.raises(NotCaptured, match="state 'average' was written to after step 1 was noted: what is changed"):
        content_of(note)


def test_a_deadline_ends_the_copying() -> None:
    note = NoteTaker(0, []).take(1, {"tensor": torch.ones(3)})
    with pytest.raises(NotCaptured, match="step 1 could not be copied in time"):
        stage(note, memoryview(bytearray(room_for(note))), time.monotonic() - 1)


class Copying:
    """An object whose `state_dict` copies."""

    def __init__(self, num: int) -> None:
        self.tensor = torch.ones(num)

    def state_dict(self) -> dict[str, Any]:
        return {"tensor": self.tensor.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tensor = state["tensor"]


def test_a_state_that_is_copied_each_time_is_too_costly() -> None:
    small, large = {"object": Copying(3)}, {"object": Copying(LARGE)}
    taker = NoteTaker(0, [])
    for step in range(8):
        small["object"].tensor.fill_(step)
        assert content_of(taker.take(step, small))["object.tensor"].tolist() == [step] * 3
    taker = NoteTaker(0, [])
    held = []
    with pytest.raises(UnsupportedValue, match=r"state 'object\.tensor' is another tensor after each step"):
        held += [taker.take(step, large) for step in range(8)]


def test_a_tensor_that_takes_anothers_place_is_found() -> None:
    state = {"tensor": torch.ones(3)}
    taker = NoteTaker(0, [])
    first = taker.take(1, state)
    state["tensor"] = torch.zeros(3)
    second = taker.take(2, state)
    state["more"] = torch.zeros(2)
    third = taker.take(3, state)
    assert content_of(first)["tensor"].tolist() == [1, 1, 1]
    assert content_of(second)["tensor"].tolist() == [0, 0, 0]
    assert first.digest == second.digest != third.digest


def test_values_are_encoded_once_as_long_as_they_are_the_same() -> None:
    state: dict[str, Any] = {"step": 1, "names": ["a", "b"], "odd": {1: 2.0}}
    taker = NoteTaker(0, [])

    def items() -> dict[str, EncodedItem]:
        return {chunk.key: item for chunk, item in taker.take(1, state).values}

    first = items()
    state["step"] = 2
    second = items()
    assert second["names"] is first["names"]
    assert second["step"] is not first["step"]
    state["names"].append("c")
    assert items()["names"] is not first["names"]
