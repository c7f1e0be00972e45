"""The pieces for frameworks in one process: a run that was asked to stop and went on equals an unbroken one."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from elastic_moe import worker
from storage import inspection
from tests.integrations.small import Net, Rows, build, updates

STEPS = 12

pytestmark = pytest.mark.filterwarnings("ignore")  # of the frameworks


Run = Callable[[Path], tuple[Net, torch.optim.Optimizer, str | None, int]]
"""One life of a script: model, optimizer, why it stopped, and the step it came to."""


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], list[int]]:
    """Have the agent ask for a stop at the boundary of a step; the steps that were told to it."""

    def at(step: int | None) -> list[int]:
        told: list[int] = []
        monkeypatch.setattr(worker, "heartbeat", lambda step, **_: told.append(step))
        monkeypatch.setattr(worker, "should_stop", lambda: "membership" if step in told[-1:] else None)
        return told

    return at


def accelerated(folder: Path) -> tuple[Net, torch.optim.Optimizer, str | None, int]:
    from accelerate import Accelerator

    from elastic_moe.integrations.accelerate import Elastic

    accelerator = Accelerator(cpu=True)
    net = build(dropout=0.0)  # whoever makes an iterator anew draws from the random state
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1 / (1 + done))
    loader = torch.utils.data.DataLoader(Rows(), batch_size=2)
    model, prepared, loader, rate = accelerator.prepare(net, optimizer, loader, scheduler)
    extra = {"seen": torch.zeros((), dtype=torch.int64)}
    with Elastic(accelerator, f"{folder}/checkpoints", extra=extra) as elastic:
        step = elastic.restore()
        assert int(extra["seen"]) == step
        for batch in itertools.islice(loader, step, None):
            accelerator.backward(model(**batch)["loss"])
            prepared.step()
            rate.step()
            prepared.zero_grad()
            step += 1
            extra["seen"].fill_(step)
            if elastic.end_step(step, save=step % 5 == 0, last=step == STEPS) or step == STEPS:
                break
    assert rate.scheduler.last_epoch == step
    return net, optimizer, elastic.stopped, step


def transformed(folder: Path) -> tuple[Net, torch.optim.Optimizer, str | None, int]:
    from transformers import Trainer, TrainingArguments

    from elastic_moe.integrations.transformers import ElasticTrainerCallback

    elastic = ElasticTrainerCallback(f"{folder}/checkpoints")
    arguments = TrainingArguments(
        output_dir=f"{folder}/out",
        max_steps=STEPS,
        per_device_train_batch_size=2,
        save_steps=5,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        learning_rate=1e-2,
        logging_steps=1,
    )
    trainer = Trainer(build(), arguments, train_dataset=Rows(), callbacks=[elastic])
    elastic.train(trainer)
    assert [line["step"] for line in trainer.state.log_history if "loss" in line] == list(
        range(1, trainer.state.global_step + 1)
    ), "what was logged before is restored as well"
    assert not list(Path(folder, "out").glob("checkpoint-*")), "the Trainer saves nothing of its own"
    return trainer.model, trainer.optimizer.optimizer, elastic.stopped, trainer.state.global_step  # type: ignore[return-value]


def lightened(folder: Path) -> tuple[Net, torch.optim.Optimizer, str | None, int]:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import EarlyStopping

    from elastic_moe.integrations.lightning import ElasticCallback

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = build(dropout=0.0)

        def train_dataloader(self) -> Any:
            # Lightning begins its loader anew when it goes on in the middle of an epoch
            rest = torch.utils.data.Subset(Rows(), range(2 * self.trainer.global_step, 4096))
            return torch.utils.data.DataLoader(rest, batch_size=2)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss: torch.Tensor = self.net(**batch)["loss"]
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
            return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 4), "interval": "step"}]

    elastic = ElasticCallback(f"{folder}/checkpoints", every=5)
    module = Module()
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=STEPS,
        callbacks=[elastic, EarlyStopping("loss", patience=50)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        default_root_dir=folder,
    )
    trainer.fit(module)
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == trainer.global_step
    return module.net, trainer.optimizers[0], elastic.stopped, trainer.global_step


@pytest.mark.parametrize(
    ("framework", "run"), [("accelerate", accelerated), ("transformers", transformed), ("lightning", lightened)]
)
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not(
    tmp_path: Path, ask: Callable[[int | None], list[int]], framework: str, run: Run
) -> None:
    pytest.importorskip(framework)
    told = ask(7)
    *_, stopped, step = run(tmp_path / "broken")
    assert (stopped, step) == ("membership", 7)
    assert told[-1] == 7
    told = ask(None)
    net, optimizer, stopped, step = run(tmp_path / "broken")
    assert (stopped, step) == (None, STEPS)
    assert sorted(set(told)) == list(range(8, STEPS + 1))
    assert updates(optimizer) == STEPS
    ask(None)
    unbroken, *_ = run(tmp_path / "unbroken")
    for name, parameter in unbroken.state_dict().items():
        assert torch.equal(parameter, net.state_dict()[name]), name
    steps = [
        (row.step, row.state) for row in inspection.summaries(inspection.locate(str(tmp_path / "broken/checkpoints")))
    ]
    assert steps == [(STEPS, "committed"), (10, "committed"), (7, "committed")]


@pytest.mark.parametrize(("framework", "run"), [("transformers", transformed), ("lightning", lightened)])
def test_a_loss_that_is_not_finite_is_not_gone_on_from(
    tmp_path: Path,
    ask: Callable[[int | None], list[int]],
    monkeypatch: pytest.MonkeyPatch,
    framework: str,
    run: Run,
) -> None:
    pytest.importorskip(framework)
    ask(7)
    run(tmp_path)
    ask(9)
    forward = Net.forward
    monkeypatch.setattr(Net, "forward", lambda self, x, labels: {"loss": forward(self, x, labels)["loss"] * torch.nan})
    run(tmp_path)
    rows = [(row.step, row.state) for row in inspection.summaries(inspection.locate(str(tmp_path / "checkpoints")))]
    assert rows[0] == (9, "unhealthy")
    assert rows[-1][1] == "committed"


def test_the_package_imports_neither_torch_nor_a_framework() -> None:
    heavy = "{'torch', 'transformers', 'accelerate', 'lightning', 'pytorch_lightning'}"
    code = f"import elastic_moe.integrations, elastic_moe.integrations.session, sys; print({heavy} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == "set()"


def test_the_former_name_of_the_callback_works_for_one_release() -> None:
    from elastic_moe.integrations import transformers

    with pytest.warns(DeprecationWarning, match="is called ElasticTrainerCallback here"):
        assert transformers.ElasticCallback is transformers.ElasticTrainerCallback
    with pytest.raises(AttributeError, match="has no attribute 'Elastic'"):
        _ = transformers.Elastic
