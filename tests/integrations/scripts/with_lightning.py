"""FOLDER STEPS: Lightning's Trainer with our callback."""

import os
import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from elastic_moe.integrations.lightning import ElasticCallback
from tests.integrations.small import Rows, build, note, updates

folder, steps = Path(sys.argv[1]), int(sys.argv[2])


class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = build()

    def training_step(self, batch, batch_idx):
        return self.net(**batch)["loss"]

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 10)]


class Trace(Callback):
    def on_train_batch_end(self, trainer, *_):
        note(folder, "steps", step=trainer.global_step)


elastic = ElasticCallback(f"{folder}/checkpoints", every=5)
trainer = Trainer(
    accelerator="cpu",
    num_nodes=int(os.environ["GROUP_WORLD_SIZE"]),
    devices=int(os.environ["LOCAL_WORLD_SIZE"]),
    max_steps=steps,
    callbacks=[elastic, Trace()],
    enable_checkpointing=False,
    enable_progress_bar=False,
    logger=False,
    default_root_dir=folder,
)
module = Module()
trainer.fit(module, torch.utils.data.DataLoader(Rows(folder), batch_size=2))
if elastic.stopped:
    sys.exit()
note(folder, "done", step=trainer.global_step, updates=updates(trainer.optimizers[0]))
