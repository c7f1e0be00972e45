"""The trainer's pure parts: schedule, plan checks, data state, metrics."""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_moe.config import JobConfig, mesh_spec
from elastic_moe.errors import UserError
from elastic_moe.model import ModelConfig
from elastic_moe.model.decoder import Decoder
from elastic_moe.trainer import room
from elastic_moe.trainer.config import OptimConfig
from elastic_moe.trainer.metrics import MetricsFile, StepMetrics
from elastic_moe.trainer.optimizer import build_optimizer
from elastic_moe.trainer.room import check_room, room_of
from elastic_moe.trainer.schedule import learning_rate, may_move
from elastic_moe.trainer.state import DataProgress, DataState
from elastic_moe.trainer.world import check_exact, check_plan, choose_plan, missing_compiler
from elastic_moe.worker import WorkerContext
from launcher.rounds.memory import memory_use
from launcher.rounds.mesh import MeshPlan
from tests.moe.cases import SMALL

ALONE = WorkerContext(rank=0, local_rank=0, world_size=1, generation=0, lineage="", run_id="", mesh=None)


def test_learning_rate_warms_up_and_decays() -> None:
    optim = OptimConfig(lr=1.0, lr_min_ratio=0.1, warmup_steps=4)
    rates = [learning_rate(step, 20, optim) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[-1] == pytest.approx(0.1)
    assert rates[4:] == sorted(rates[4:], reverse=True)


@settings(deadline=None)
@given(
    warmup=st.integers(0, 30),
    num_steps=st.integers(1, 30),
    step=st.integers(0, 40),
    schedule=st.sampled_from(["cosine", "wsd"]),
)
def test_learning_rate_is_always_sound(warmup: int, num_steps: int, step: int, schedule: str) -> None:
    optim = OptimConfig.model_validate({"lr": 1.0, "warmup_steps": warmup, "schedule": schedule})
    assert 0 < learning_rate(step, num_steps, optim) <= 1


def test_wsd_is_stable_up_to_its_last_part() -> None:
    optim = OptimConfig(lr=1.0, lr_min_ratio=0.1, warmup_steps=4, schedule="wsd", wsd_decay=0.25)
    rates = [learning_rate(step, 40, optim) for step in range(44)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:30] == [1.0] * 26
    assert rates[30:40] == pytest.approx([1 - 0.09 * done for done in range(1, 11)])
    assert rates[39:] == pytest.approx([0.1] * 5)


def test_a_stable_run_may_be_made_longer_and_one_that_falls_not() -> None:
    optim = OptimConfig(warmup_steps=4, schedule="wsd", wsd_decay=0.25)
    assert may_move(20, 40, 100, optim)
    assert may_move(29, 40, 100, optim)
    assert not may_move(30, 40, 100, optim)
    assert not may_move(25, 40, 30, optim)  # it should have fallen already
    assert not may_move(20, 40, 100, OptimConfig(warmup_steps=4))
    assert may_move(3, 3, 100, OptimConfig(warmup_steps=4))  # a try of a few steps, all of them within the warm-up
    longer = [learning_rate(step, 100, optim) for step in range(30)]
    assert longer == [learning_rate(step, 40, optim) for step in range(30)]


def test_a_job_that_cannot_lie_in_memory_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    """Else the kernel ends it, without a word of why. Where other nodes may come, it is told and waits for them."""
    mixtral = mesh_spec(JobConfig.model_validate({"model": {"preset": "mixtral-8x7b"}}))
    plan = MeshPlan(1, 2, 4, 0, 1, 4)
    state_bytes = 12 * (mixtral.dense_params + mixtral.expert_params)
    check_room(plan, mixtral, num_ranks=8, room_bytes=state_bytes + (1 << 20), may_grow=False)
    check_room(plan, mixtral, num_ranks=1, room_bytes=state_bytes // 8 + (1 << 20), may_grow=False)
    for may_grow in (False, True):
        with contextlib.nullcontext() if may_grow else pytest.raises(UserError, match=r"521\.9 GiB here .8 of 8 ranks"):
            check_room(plan, mixtral, num_ranks=8, room_bytes=24 << 30, may_grow=may_grow)
    assert "521.9 GiB here" in caplog.text
    assert "mesh.memory_gib keeps the job from being planned for too few" in caplog.text


def test_the_memory_of_this_machine_is_known() -> None:
    assert 0 < room_of(torch.device("cpu")) <= psutil.virtual_memory().total + psutil.swap_memory().total


@pytest.mark.parametrize(
    ("limits", "room_gib"),
    [
        ({}, 80),
        ({"memory.max": "max", "memory.swap.max": "max"}, 80),
        ({"memory.max": 8 << 30, "memory.swap.max": 4 << 30}, 12),
        ({"memory.max": 8 << 30}, 24),
        ({"memory.max": 8 << 30, "memory.swap.max": 0}, 8),
    ],
)
def test_what_a_container_may_swap_is_room_beside_its_memory(
    limits: dict[str, object], room_gib: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "meminfo").write_text(f"MemTotal:  {64 << 20} kB\nSwapTotal:  {16 << 20} kB\n")
    for name, limit in limits.items():
        (tmp_path / name).write_text(f"{limit}\n")
    monkeypatch.setattr(room, "_MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(room, "_LIMITS", tmp_path)
    assert room_of(torch.device("cpu")) == room_gib << 30


def test_norms_and_routers_do_not_decay() -> None:
    model = Decoder(SMALL)
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.1))
    names = {id(param): name for name, param in model.named_parameters()}
    decays = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays.keys() == dict(model.named_parameters()).keys()
    for name, decay in decays.items():
        assert decay == (0.0 if "norm" in name or ".router." in name else 0.1), name
    assert {0.0, 0.1} == set(decays.values())


def test_moments_take_no_memory_before_they_are_written() -> None:
    """A restore writes all of them: zeros that were written before would cost a large model seconds."""
    build_optimizer(torch.nn.ParameterList([torch.empty(3)]), OptimConfig())  # imports what the first one needs
    model = torch.nn.ParameterList([torch.empty(1 << 24), torch.empty(3, 5), torch.empty(0, 4)])
    before = psutil.Process().memory_info().rss
    optimizer = build_optimizer(model, OptimConfig())
    assert psutil.Process().memory_info().rss - before < 64 << 20  # of 128
    for param, moments in optimizer.state.items():
        for moment in (moments["exp_avg"], moments["exp_avg_sq"]):
            assert moment.shape == param.shape and moment.stride() == param.stride()
            assert moment.untyped_storage().nbytes() == moment.nbytes  # its own, so that it is saved alone
    small = optimizer.state[model[1]]
    small["exp_avg"].fill_(7.0)
    assert not any(optimizer.state[param]["exp_avg_sq"].any() for param in model)
    assert not optimizer.state[model[0]]["exp_avg"].any()


def test_a_validation_on_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="has nothing to validate on: set data"):
        JobConfig.model_validate({"train": {"validate_every": 5}})


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (MeshPlan(1, 2, 2, 0, 8, 1), "needs 4 ranks and WORLD_SIZE is 6"),
        (MeshPlan(1, 2, 3, 0, 8, 1), "8 experts on 3 expert-parallel ranks make unequal parts"),
        (MeshPlan(3, 2, 1, 0, 1, 2), "holds 12 sequences a step and train.global_batch is 32"),
        (MeshPlan(3, 1, 2, 0, 6, 1), "micro-batch is 6 and the job allows 4"),
    ],
)
def test_a_plan_for_another_job_is_refused(plan: MeshPlan, message: str) -> None:
    train = {"global_batch": 32, "max_micro_batch": 4}
    job = JobConfig.model_validate({"train": train, "model": {"expert_dim": 255}})
    with pytest.raises(UserError) as caught:
        check_plan(plan, job, world_size=6)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_world_without_an_agent_plans_for_itself() -> None:
    job = JobConfig.model_validate({"train": {"exact": True}, "mesh": {"max_idle": 2}})
    for world_size in range(1, 9):
        plan = choose_plan(job, replace(ALONE, world_size=world_size), ranks_per_node=8)
        assert plan.world_size == world_size
        assert plan.micro_batch == 1
        check_plan(plan, job, world_size)


