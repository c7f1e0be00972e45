"""Initial weights: the same bits on any mesh, drawn by whoever holds them, and only where there is no checkpoint."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from elastic_moe.parallel import gather_full
from elastic_moe.parallel.draws import fill_normal, normals, philox
from launcher.rounds.mesh import MeshPlan
from tests import sample
from tests.moe.cases import SMALL, build, layout
from tests.ranks import Ranks


def in_plain_integers(counter: int, key: int) -> list[int]:
    a, b, c, d = counter & 0xFFFFFFFF, counter >> 32, 0, 0
    low, high = key & 0xFFFFFFFF, key >> 32
    for _ in range(10):
        left, right = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (right >> 32) ^ b ^ low, right & 0xFFFFFFFF, (left >> 32) ^ d ^ high, left & 0xFFFFFFFF
        low, high = (low + 0x9E3779B9) & 0xFFFFFFFF, (high + 0xBB67AE85) & 0xFFFFFFFF
    return [a, b, c, d]


def test_philox_gives_its_published_words() -> None:
    """Random123's known answer for zeros; the others are those of the same rounds in Python's own integers."""
    assert philox(0, 1, 0).tolist() == [[0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]]
    for counter, key in ((0, 1), (0xFFFFFFFE, 0xA4093822299F31D0), (1 << 62, (1 << 64) - 1)):
        assert philox(counter, 3, key).tolist() == [in_plain_integers(counter + i, key) for i in range(3)]


def test_normals_are_normal_and_know_their_place() -> None:
    drawn = normals(0, 1_000_000, key=5)
    assert abs(float(drawn.mean())) < 4e-3
    assert float(drawn.std()) == pytest.approx(1.0, abs=3e-3)
    assert float(drawn.pow(4).mean()) == pytest.approx(3.0, abs=0.03)
    for limit, share in ((1.0, 0.15866), (2.0, 0.02275), (3.0, 0.00135)):
        assert float((drawn > limit).double().mean()) == pytest.approx(share, rel=0.1)
    assert drawn.unique().numel() > 900_000
    for first, count in itertools.product((0, 1, 3, 4, 777), (1, 2, 5, 1000)):
        assert torch.equal(normals(first, count, key=5), drawn[first : first + count])
    assert not torch.equal(normals(0, 100, key=6), drawn[:100])


@pytest.mark.parametrize("chunk", [1 << 18, 50])
def test_any_box_of_a_tensor_holds_the_elements_of_its_place(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr("elastic_moe.parallel.draws._CHUNK", chunk)
    whole = torch.empty(5, 6, 7)
    fill_normal(whole, (0, 0, 0), (5, 6, 7), key=3, std=0.5)
    assert whole.flatten().unique().numel() == whole.numel()
    for d0, d1, d2 in itertools.product(((0, 5), (2, 4), (3, 3)), ((0, 6), (1, 2)), ((0, 7), (5, 7))):
        box = torch.empty(d0[1] - d0[0], d1[1] - d1[0], d2[1] - d2[0])
        fill_normal(box, (d0[0], d1[0], d2[0]), (5, 6, 7), key=3, std=0.5)
        assert torch.equal(box, whole[d0[0] : d0[1], d1[0] : d1[1], d2[0] : d2[1]])


def initial(plan: MeshPlan) -> dict[str, Tensor]:
    return gather_full(dict(build(SMALL, plan)[0].state_dict()))


def test_initial_weights_are_the_same_bits_on_any_mesh(ranks: Ranks) -> None:
    (alone,) = ranks.run(initial, layout(), world_size=1)
    assert all(tensor.isfinite().all() for tensor in alone.values())
    plans = [layout(shard=2), layout(expert=2), layout(replicate=2), layout(shard=3), layout(expert=3)]
    plans += [layout(shard=2, expert=2), layout(replicate=2, shard=2), layout(shard=4)]
    for plan in plans if sample.IS_WHOLE else plans[3:7]:  # all kinds, and what does not divide
        for weights in ranks.run(initial, plan, world_size=plan.world_size):
            assert [name for name, tensor in weights.items() if not torch.equal(tensor, alone[name])] == [], plan
