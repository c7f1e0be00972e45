"""Layers whose attention is compiled, or that are computed again for the backward pass: the same gradients and loads.

All of these tests with such layers: `make test-variants`, see `variants.py`.
"""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.compilers import nop

from elastic_moe import config
from elastic_moe.config import JobConfig
from elastic_moe.data import DataConfig
from elastic_moe.events import TrainerEvent
from elastic_moe.model import ModelConfig
from elastic_moe.model.compiled import Compiling, in_one_line
from elastic_moe.model.decoder import Decoder
from elastic_moe.parallel import begin_round, build_mesh, gather_full, init_weights
from elastic_moe.trainer import setup
from launcher import worker
from launcher.rounds.mesh import MeshPlan
from tests.moe.cases import SMALL, batch, build, fitted, grads, layout, objective
from tests.moe.test_training import job
from tests.moe.variants import Graphs, environment
from tests.ranks import Ranks


def learned(config: ModelConfig, plan: MeshPlan, variant: str) -> tuple[dict[str, Tensor], Tensor]:
    """Whole gradients of a batch of 8 over the ranks, and the loads of each layer, summed over ranks."""
    model, _ = build(config, plan)
    model.recompute = "recompute" in variant
    if "compile" in variant:
        model.compile_attention("aot_eager")  # traces as inductor does, and needs no compiler
    told: list[Tensor] = []
    model.register_forward_hook(lambda module, args, out: told.append(out.load_LE))
    mine = batch(config, num_sequences=8, num_positions=16).tensor_split(dist.get_world_size())[dist.get_rank()]
    begin_round(model, last=True)
    objective(model, mine, num_sequences=8).backward()
    (load_LE,) = told
    dist.all_reduce(load_LE)
    return gather_full(dict(grads(model))), load_LE


@pytest.mark.parametrize(("balance", "num_experts"), [("sequence", 6), ("quantile", 5)])
def test_a_variant_learns_the_same_and_counts_loads_once(ranks: Ranks, balance: str, num_experts: int) -> None:
    config = SMALL.model_copy(update={"balance": balance, "num_experts": num_experts})
    plan = layout(expert=2)
    expected, expected_loads = ranks.run(learned, config, plan, "", world_size=2)[0]
    assert expected_loads.sum() == config.num_layers * 8 * 16 * config.top_k
    for variant in ("compile", "recompute", "compile,recompute"):
        got, loads = ranks.run(learned, config, plan, variant, world_size=2)[0]
        assert torch.equal(loads, expected_loads), variant
        for name, grad in expected.items():
            torch.testing.assert_close(got[name], grad, rtol=1e-4, atol=1e-7, msg=f"{variant}: {name}")


def test_commands_hear_of_the_variant(tmp_path: Path) -> None:
    (path := tmp_path / "job.toml").write_text("")
    for variant, expected in (("", (False, False)), ("recompute", (False, True)), ("compile,recompute", (True, True))):
        train = config.load(path, environ=environment(variant)).train
        assert (train.compile, train.recompute) == expected


class Broken:
    """A backend that makes so many graphs and then no more, as on a machine whose compiler has an error to tell."""

    def __init__(self, num_good: int) -> None:
        self.graphs = Graphs("eager")
        self.num_good = num_good

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        if self.graphs.num_made == self.num_good:
            raise RuntimeError(
                "C++ compile error\n\nCommand:\ng++\n\nOutput:\na.cpp:1:10: fatal error: Python.h: no such"
            )
        return self.graphs(graph, inputs)


class Steps(NamedTuple):
    """What a rank saw of some steps and a validation."""

    losses: list[float]
    num_graphs: int
    num_runs: int
    """How often one of them was run."""
    events: list[tuple[str, dict[str, Any]]]


def compiled_steps(what: JobConfig, plan: MeshPlan, num_good: int) -> Steps:
    events: list[tuple[str, dict[str, Any]]] = []
    backend = Broken(num_good)
    compile_attention = Decoder.compile_attention
    torch._dynamo.reset()  # no graph of another test counts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "missing_compiler", lambda device, environ: "")
        patch.setattr(worker, "event", lambda name, **told: events.append((name, told)))
        patch.setattr(
            Decoder, "compile_attention", lambda model, on_failure: compile_attention(model, backend, on_failure)
        )
        stepper, _ = setup.set_up(what, build_mesh(plan, "cpu"), dist.get_rank(), torch.device("cpu"))
        init_weights(stepper.model, what.train.seed)
        losses = [stepper.step(step).loss for step in range(2)]
        losses.append(stepper.validate())
        losses += [stepper.step(step).loss for step in range(2, 4)]
    return Steps(losses, backend.graphs.num_made, backend.graphs.num_runs, events)


