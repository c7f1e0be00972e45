"""FOLDER STEPS: `transformers.Trainer` with our callback."""

import sys
from pathlib import Path

from transformers import Trainer, TrainerCallback, TrainingArguments

from elastic_moe.integrations.transformers import ElasticTrainerCallback
from tests.integrations.small import Rows, build, note, updates

folder, steps = Path(sys.argv[1]), int(sys.argv[2])


class Trace(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        note(folder, "steps", step=state.global_step)


elastic = ElasticTrainerCallback(f"{folder}/checkpoints")
arguments = TrainingArguments(
    output_dir=f"{folder}/out",
    max_steps=steps,
    per_device_train_batch_size=2,
    save_steps=5,
    report_to=[],
    use_cpu=True,
    disable_tqdm=True,
    logging_strategy="no",
)
trainer = Trainer(build(), arguments, train_dataset=Rows(folder), callbacks=[elastic, Trace()])
elastic.train(trainer)
if elastic.stopped:
    sys.exit()
note(folder, "done", step=trainer.state.global_step, updates=updates(trainer.optimizer))  # type: ignore[arg-type]
