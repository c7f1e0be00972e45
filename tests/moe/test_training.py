"""Runs of several steps: the same curve on any world, through resizes, and as it always was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.backends.debugging import aot_eager

from elastic_moe.config import JobConfig
from elastic_moe.data import DataConfig
from elastic_moe.model.attention import Attention
from elastic_moe.model.decoder import Decoder
from elastic_moe.parallel import build_mesh, init_weights
from elastic_moe.trainer.setup import set_up
from launcher.rounds.mesh import MeshPlan
from tests import sample
from tests.moe.cases import SMALL, Leg, fitted, train_leg
from tests.ranks import Ranks

GOLDEN = Path(__file__).with_name("golden_loss.json")


def job(train: dict[str, Any] | None = None, model: dict[str, Any] | None = None) -> JobConfig:
    small = SMALL.model_copy(update={"vocab_size": 256, **(model or {})})
    return JobConfig.model_validate(
        {
            "model": small.model_dump(),
            "optim": {"lr": 4e-3, "warmup_steps": 2},
            "train": {"steps": 12, "global_batch": 8, "seq_len": 32, **(train or {})},
        }
    )


def run_legs(ranks: Ranks, what: JobConfig, plans: list[MeshPlan], folder: Path) -> list[Leg]:
    """The run, cut into one leg of equal length for each plan."""
    length = what.train.steps // len(plans)
    return [
        ranks.run(train_leg, what, plan, i * length, (i + 1) * length, folder, world_size=plan.world_size)[0]
        for i, plan in enumerate(plans)
    ]


def whole_curve(legs: list[Leg]) -> list[float]:
    return [loss for leg in legs for loss in leg.losses]


EXACT_RUNS = {  # on 4, 3, 2 and 4 ranks again, every kind of parallelism among them
    "sequence": ({"top_k": 2, "num_experts": 6}, [(1, 2, 2), (1, 1, 3), (2, 1, 1), (1, 4, 1)]),
    "global": ({"top_k": 1, "num_experts": 8}, [(2, 1, 2), (1, 1, 3), (1, 1, 2), (1, 2, 2)]),
    "bias": ({"top_k": 3, "num_experts": 5}, [(1, 2, 2), (1, 1, 3), (1, 1, 2), (1, 1, 4)]),
    "quantile": ({"top_k": 2, "num_experts": 8}, [(1, 1, 4), (1, 1, 3), (1, 2, 1), (2, 1, 2)]),
}


@pytest.mark.parametrize("balance", ["global", "bias", sample.rest("sequence"), sample.rest("quantile")])
def test_exact_run_through_resizes_equals_one_process_bit_for_bit(ranks: Ranks, tmp_path: Path, balance: str) -> None:
    """Also a batch that 3 does not divide, experts that neither 2, 3 nor 4 do, and a rank that holds none.

    The other ways to balance are exact in tests below: by quantiles from eight ranks to five, by sequences on three.
    """
    model, degrees = EXACT_RUNS[balance]
    what = job({"exact": True}, {"balance": balance, **model})
    plans = [fitted(what, *each) for each in degrees]
    legs = run_legs(ranks, what, plans, tmp_path / "resized")
    (alone,) = run_legs(ranks, what, [fitted(what)], tmp_path / "alone")
    assert whole_curve(legs) == pytest.approx(alone.losses, rel=1e-14)
    assert alone.losses[-1] < alone.losses[0] - 0.5
    assert not different(legs[-1], alone)
    assert bool(alone.weights["layers.0.moe.router.expert_bias"].any()) == what.model.moves_bias


def test_exact_run_from_eight_ranks_to_five(ranks: Ranks, tmp_path: Path) -> None:
    """Eight experts on eight ranks, then on five, of which the last holds none, and in the middle of the warm-up."""
    what = job({"exact": True, "steps": 4}, {"balance": "quantile", "num_experts": 8})
    what = what.model_copy(update={"optim": what.optim.model_copy(update={"warmup_steps": 3})})
    legs = run_legs(ranks, what, [fitted(what, expert=8), fitted(what, expert=5)], tmp_path / "resized")
    (alone,) = run_legs(ranks, what, [fitted(what)], tmp_path / "alone")
    assert whole_curve(legs) == pytest.approx(alone.losses, rel=1e-14)
    assert not different(legs[-1], alone)


def different(leg: Leg, expected: Leg) -> list[str]:
    """Names of parameters, buffers and moments that differ in a bit."""
    return [name for name, tensor in expected.weights.items() if not torch.equal(leg.weights[name], tensor)]


def test_ranks_without_a_sequence_take_part(ranks: Ranks, tmp_path: Path) -> None:
    """A batch of 2 on 3 ranks, of a corpus whose epoch ends within a step."""
    text = tmp_path / "text.txt"
    text.write_text("a few words, and then some more of them" * 2)
    what = job({"exact": True, "global_batch": 2}).model_copy(update={"data": DataConfig(url=text)})
    legs = run_legs(ranks, what, [fitted(what, expert=3)], tmp_path / "three")
    (alone,) = run_legs(ranks, what, [fitted(what)], tmp_path / "alone")
    assert legs[0].losses == pytest.approx(alone.losses, rel=1e-14)
    assert all(torch.equal(legs[0].weights[name], tensor) for name, tensor in alone.weights.items())


def counted_leg(what: JobConfig, plan: MeshPlan, folder: Path) -> tuple[Leg, int]:
    """A run, and how often a layer's attention was computed."""
    calls = 0
    forward = Attention.forward

    def counted(*args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return forward(*args)

    try:
        Attention.forward = counted  # type: ignore[method-assign]
        return train_leg(what, plan, 0, what.train.steps, folder), calls
    finally:
        Attention.forward = forward  # type: ignore[method-assign]


@pytest.mark.parametrize("keep_gathered", [False, sample.rest(True)])
def test_recomputed_layers_change_no_bit(ranks: Ranks, tmp_path: Path, keep_gathered: bool) -> None:
    """On every kind of parallelism at once; loads, and so the biases that follow them, are counted once."""
    what = job({"steps": 4, "exact": True, "keep_gathered": keep_gathered}, {"balance": "bias"})
    plan = fitted(what, shard=2, expert=2)
    again = what.model_copy(update={"train": what.train.model_copy(update={"recompute": True})})
    kept, num_once = ranks.run(counted_leg, what, plan, tmp_path / "kept", world_size=4)[0]
    recomputed, num_twice = ranks.run(counted_leg, again, plan, tmp_path / "recomputed", world_size=4)[0]
    assert num_twice == 2 * num_once
    assert recomputed.losses == kept.losses
    assert [name for name, tensor in kept.weights.items() if not torch.equal(recomputed.weights[name], tensor)] == []
    assert kept.weights["layers.0.moe.router.expert_bias"].any()


def compiled_leg(what: JobConfig, plan: MeshPlan, folder: Path) -> tuple[Leg, int]:
    """A run whose layers torch.compile traces, and how many graphs it made; no C++ compiler is asked."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    compile_attention = Decoder.compile_attention
    try:
        Decoder.compile_attention = lambda model, **_: compile_attention(model, backend)  # type: ignore[method-assign]
        return train_leg(what, plan, 0, what.train.steps, folder), len(graphs)
    finally:
        Decoder.compile_attention = compile_attention  # type: ignore[method-assign]


@pytest.mark.parametrize("dtype", [sample.rest("float32"), "bfloat16"])
def test_compiled_layers_train_as_others_do(ranks: Ranks, tmp_path: Path, dtype: str) -> None:
    what = job({"steps": 3, "dtype": dtype, "compile": True, "recompute": True})
    eager = what.model_copy(update={"train": what.train.model_copy(update={"compile": False, "recompute": False})})
    plan = fitted(what, expert=2)
    leg, num_graphs = ranks.run(compiled_leg, what, plan, tmp_path / "compiled", world_size=2)[0]
    (expected,) = run_legs(ranks, eager, [plan], tmp_path / "eager")
    assert num_graphs >= 1
    assert leg.losses == pytest.approx(expected.losses, rel=1e-5 if dtype == "float32" else 1e-2)


@pytest.mark.parametrize(
    ("balance", "num_experts"), [("sequence", 6), sample.rest("global", 8), sample.rest("quantile", 5)]
)
def test_default_run_through_resizes_keeps_its_curve(
    ranks: Ranks, tmp_path: Path, balance: str, num_experts: int
) -> None:
    what = job({"max_micro_batch": 2}, {"balance": balance, "num_experts": num_experts})
    plans = [fitted(what, replicate=2, expert=2), fitted(what, expert=3), fitted(what, shard=2)]
    curve = whole_curve(run_legs(ranks, what, plans, tmp_path / "resized"))
    (alone,) = run_legs(ranks, what, [fitted(what)], tmp_path / "alone")
    assert curve == pytest.approx(alone.losses, rel=1e-6)


def test_resumed_on_the_same_mesh_is_bitwise_the_same(ranks: Ranks, tmp_path: Path) -> None:
    what = job()
    plan = fitted(what, shard=2)
    first, second = run_legs(ranks, what, [plan, plan], tmp_path / "cut")
    (unbroken,) = run_legs(ranks, what, [plan], tmp_path / "unbroken")
    assert first.losses + second.losses == unbroken.losses
    assert first.norms + second.norms == unbroken.norms
    assert all(torch.equal(second.weights[name], tensor) for name, tensor in unbroken.weights.items())


def validated(what: JobConfig, plan: MeshPlan) -> list[float]:
    """The validation losses before and after some steps, and the training's between."""
    stepper, _ = set_up(what, build_mesh(plan, "cpu"), dist.get_rank(), torch.device("cpu"))
    init_weights(stepper.model, what.train.seed)
    before = stepper.validate()
    trained = [stepper.step(step).loss for step in range(6)]
    return [before, stepper.validate(), *trained]


def test_a_validation_is_the_same_on_any_world_and_leaves_no_trace(ranks: Ranks) -> None:
    what = job({"validation_sequences": 13}).model_copy(update={"data": DataConfig(validation=0.001)})
    alone = ranks.run(validated, what, fitted(what), world_size=1)[0]
    first, second = ranks.run(validated, what, fitted(what, shard=1, expert=2), world_size=2)
    assert first == second == pytest.approx(alone, rel=1e-6)
    assert alone[1] < alone[0] - 0.1
    unseen = ranks.run(losses_alone, what, fitted(what), world_size=1)[0]
    assert alone[2:] == unseen  # to the last bit


def losses_alone(what: JobConfig, plan: MeshPlan) -> list[float]:
    stepper, _ = set_up(what, build_mesh(plan, "cpu"), dist.get_rank(), torch.device("cpu"))
    init_weights(stepper.model, what.train.seed)
    return [stepper.step(step).loss for step in range(6)]


def test_bfloat16_trains(ranks: Ranks, tmp_path: Path) -> None:
    what = job({"dtype": "bfloat16"})
    leg = ranks.run(train_leg, what, fitted(what, expert=2), 0, 12, tmp_path, world_size=2)[0]
    assert leg.losses[-1] < leg.losses[0] - 0.5
    assert {tensor.dtype for tensor in leg.weights.values()} == {torch.float32}


def test_loss_curve_is_golden(ranks: Ranks, tmp_path: Path) -> None:
    """The curve of a tiny run as it was recorded: a change of it is a change of the model, the data or the optimizer.

    On data of its own, for the standard library differs between Python versions. To record it anew: see the last
    lines of this test.
    """
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n} times {n} is {n * n}. " for n in range(400)))
    what = job().model_copy(update={"data": job().data.model_copy(update={"url": str(text)})})
    leg = ranks.run(train_leg, what, fitted(what), 0, what.train.steps, tmp_path, world_size=1)[0]
    curve = {"loss": leg.losses, "grad_norm": leg.norms}
    (tmp_path / "golden_loss.json").write_text(json.dumps(curve, indent=1) + "\n")
    print(f"this run's curve, to record it: {tmp_path / 'golden_loss.json'}")
    golden = json.loads(GOLDEN.read_text())
    assert curve["loss"] == pytest.approx(golden["loss"], rel=1e-4)
    assert curve["grad_norm"] == pytest.approx(golden["grad_norm"], rel=1e-2)
