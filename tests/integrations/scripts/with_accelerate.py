"""FOLDER STEPS: a loop with `accelerate` and our piece for it."""

import itertools
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from elastic_moe.integrations.accelerate import Elastic
from tests.integrations.small import Rows, build, note, updates

folder, steps = Path(sys.argv[1]), int(sys.argv[2])
accelerator = Accelerator(cpu=True)
model = build()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1 / (1 + done))
loader = torch.utils.data.DataLoader(Rows(folder), batch_size=2, shuffle=True)
model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
with Elastic(accelerator, f"{folder}/checkpoints") as elastic:
    step = elastic.restore()
    for batch in itertools.chain.from_iterable(itertools.repeat(loader)):
        if step == steps:
            break
        accelerator.backward(model(**batch)["loss"])
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        step += 1
        note(folder, "steps", step=step)
        if elastic.end_step(step, save=step % 5 == 0, last=step == steps):
            break
if not elastic.stopped:
    note(folder, "done", step=step, updates=updates(optimizer.optimizer))
accelerator.end_training()