def validated_job(train: dict[str, Any] | None = None, model: dict[str, Any] | None = None) -> JobConfig:
    what = job({"validation_sequences": 13, **(train or {})}, model)
    return what.model_copy(update={"data": DataConfig(validation=0.001)})


MANY = {"num_layers": 10}  # more than graphs that torch makes of one function


def test_all_layers_share_their_graphs_through_rounds_steps_and_validations(ranks: Ranks) -> None:
    """One for passes with gradients and one without: for padded batches and layers computed again there is no other."""
    what = validated_job({"compile": True, "recompute": True, "max_micro_batch": 2}, MANY)
    plan = fitted(what, expert=2)
    found = ranks.run(compiled_steps, what, plan, 99, world_size=2)[0]
    assert (found.num_graphs, found.events) == (2, [])
    num_validated = found.num_runs - what.model.num_layers * 2 * 4 * plan.rounds
    assert num_validated > 0
    assert num_validated % what.model.num_layers == 0


@pytest.mark.parametrize("num_good", [0, 1], ids=["from the start", "in a validation"])
def test_where_nothing_can_be_compiled_layers_run_as_they_are(ranks: Ranks, num_good: int) -> None:
    """A line, an event, and the very losses of a job that asks for nothing else."""
    what = validated_job({"compile": True})
    plan = fitted(what, replicate=2)
    found, other = ranks.run(compiled_steps, what, plan, num_good, world_size=2)
    why = "RuntimeError: a.cpp:1:10: fatal error: Python.h: no such"
    assert found.events == other.events == [(TrainerEvent.COMPILE_FAILED, {"reason": why})]
    plain = ranks.run(compiled_steps, validated_job(), plan, 0, world_size=2)[0]
    assert (plain.losses, plain.events) == (found.losses, [])


def test_a_function_that_torch_would_compile_in_parts_is_not_compiled() -> None:
    def halves(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x + 1

    told: list[str] = []
    assert Compiling("eager", told.append)(halves)(torch.zeros(1)) == 1
    assert len(told) == 1
    assert "\n" not in told[0]
    with pytest.raises(RuntimeError):
        Compiling("eager")(halves)(torch.zeros(1))


def test_a_backward_pass_that_cannot_be_compiled_is_heard_of_before_it() -> None:
    """Within it nothing could be called again: a disk that is full by then would end the job."""

    def fails(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def square(x: Tensor) -> Tensor:
        return x * x

    told: list[str] = []
    backend = aot_autograd(fw_compiler=nop, bw_compiler=fails)
    Compiling(backend, told.append)(square)(x := torch.full((1,), 3.0, requires_grad=True)).backward()
    assert x.grad == 6
    assert told == ["OSError: [Errno 28] No space left on device"]


def several_shapes() -> None:
    torch._dynamo.reset()
    for num_heads, num_kv_heads, head_dim in ((4, 2, 6), (8, 4, 8), (6, 2, 10), (4, 4, 12)):
        heads = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
        model, _ = build(SMALL.model_copy(update=heads), layout())
        model.compile_attention("eager")
        begin_round(model, last=True)
        objective(model, batch(SMALL, num_sequences=2, num_positions=head_dim), num_sequences=2).backward()


def test_models_of_several_shapes_are_compiled_whole(ranks: Ranks) -> None:
    """torch takes for variables what differs between them, such as how many heads there are."""
    ranks.run(several_shapes, world_size=1)


def test_an_error_of_a_compiled_function_is_its_own() -> None:
    def fails(x: Tensor) -> Tensor:
        return x.view(3)

    told: list[str] = []
    with pytest.raises(RuntimeError, match="invalid for input of size 2"):
        Compiling("eager", told.append)(fails)(torch.zeros(2))
    assert not told


def test_whatever_the_compiler_raises_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not all is of torch's kind: a cache folder that cannot be made is an OSError."""

    def no_folder(*_: object) -> None:
        raise FileExistsError(17, "File exists", "cache")

    monkeypatch.setattr(torch, "compile", lambda function, **_: no_folder)
    told: list[str] = []
    compiling = Compiling("eager", told.append)
    functions = [compiling(lambda x, i=i: x + i) for i in range(3)]
    assert [int(function(torch.zeros(1))) for function in functions] == [0, 1, 2]
    assert told == ["FileExistsError: [Errno 17] File exists: 'cache'"]


@pytest.mark.parametrize(
    ("error", "line"), [(OSError(13, "no"), "PermissionError: [Errno 13] no"), (KeyError(), "KeyError: ")]
)
def test_the_reason_is_a_line(error: Exception, line: str) -> None:
    assert in_one_line(error) == line
