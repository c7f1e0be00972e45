"""Several documents in a sequence: what each token sees, what is predicted, and that no split changes it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from elastic_moe.config import JobConfig
from elastic_moe.data.corpus import Corpus
from elastic_moe.data.order import Share, Split
from elastic_moe.data.packing import documents_of, predicted
from elastic_moe.model.attention import document_mask
from elastic_moe.model.decoder import Decoder
from elastic_moe.parallel import init_weights
from elastic_moe.trainer.batches import Batches, count_targets
from tests.moe.cases import SMALL, fitted
from tests.moe.test_training import job, run_legs, validated, whole_curve
from tests.ranks import Ranks

END = 0


def test_documents_of_a_window() -> None:
    windows = np.array([[5, 6, END, 7, END, END, 8], [END, 1, 2, 3, 4, 5, END]])
    assert documents_of(windows, END).tolist() == [[0, 0, 0, 1, 1, 2], [0, 1, 1, 1, 1, 1]]
    assert predicted(windows, END).tolist() == [[True, True, False, True, False, False], [False] + [True] * 5]


@given(tokens=st.lists(st.integers(0, 2), min_size=2, max_size=20))
def test_a_document_ends_with_its_end(tokens: list[int]) -> None:
    """By a plain count: a position's document is how many ends lie before it, and an end predicts nothing."""
    window = np.array([tokens])
    assert documents_of(window, END)[0].tolist() == [tokens[:i].count(END) for i in range(len(tokens) - 1)]
    assert predicted(window, END)[0].tolist() == [token != END for token in tokens[:-1]]


def test_a_mask_is_causal_within_documents() -> None:
    mask = document_mask(torch.tensor([[0, 0, 1, 1, 1]]))
    assert mask.shape == (1, 1, 5, 5)
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]


def decoder(dtype: torch.dtype = torch.float32) -> Decoder:
    model = Decoder(SMALL)
    init_weights(model, seed=0)
    for param in model.parameters():
        if param.ndim > 1:
            param.data.mul_(5.0)  # so that attention matters
    return model.to(dtype).eval()


@torch.no_grad()
def test_each_document_has_the_logits_that_it_has_alone() -> None:
    """Positions go on counting: the rotary embedding makes attention depend on distances alone."""
    model = decoder()
    documents = [torch.randint(1, 64, (n,), generator=torch.Generator().manual_seed(n)) for n in (9, 1, 20, 3)]
    joined = torch.cat([torch.cat([document, torch.tensor([END])]) for document in documents])
    numbers = torch.from_numpy(documents_of(torch.cat([joined, joined[:1]])[None].numpy(), END))
    together = model(joined[None], documents_BS=numbers).logits_BSV[0]
    at = 0
    for document in documents:
        alone = model(torch.cat([document, torch.tensor([END])])[None]).logits_BSV[0]
        torch.testing.assert_close(together[at : at + len(alone)], alone, rtol=1e-4, atol=1e-5)
        at += len(alone)
    mixed = model(joined[None]).logits_BSV[0]
    assert (mixed - together)[10:].abs().max() > 0.05


def test_a_mask_of_one_document_is_none() -> None:
    """With gradients, recomputed or not, and in the dtype of the job."""
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        model = decoder(dtype)
        tokens = torch.randint(1, 64, (2, 16), generator=torch.Generator().manual_seed(1))
        grads: list[Tensor] = []
        zeros = torch.zeros(2, 16, dtype=torch.int64)
        for documents, recompute in ((None, False), (zeros, False), (zeros, True)):
            model.recompute = recompute
            out = model(tokens, documents_BS=documents)
            (grad,) = torch.autograd.grad(out.logits_BSV.float().square().mean(), [model.embed.weight])
            grads.append(grad.float())
        torch.testing.assert_close(grads[0], grads[1], rtol=tolerance, atol=tolerance)
        assert torch.equal(grads[1], grads[2])


@torch.no_grad()
def test_what_follows_an_end_is_not_predicted_from_it() -> None:
    """Nor counted; padding neither."""
    tokens = np.array([1, 2, END, 3, 4, 5, END, END, 6, 7, 8, 9, END, 1, 2, 3, 4], dtype=np.uint8)
    corpus = Corpus((tokens,), "", seq_len=8, end_of_document=END)
    share = Share(start=0, stop=2, micro_batch=3, rounds=1)
    (batch,) = Batches(corpus, Split(2), 0, 2, 64, share, torch.device("cpu")).of_step(0)
    out = batch.forward(decoder())
    expected = [
        F.cross_entropy(out.logits_BSV[b, s], batch.windows_BS[b, s + 1])
        for b in range(2)
        for s in range(8)
        if batch.windows_BS[b, s] != END
    ]
    assert len(expected) == count_targets([batch, batch]) / 2 == 12
    assert float(batch.loss(out)) == pytest.approx(float(torch.stack(expected).sum()), rel=1e-5)
    assert batch._replace(predicted_BS=None).num_targets() == 16


def masked_job(folder: Path, **train: object) -> JobConfig:
    """Documents of a few bytes to some hundred, so that sequences hold one to many, and ends come by themselves too."""
    folder.mkdir(exist_ok=True)
    for i in range(60):
        (folder / f"{i:02d}.txt").write_text(f"{i} times {i} is {i * i}. " * (1 + i * i % 13) if i % 7 else "")
    what = job({"steps": 4, **train})
    return what.model_copy(
        update={"data": what.data.model_copy(update={"url": str(folder), "document_mask": True, "validation": 0.1})}
    )


def test_exact_runs_are_the_same_to_the_last_bit(ranks: Ranks, tmp_path: Path) -> None:
    """3 -> 2 ranks with experts spread, and one process, of a batch that 3 does not divide; recomputed or not."""
    what = masked_job(tmp_path / "texts", exact=True)
    again = what.model_copy(update={"train": what.train.model_copy(update={"recompute": True})})
    legs = run_legs(ranks, again, [fitted(what, expert=3), fitted(what, shard=2)], tmp_path / "resized")
    (alone,) = run_legs(ranks, what, [fitted(what)], tmp_path / "alone")
    assert whole_curve(legs) == pytest.approx(alone.losses, rel=1e-14)
    assert [name for name in alone.weights if not torch.equal(legs[-1].weights[name], alone.weights[name])] == []


def test_loss_and_validation_count_what_is_predicted(ranks: Ranks, tmp_path: Path) -> None:
    """The same on two ranks as on one, in micro-batches of another size; of an untrained model about ln 256."""
    what = masked_job(tmp_path / "texts")
    alone = ranks.run(validated, what, fitted(what), world_size=1)[0]
    halved = what.model_copy(update={"train": what.train.model_copy(update={"max_micro_batch": 2})})
    first, second = ranks.run(validated, halved, fitted(halved, expert=2), world_size=2)
    assert first == second == pytest.approx(alone, rel=1e-5)
    assert alone[0] == pytest.approx(np.log(256), abs=0.05)
