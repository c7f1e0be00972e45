"""What a process had made of a file of the token cache when it was killed."""

from __future__ import annotations

import contextlib
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elastic_moe.data import cache, corpus, sources
from elastic_moe.data.cache import TokenCache, TokenSink
from elastic_moe.errors import UserError
from tests.moe.test_token_cache import GIB, npy, opened, remote


class Killed(BaseException):
    """As a process ends in the middle, but for its memory."""


def hundreds(seen: list[int], stop: int = 9, error: type[BaseException] = Killed) -> Callable[[TokenSink], None]:
    """Ten times a hundred ids, of which those that are there are left out; it ends before `stop`."""

    def make(sink: TokenSink) -> None:
        for number in range(sink.done, 10):
            if number > stop:
                raise error("on purpose")
            seen.append(number)
            sink.append(np.full(100, number, dtype=np.uint16))
            sink.mark(number + 1)

    return make


@pytest.mark.parametrize("harm", ["", "behind the mark", "in the mark", "in the ids", "cut"])
def test_what_a_killed_process_has_made_is_gone_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    monkeypatch.setattr(cache, "_MARK_BYTES", 500)  # every third hundred
    monkeypatch.setattr(cache, "_BUFFER_IDS", 200)
    key, seen = "ab" * 20, list[int]()
    with pytest.raises(Killed):
        TokenCache(tmp_path, GIB).arrays({key: hundreds(seen, stop=6)})
    partial = tmp_path / f"{key}.partial"
    content = partial.read_bytes()
    harmed = {
        "behind the mark": content + b"x",
        "in the mark": b"{" + content,
        "in the ids": content[:4100] + b"x" + content[4101:],
        "cut": content[:4200],
    }
    partial.write_bytes(harmed.get(harm, content))
    again: list[int] = []
    found = TokenCache(tmp_path, GIB).arrays({key: hundreds(again)})[key]
    assert found.tolist() == [number for number in range(10) for _ in range(100)]
    assert seen == [0, 1, 2, 3, 4, 5, 6]
    assert again[0] == (6 if harm in ("", "behind the mark") else 0)
    assert not partial.exists()
    assert TokenCache(tmp_path, GIB).arrays({key: hundreds(again, stop=-1)})[key].tolist() == found.tolist()


@pytest.mark.parametrize("error", [UserError, OSError])
def test_a_mistake_in_the_data_leaves_nothing_and_a_lost_store_what_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    monkeypatch.setattr(cache, "_MARK_BYTES", 500)
    with pytest.raises(error):
        TokenCache(tmp_path, GIB).arrays({"ab" * 20: hundreds([], stop=6, error=error)})
    assert len(list(tmp_path.glob("*.partial"))) == (error is OSError)


@pytest.mark.parametrize("name", ["d.txt", "d.jsonl.gz", "d.npy"])
def test_a_large_file_is_read_once_however_often_its_reader_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The tokens are those of a reader that nobody killed."""
    lines = [json.dumps({"text": f"line {i} " * 9}).encode() for i in range(400)]
    kinds = {"txt": b"\n".join(lines), "jsonl.gz": gzip.compress(b"\n".join(lines))}
    url = remote(name, kinds.get(name[2:]) or npy(np.arange(9000, dtype=np.uint16)))
    expected = opened(url, tmp_path / "unbroken").fingerprint
    patches = {(cache, "_MARK_BYTES"): 3000, (cache, "_BUFFER_IDS"): 100, (sources, "_PART_BYTES"): 700}
    patches |= {(corpus, "_BATCH_BYTES"): 900, (corpus, "_COPY_BYTES"): 999}
    for (module, constant), number in patches.items():
        monkeypatch.setattr(module, constant, number)
    append, taken, kills = TokenSink.append, [0], 0

    def counted(sink: TokenSink, ids: Any) -> None:
        taken[0] += len(ids)
        if taken[0] > 5000 * kills:
            raise Killed
        append(sink, ids)

    monkeypatch.setattr(TokenSink, "append", counted)
    while kills < 40:
        kills += 1
        with contextlib.suppress(Killed):  # by `counted`
            assert opened(url, tmp_path / "killed").fingerprint == expected
            break
    assert kills > 1
    num_tokens = opened(url, tmp_path / "killed").num_tokens
    assert num_tokens <= taken[0] < num_tokens + 4500 * kills