def test_an_infeasible_world_is_told_in_one_line() -> None:
    job = JobConfig.model_validate({"mesh": {"expert": 4}})
    with pytest.raises(UserError) as caught:
        choose_plan(job, replace(ALONE, world_size=3), ranks_per_node=3)
    assert "\n" not in str(caught.value)


MODEL = ModelConfig().model_dump()
DATA = DataState(seed=1, global_batch=8, seq_len=32, fingerprint="a" * 64, model=MODEL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"fingerprint": "b" * 64},
            r"trained on other data .*was bbbbbbbbbbbb, now aaaaaaaaaaaa.* set data\.may_change",
        ),
        (
            {"tokenizer": "c" * 64, "fingerprint": "b" * 64},
            r"on other tokens \(data\.tokenizer cccccccccccc, now bytes\)",
        ),
        ({"document_mask": True, "fingerprint": "b" * 64}, r"trained with data\.document_mask = true: set that back"),
        ({"validation": 0.5}, r"trained with data\.validation = 0\.5, now 0\.0"),
        ({"seed": 2}, "train.seed is 1 but the checkpoint was trained with 2"),
        ({"global_batch": 9}, "train.global_batch is 8 but the checkpoint was trained with 9"),
        ({"seq_len": 16}, "train.seq_len is 32 but the checkpoint was trained with 16"),
        ({"model": MODEL | {"top_k": 1}}, "model.top_k is 2 but the checkpoint was trained with 1"),
        ({"model": MODEL | {"rope_theta": 5e5}}, "model.rope_theta is 10000.0 but the checkpoint was trained with 5"),
        ({"model": MODEL | {"balance": "bias"}}, "model.balance is sequence but"),
        ({"model": MODEL | {"num_heads": 2}}, "model.num_heads is 4 but"),
        ({"model": MODEL | {"head_dim": 16}}, "model.head_dim is 32 but the checkpoint was trained with 16"),
        ({"model": MODEL | {"norm_topk": False}}, "model.norm_topk is true but the checkpoint was trained with false"),
        ({"model": MODEL | {"score": "sigmoid"}}, "model.score is softmax but"),
    ],
)
def test_a_checkpoint_of_other_data_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DATA.check(replace(DATA, **change))


