"""A job and a mesh to something that does steps."""

from __future__ import annotations

import logging
import os

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.optim import AdamW

from elastic_moe.config import JobConfig, mesh_spec
from elastic_moe.data.corpus import Corpus, open_corpus
from elastic_moe.data.order import Split, share
from elastic_moe.errors import UserError
from elastic_moe.events import TrainerEvent
from elastic_moe.model.compile_cache import cache_obstacle, remove_torn
from elastic_moe.model.decoder import Decoder
from elastic_moe.parallel import Meshes, Precision, expect_first_step, materialize, parallelize
from elastic_moe.pool import make_pages
from elastic_moe.trainer.batches import Batches
from elastic_moe.trainer.changes import settings_of
from elastic_moe.trainer.config import TrainConfig
from elastic_moe.trainer.meeting import meanwhile
from elastic_moe.trainer.optimizer import build_optimizer, moments
from elastic_moe.trainer.state import DataProgress, DataState
from elastic_moe.trainer.step import Stepper
from elastic_moe.trainer.world import check_exact, check_same_everywhere, missing_compiler
from launcher import MeshPlan, ShareRule, copy_rows, whole_number, worker

log = logging.getLogger(__name__)


def set_up(job: JobConfig, meshes: Meshes, rank: int, device: torch.device) -> tuple[Stepper, DataProgress]:
    """The model with all that its steps need but values, which `init_weights` or a restore gives it. A collective.

    Raises:
        UserError: the data cannot be read or differs between ranks, or the model does not fit the mesh.
    """
    train = job.train
    if train.exact:
        check_exact(job.model)
    if job.model.balance == "forced" and rank == 0:
        log.warning(
            'model.balance = "forced" sends tokens to experts in turn: for benchmarks, what is trained is no model'
        )
    corpus = meanwhile(lambda: open_corpus(job.data, train.seq_len, job.model.vocab_size))
    check_same_everywhere(corpus.fingerprint, device)
    with torch.device("meta"):
        model = Decoder(job.model)
    compute = torch.bfloat16 if train.dtype == "bfloat16" else torch.float32
    sharing = share_rule(job, meshes.plan, device)
    parallelize(model, meshes, Precision(compute=compute, exact=train.exact), sharing)
    materialize(model, device)
    model.recompute = train.recompute
    if train.compile:
        compile_layers(model, device)
    plan = meshes.plan
    batches = Batches(
        corpus=corpus,
        split=_split(job, corpus),
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
    _make_pages(model, optimizer, plan, compute, train)
    stepper = Stepper(model, optimizer, meshes, batches, train=train, optim=job.optim)
    return stepper, DataProgress(data_state(job, corpus), stepper.horizon)


def compile_layers(model: Decoder, device: torch.device) -> None:
    """Compile what can be; where that fails, on whatever ranks, layers run as they are: it decides about no result."""
    if obstacle := missing_compiler(device, os.environ) or cache_obstacle():
        _tell_uncompiled(obstacle)
    else:
        remove_torn()
        model.compile_attention(on_failure=_tell_uncompiled)


def _tell_uncompiled(why: str) -> None:
    log.warning("train.compile = true, but this rank's layers run as they are: torch.compile fails: %s", why)
    worker.event(TrainerEvent.COMPILE_FAILED, reason=why)


def _make_pages(model: Decoder, optimizer: AdamW, plan: MeshPlan, compute: torch.dtype, train: TrainConfig) -> None:
    """Have the memory made that a restore and the first step write, while this process goes on.

    What the first step takes comes first: a restore is about to write the other.
    """
    ahead = expect_first_step(model, plan, compute, exact=train.exact, keep_gathered=train.keep_gathered)
    if ahead is None:
        return
    tensors = [
        *model.parameters(),
        *(tensor for of_one in moments(model, optimizer).values() for tensor in of_one.values()),
    ]
    make_pages([ahead, *(tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors)])


def share_rule(job: JobConfig, plan: MeshPlan, device: torch.device) -> ShareRule | None:
    """When ranks share the rows of hot experts, by the modelled speeds; None for never. A collective if not never.

    The ranks of a group must decide alike, so all take what the node with the slowest links and the fullest cores has.
    """
    if not job.train.expert_replicas or plan.expert == 1:
        return None
    spec = mesh_spec(job)
    local_ranks = whole_number(os.environ, "LOCAL_WORLD_SIZE", 1, at_least=1)
    link_bytes_per_s = spec.inter_node_bytes_per_s if local_ranks % plan.expert else spec.intra_node_bytes_per_s
    turns = max(1.0, local_ranks / spec.cores_per_node) if spec.cores_per_node else 1.0
    most = torch.tensor([copy_rows(spec, link_bytes_per_s), turns], dtype=torch.float64, device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    rows, turns = most.tolist()
    return ShareRule(job.train.expert_replicas, copy_rows=rows, num_parallel=plan.expert / turns)


def data_state(job: JobConfig, corpus: Corpus) -> DataState:
    """What a checkpoint of the job has to say of it."""
    return DataState(
        seed=job.train.seed,
        global_batch=job.train.global_batch,
        seq_len=job.train.seq_len,
        fingerprint=corpus.fingerprint,
        model=job.model.model_dump(),
        validation=job.data.validation,
        tokenizer=corpus.tokenizer_digest,
        document_mask=job.data.document_mask,
        tokenizer_files=corpus.tokenizer.packed() if corpus.tokenizer else b"",
        settings=settings_of(job),
        tokens=corpus.tokens.value,
    )


def _split(job: JobConfig, corpus: Corpus) -> Split:
    """Which samples are trained on.

    Raises:
        UserError: none would be held out, or there is a sample to train on.
    """
    split = Split.of(corpus.num_samples, job.data.validation)
    if job.data.validation and not split.num_held_out:
        raise UserError(
            f"data.validation = {job.data.validation:g} of one sample holds none out: use more data, or shorter "
            "sequences (train.seq_len)"
        )
    num_trained = split.num_samples - split.num_held_out
    if num_trained < job.train.global_batch and dist.get_rank() == 0:
        log.warning(
            "data.url holds %d samples to train on, fewer than the %d of a step (train.global_batch): each step sees "
            "some of them more than once",
            num_trained,
            job.train.global_batch,
        )
    return split
