"""How long, how fast and with what state the model trains. No torch."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from elastic_moe.section import Section
from elastic_moe.urls import LocalPath, PathOrUrl
from storage import UsageError, parse_every


class OptimConfig(Section):
    """AdamW (arXiv:1711.05101), with a linear warm-up and a decay that are pure functions of the step."""

    lr: float = Field(1e-3, gt=0)
    """Learning rate at the end of the warm-up."""
    lr_min_ratio: float = Field(0.1, ge=0, le=1)
    """Learning rate after the last step, as a part of `lr`."""
    warmup_steps: int = Field(10, ge=0)
    """Steps over which the learning rate grows linearly."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """How it falls from there: along half a cosine to the end; or not at all up to a last part, over which it falls
    linearly (warm-up, stable, decay: MiniCPM, arXiv:2404.06395). Before that part begins, a job may be made longer."""
    wsd_decay: float = Field(0.1, gt=0, le=1)
    """That last part, as a part of all steps."""
    decay_steps: int | None = Field(None, ge=1)
    """The step at which the learning rate has fallen to its least; none means the `train.steps` that the job began
    with. So a job that is made longer trains on at the least rate, unless this is set or the rate has not begun to
    fall."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of the mean of gradients."""
    beta2: float = Field(0.95, ge=0, lt=1)
    """Decay of the mean of squared gradients."""
    eps: float = Field(1e-8, gt=0)
    """Added to the root of the mean square."""
    weight_decay: float = Field(0.1, ge=0)
    """Decay of weight matrices, the embedding and the head among them; routers, norms and biases are never decayed."""
    clip_norm: float | None = Field(1.0, gt=0)
    """Largest global L2 norm of the gradient; none leaves it alone."""

    @model_validator(mode="after")
    def _falls_after_the_warm_up(self) -> Self:
        if self.decay_steps is not None and self.decay_steps <= self.warmup_steps:
            raise ValueError(
                f"decay_steps = {self.decay_steps} is not after warmup_steps = {self.warmup_steps}, where the rate "
                "begins to fall: raise decay_steps, or lower warmup_steps"
            )
        return self