@pytest.mark.parametrize("change", [{"fingerprint": "b" * 64}, {"tokenizer": "c" * 64}, {"validation": 0.5}])
def test_data_may_change_where_the_job_says_so(change: dict[str, Any]) -> None:
    """And nothing else: a step would be of another size, or another model."""
    assert DATA.check(DATA, may_change=True) == ""
    assert DATA.check(replace(DATA, **change), may_change=True).startswith(("on other", "with data.validation"))
    for other in ({"seq_len": 16}, {"model": MODEL | {"top_k": 1}}):
        with pytest.raises(UserError, match="but the checkpoint was trained with"):
            DATA.check(replace(DATA, **change, **other), may_change=True)


@pytest.mark.parametrize(
    "saved",
    [
        {},  # of before the model was kept
        MODEL | {"balance_coeff": 0.5, "balance_rate": 0.1, "z_loss_coeff": 1.0, "init_std": 1.0},
        {name: value for name, value in MODEL.items() if name != "score"},  # of before there was a choice
        MODEL | {"head_dim": 32, "norm_topk": True, "top_groups": 1},  # what none stands for, written out
    ],
)
def test_a_checkpoint_of_the_same_model_is_taken(saved: dict[str, Any]) -> None:
    DATA.check(replace(DATA, model=saved))


def test_data_progress_round_trips() -> None:
    saved = DataProgress(DATA, horizon=20)
    saved.step = 17
    loaded = DataProgress(replace(DATA, seed=5), horizon=40)
    loaded.load_state_dict(saved.state_dict())
    assert loaded.step == 17
    assert loaded.loaded == DATA
    assert loaded.data.seed == 5
    assert loaded.horizon == 20
    old = {name: value for name, value in saved.state_dict().items() if name not in ("horizon", "model")}
    loaded = DataProgress(DATA, horizon=40)
    loaded.load_state_dict(old)
    assert loaded.horizon == 40
    assert loaded.loaded == replace(DATA, model={})


