"""Data as a pure function of the step: order, shares, corpora."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_moe.data.corpus import Corpus
from elastic_moe.data.order import Split, ids, permute, share
from elastic_moe.errors import UserError
from elastic_moe.trainer.batches import Batches

worlds = st.integers(1, 16)
batches = st.integers(1, 70)


@settings(deadline=None)
@given(num_items=st.integers(1, 3000), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 2**40))
def test_permute_is_a_permutation(num_items: int, seed: int, epoch: int) -> None:
    images = permute(np.arange(num_items), num_items, seed=seed, epoch=epoch)
    assert np.array_equal(np.sort(images), np.arange(num_items))


def test_order_never_changes() -> None:
    """A job that is resumed by a newer release must see the samples it would have seen: these numbers are frozen."""
    assert ids(seed=7, step=3, global_batch=6, num_samples=1000).tolist() == [685, 109, 63, 352, 271, 341]


def test_order_looks_random() -> None:
    """Neighbours land anywhere: the mean jump of a uniform order is a third of the range."""
    images = permute(np.arange(100_000), 100_000, seed=0, epoch=0)
    assert np.abs(np.diff(images)).mean() == pytest.approx(100_000 / 3, rel=0.02)
    other = permute(np.arange(100_000), 100_000, seed=0, epoch=1)
    assert (images == other).mean() < 1e-3


@settings(deadline=None)
@given(seed=st.integers(0, 2**31), global_batch=batches, num_samples=st.integers(1, 200))
def test_an_epoch_holds_every_sample_once(seed: int, global_batch: int, num_samples: int) -> None:
    num_steps = -(-2 * num_samples // global_batch)
    drawn = np.concatenate([ids(seed, step, global_batch, num_samples) for step in range(num_steps)])
    for epoch in range(2):
        of_epoch = drawn[epoch * num_samples : (epoch + 1) * num_samples]
        assert np.array_equal(np.sort(of_epoch), np.arange(num_samples))


@settings(max_examples=60, deadline=None)
@given(world_size=worlds, global_batch=batches, micro_batch=st.integers(1, 8), step=st.integers(0, 50))
def test_ranks_together_train_each_sample_once(world_size: int, global_batch: int, micro_batch: int, step: int) -> None:
    """Any world size, primes too: the same samples in the same step, equal rounds, the rest padding of no weight."""
    corpus = Corpus((np.arange(1201, dtype=np.uint16),), "", seq_len=4)
    rounds = -(-global_batch // (world_size * micro_batch))
    trained = []
    for rank in range(world_size):
        part = share(global_batch, rank=rank, world_size=world_size, micro_batch=micro_batch, rounds=rounds)
        split = Split(corpus.num_samples)
        of_rank = Batches(corpus, split, 5, global_batch, 1 << 16, part, torch.device("cpu")).of_step(step)
        assert len(of_rank) == rounds
        for windows_BS, real_B, *_ in of_rank:
            assert windows_BS.shape == (micro_batch, 5)
            trained += windows_BS[real_B][:, 0].tolist()
    assert trained == [4 * int(i) for i in ids(5, step, global_batch, corpus.num_samples)]


@settings(deadline=None)
@given(num_samples=st.integers(2, 300), part=st.floats(0.001, 0.9), global_batch=batches)
def test_what_is_held_out_is_never_trained_on(num_samples: int, part: float, global_batch: int) -> None:
    split = Split.of(num_samples, part)
    held_out = split.held_out(0, num_samples).tolist()
    assert 1 <= len(held_out) == len(set(held_out)) == split.num_held_out < num_samples
    num_steps = -(-(num_samples - len(held_out)) // global_batch)
    trained = {int(i) for step in range(num_steps) for i in split.trained(3, step, global_batch)}
    assert trained.isdisjoint(held_out)
    assert trained | set(held_out) == set(range(num_samples))


def test_without_a_part_held_out_the_order_is_as_ever() -> None:
    split = Split.of(1000, 0.0)
    assert split.trained(7, 3, 6).tolist() == [685, 109, 63, 352, 271, 341]
    assert split.held_out(0, 9).tolist() == []
    held_out = Split.of(1000, 0.01).held_out
    assert held_out(2, 4).tolist() == held_out(0, 10).tolist()[2:4]


def test_a_share_that_cannot_hold_the_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="do not hold a global batch of 32"):
        share(32, rank=0, world_size=5, micro_batch=3, rounds=2)


def test_windows_stay_within_their_shard() -> None:
    shards = (
        np.arange(0, 10, dtype=np.uint16),
        np.arange(100, 103, dtype=np.uint16),
        np.arange(200, 208, dtype=np.uint32),
    )
    corpus = Corpus(shards, "", seq_len=3)
    assert corpus.samples_per_shard == [3, 0, 2]
    expected = [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9], [200, 201, 202, 203], [203, 204, 205, 206]]
    assert corpus.windows(np.arange(5)).tolist() == expected


def test_a_vocabulary_too_small_is_told(tmp_path: Path) -> None:
    corpus = Corpus((np.full(100, 99, dtype=np.uint16),), "", seq_len=4)
    whole = share(2, rank=0, world_size=1, micro_batch=2, rounds=1)
    with pytest.raises(UserError, match=r"token 99 but model\.vocab_size is 64"):
        Batches(corpus, Split(corpus.num_samples), 0, 2, 64, whole, torch.device("cpu")).of_step(0)