class TrainConfig(Section):
    """How long the model trains, on how much at a time, and in what precision."""

    steps: int = Field(100, ge=1)
    """Optimizer steps of the whole job, over all its restarts."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Decides the initial weights and the order of the samples."""
    init_from: LocalPath | None = None
    """Folder of a Mixtral in Hugging Face's form whose weights a first start takes in place of random ones, or of a
    dense Llama or Mistral, whose layers become experts; `[model]` must describe what comes of it (`elastic-moe ckpt
    import` writes such a job file). Each rank reads what it holds."""
    global_batch: int = Field(32, ge=1, le=10**7)
    """Sequences in a step, whatever the world size: ranks share them, and accumulate what does not fit."""
    seq_len: int = Field(128, ge=1)
    """Tokens in a sequence."""
    max_micro_batch: int | None = Field(None, ge=1)
    """Most sequences in one forward and backward pass of a rank; none means no limit."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` is cuda where there is one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What forward and backward compute in; parameters and optimizer state are fp32 regardless."""
    exact: bool = False
    """Let no bit of the result depend on the world size or mesh: micro-batches of one, gradients added in float64, one
    thread. To verify a set-up, not to be fast. Needs float32, and the model's widths in multiples of 32; on CUDA it
    holds as far as the kernels are deterministic."""
    keep_gathered: bool = False
    """Keep parameters gathered from the first to the last micro-batch of a step: less communication for more memory."""
    recompute: bool = False
    """Keep a layer's input alone for the backward pass, and compute the layer again there: more time for less
    memory. Changes no bit of the result."""
    expert_replicas: int = Field(0, ge=0)
    """Replicas of hot experts: at most so many experts of others that an expert-parallel rank computes in a layer
    beside its own, where few experts get most of the tokens. Their weights are sent for each pass, and their gradients
    back, where that costs less than it saves by the speeds in `[mesh]`; nothing of them is kept or saved. Changes
    the last bits of the result, so it cannot be `exact`."""
    compile: bool = False
    """Let torch.compile make one graph of each layer's attention; needs a C++ compiler on the CPU. Takes its time
    at each start, and changes the last bits of the result, so it cannot be `exact`. Where it fails, a line and an event
    say why, and the layers of that rank run as they are."""
    max_skipped: int = Field(3, ge=1)
    """Steps in a row whose loss or gradient is not finite, and which therefore change nothing, that end the job: exit
    code 70, to be looked into before it is started again."""
    validate_every: int | None = Field(None, ge=1)
    """Steps between two validations on what `data.validation` holds out, and one after the last step; none does none.
    """
    validation_sequences: int = Field(256, ge=1)
    """Sequences of a validation, at most: always the first of those held out."""
    metrics: LocalPath | None = "metrics.jsonl"
    """File that rank 0 appends a JSON line to for each step; none writes none."""
    log_every: int = Field(10, ge=1)
    """Steps between two lines of progress on the log, and between two of the metrics that have each expert's load."""
    progress: Literal["auto", "line", "log"] = "auto"
    """How rank 0 shows its progress: a `line` that is drawn anew, or the `log`; `auto` is a line on a terminal."""
    peak_flops: float | None = Field(None, gt=0)
    """Operations per second of one device at best, by which model FLOPs utilisation is told; none takes what is known
    of a GPU by its name, and measures a CPU for a moment."""
    tensorboard: PathOrUrl | None = None
    """Folder for TensorBoard's files, which rank 0 writes; none writes none. Needs the extra `tensorboard`."""
    wandb: str | None = Field(None, min_length=1)
    """Project of Weights & Biases that rank 0 writes a run of; none writes none. It stays on this machine (`wandb sync`
    sends it) unless `WANDB_MODE=online`. Needs the extra `wandb`."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.exact and self.dtype != "float32":
            raise ValueError(f'exact = true needs dtype = "float32", not "{self.dtype}": change one of them')
        if self.exact and self.compile:
            raise ValueError("exact = true cannot be compiled: set train.compile to false")
        if self.exact and self.expert_replicas:
            raise ValueError(
                f"exact = true computes an expert's rows on one rank, and expert_replicas = {self.expert_replicas} on "
                "several: set expert_replicas to 0"
            )
        if self.exact and self.max_micro_batch not in (None, 1):
            raise ValueError(
                f"exact = true trains in micro-batches of 1, not max_micro_batch = {self.max_micro_batch}: leave one "
                "of them out"
            )
        return self

    @property
    def micro_batch_limit(self) -> int | None:
        """Most sequences in one pass, exact mode considered; None for no limit."""
        return 1 if self.exact else self.max_micro_batch


class CheckpointConfig(Section):
    """Where the state goes, and how often."""

    url: PathOrUrl | None = None
    """Folder or store URL that the run's checkpoints are kept in; none keeps no checkpoint."""
    every: int | str = 50
    """Steps between two checkpoints; a time between them, such as `"30s"` or `"5min"`; or `"auto"`: the next one once
    the last is committed, but not more often than it pays, by what a save costs and how often the job fails (Young and
    Daly's interval). The last step is always kept."""
    ram_every: int | str | None = None
    """The same, but for `"auto"`, for states that stay in their node's memory and in a peer's, between the others."""
    backlog: Literal["wait", "skip", "replace"] = "wait"
    """What becomes of a checkpoint that is due while the memory for copies holds earlier ones: the training waits,
    for a while and not for ever; it is left out; or it takes the place of one that has not begun to be stored."""
    prefix_spread: int = Field(1, ge=1, le=256)
    """Over how many prefixes the data of a checkpoint is spread in the bucket: S3 limits requests by prefix."""
    check_replicas: int | None = Field(None, ge=1)
    """Steps between two comparisons of what replicas hold, bit by bit, and before each save: silent corruption. A
    replica that differs is told by rank and host, and given what most hold; where no majority is, the job goes back to
    its last checkpoint. None compares nothing."""
    keep: int = Field(3, ge=1)
    """Newest checkpoints kept; unhealthy ones (with a NaN) do not count, and push out no healthy one."""
    staging: Literal["sync", "overlapped"] = "overlapped"
    """`overlapped`: a save returns while parameters and moments are still copied, beside the next step's forward and
    backward passes, and the optimizer waits for the rest. `sync`: it returns once all is copied."""
    take_over: bool = False
    """Take the URL from another job that saves there, without asking whether it is alive: it can save no more then."""

    @field_validator("every", "ram_every", mode="before")
    @classmethod
    def _says_when(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None:
            try:
                parse_every(value, str(info.field_name), allows_auto=info.field_name == "every")
            except UsageError as error:
                raise ValueError(str(error)) from None
        return value

    @model_validator(mode="after")
    def _keeps_states_between_saves(self) -> Self:
        if self.ram_every is not None and _is_within(self.ram_every, self.every):
            raise ValueError(
                f"ram_every = {self.ram_every!r} keeps no state between the checkpoints of every = {self.every!r}, "
                "which stay in memory as well: lower ram_every, or leave it out"
            )
        return self


def _is_within(ram_every: int | str, every: int | str) -> bool:
    """Whether a state that is due by the one is always due by the other as well."""
    mine, other = vars(parse_every(ram_every)), vars(parse_every(every))
    if "steps" in mine and "steps" in other:
        return bool(mine["steps"] % other["steps"] == 0)
    return "seconds" in mine and "seconds" in other and bool(mine["seconds"] >= other["seconds"])