def metrics(step: int) -> StepMetrics:
    mesh = {"replicate": 1, "shard": 2, "expert": 2}
    return StepMetrics(step, 2.5, 1.0, 1e-3, 1024 * step, 1.2, 0.1, 3, 4, mesh, 1e9)


def write_metrics(path: Path, first: int) -> None:
    with MetricsFile(path) as file:
        for step in range(first, first + 300):
            file.append(metrics(step))


def test_metrics_of_two_writers_never_mix(tmp_path: Path) -> None:
    """An old rank 0 that is still dying and a new one may both write for a moment."""
    path = tmp_path / "new" / "metrics.jsonl"
    context = multiprocessing.get_context("forkserver")
    writers = [context.Process(target=write_metrics, args=(path, first)) for first in (0, 1000)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert sorted(steps) == [*range(300), *range(1000, 1300)]
    assert path.stat().st_mode & 0o777 == 0o600


def test_metrics_that_cannot_be_written_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.metrics .* cannot be written"):
        MetricsFile(tmp_path)


def test_exact_mode_refuses_a_width_that_it_cannot_keep_its_promise_for() -> None:
    check_exact(ModelConfig(expert_dim=96))
    for name, width in {"expert_dim": 100, "dim": 72, "shared_expert_dim": 8}.items():
        with pytest.raises(UserError, match=rf"model.{name} in multiples of 32, not {width}:"):
            check_exact(ModelConfig.model_validate({name: width}))


def test_a_missing_compiler_is_told_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not missing_compiler(torch.device("cuda"), {"CXX": "no-such-compiler"})
    assert not missing_compiler(torch.device("cpu"), {"CXX": "python3"})
    monkeypatch.setenv("PATH", str(tmp_path))
    for environ, name in (({"CXX": "no-such-compiler"}, "no-such-compiler"), ({}, "g++"), ({"CXX": ""}, "g++")):
        assert missing_compiler(torch.device("cpu"), environ).endswith(f"there is no {name}")


def test_exact_optimizer_rounds_alike_however_a_tensor_is_cut() -> None:
    """Shards of any length, off any vector width, end with the very values of the whole tensor."""
    draw = torch.Generator().manual_seed(0)
    whole = torch.randn(1009, 3, generator=draw)
    cuts = [*range(1, 300), 307, 322, 353, 487]
    whole_model = torch.nn.ParameterList([whole.clone()])
    cut_model = torch.nn.ParameterList([part.clone() for part in whole.tensor_split(cuts)])
    optimizers = [build_optimizer(model, OptimConfig(), exact=True) for model in (whole_model, cut_model)]
    for _ in range(20):
        grad = torch.randn(1009, 3, generator=draw)
        whole_model[0].grad = grad.clone()
        for param, part in zip(cut_model, grad.tensor_split(cuts), strict=True):
            param.grad = part.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(torch.cat(list(cut_model)), whole_model[0])
    assert not torch.equal(whole_model[0], whole)


def test_a_batch_that_does_not_fit_the_memory_is_trained_on_in_parts(caplog: pytest.LogCaptureFixture) -> None:
    """It was planned for in one pass, and ended by the kernel. What a job says of memory counts more."""
    caplog.set_level(logging.INFO)
    job = JobConfig.model_validate({"train": {"global_batch": 100_000}})
    free = choose_plan(job, ALONE, 1)
    assert choose_plan(job, ALONE, 1, share_bytes=1 << 50) == free
    assert not caplog.records
    fits = choose_plan(job, ALONE, 1, share_bytes=8 << 30)
    assert memory_use(fits, mesh_spec(job)).total <= 8 << 30 < memory_use(free, mesh_spec(job)).total
    assert f"with micro-batches of {fits.micro_batch}: more does not fit 8.0 GiB a rank" in caplog.text
    assert choose_plan(job, ALONE, 1, share_bytes=1 << 20).micro_batch == 1, "the leanest"
    told = job.model_copy(update={"mesh": job.mesh.model_copy(update={"memory_gib": 1e6})})
    assert choose_plan(told, ALONE, 1, share_bytes=8 << 30) == free
