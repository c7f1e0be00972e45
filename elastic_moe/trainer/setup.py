"""A job and a mesh to something that does steps."""

from __future__ import annotations

import os

import torch

from elastic_moe.config import JobConfig
from elastic_moe.data.corpus import open_corpus
from elastic_moe.data.order import Split, share
from elastic_moe.model.decoder import Decoder
from elastic_moe.parallel import Meshes, Precision, materialize, parallelize
from elastic_moe.trainer.optimizer import build_optimizer
from elastic_moe.trainer.state import DataProgress, DataState
from elastic_moe.trainer.step import Batches, Stepper
from elastic_moe.trainer.world import check_compiler, check_exact, check_same_everywhere


def set_up(job: JobConfig, meshes: Meshes, rank: int, device: torch.device) -> tuple[Stepper, DataProgress]:
    """The model with all that its steps need but values, which `init_weights` or a restore gives it. A collective.

    Raises:
        UserError: the data cannot be read or differs between ranks, or the model does not fit the mesh.
    """
    train = job.train
    if train.exact:
        check_exact(job.model)
    if train.compile:
        check_compiler(device, os.environ)
    corpus = open_corpus(job.data, train.seq_len)
    check_same_everywhere(corpus.fingerprint, device)
    with torch.device("meta"):
        model = Decoder(job.model)
    compute = torch.bfloat16 if train.dtype == "bfloat16" else torch.float32
    parallelize(model, meshes, Precision(compute=compute, exact=train.exact))
    materialize(model, device)
    model.recompute = train.recompute
    if train.compile:
        for block in model.blocks:
            block.compile_attention()
    plan = meshes.plan
    batches = Batches(
        corpus=corpus,
        split=Split.of(corpus.num_samples, job.data.validation),
        seed=train.seed,
        global_batch=train.global_batch,
        vocab_size=job.model.vocab_size,
        share=share(
            train.global_batch,
            rank=rank,
            world_size=plan.world_size,
            micro_batch=plan.micro_batch,
            rounds=plan.rounds,
        ),
        device=device,
    )
    optimizer = build_optimizer(model, job.optim, exact=train.exact)
    stepper = Stepper(model, optimizer, meshes, batches, train=train, optim=job.optim)
    data = DataState(
        train.seed, train.global_batch, train.seq_len, corpus.fingerprint, job.model.model_dump(), job.data.validation
    )
    return stepper, DataProgress(data, stepper.horizon)
