"""A job's configuration: its sections, read from a TOML file, the environment and `--set`.

Later wins: the sections' defaults, the file, ``{ENV_PREFIX}SECTION__FIELD`` in the environment, ``--set
section.field=value``. The values of the last two are read as TOML, and what is no TOML value is a string, so
``--set checkpoint.url=s3://bucket/run`` needs no quotes. Imports no torch.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from elastic_moe.data.config import DataConfig
from elastic_moe.errors import UserError
from elastic_moe.machine import MachineSpeed, read_calibration
from elastic_moe.model.config import ModelConfig
from elastic_moe.section import NONE, Section
from elastic_moe.trainer.config import CheckpointConfig, OptimConfig, TrainConfig
from elastic_moe.urls import LocalPath
from launcher import Environment, MeshSpec, hide_secrets

ENV_PREFIX = f"{Environment.prefix}_"

_GIB = 1 << 30
_SHOWN_CHARACTERS = 80
_FILE_BYTES_MAX = 1 << 20


class MeshConfig(MachineSpeed):
    """What the mesh planner is told beyond the model: pins, limits, and the machines' speed."""

    expert: int | None = Field(None, ge=1)
    """Fixes the expert-parallel degree: at most `model.num_experts`, which it need not divide."""
    shard: int | None = Field(None, ge=1)
    """Fixes the number of FSDP shards."""
    replicate: int | None = Field(None, ge=1)
    """Fixes the number of replicas."""
    max_idle: int = Field(0, ge=0)
    """Slots that may stay without a worker where fewer ranks are as fast."""
    memory_gib: float | None = Field(None, ge=1e-3, le=1e9)
    """Memory of one rank; none takes what the machines have where it trains, and plans without a limit elsewhere."""
    calibration: LocalPath | None = None
    """File of measured speeds (`python -m elastic_moe.calibrate`), over which the other fields are laid."""


class JobConfig(BaseModel):
    """The whole configuration of a training job. Each section is declared beside the code that obeys it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: ModelConfig = Field(default={}, validate_default=True)
    data: DataConfig = Field(default={}, validate_default=True)
    optim: OptimConfig = Field(default={}, validate_default=True)
    train: TrainConfig = Field(default={}, validate_default=True)
    checkpoint: CheckpointConfig = Field(default={}, validate_default=True)
    mesh: MeshConfig = Field(default={}, validate_default=True)

    @model_validator(mode="after")
    def _validates_on_something(self) -> Self:
        if self.train.validate_every is not None and not self.data.validation:
            raise ValueError(
                f"train.validate_every = {self.train.validate_every} has nothing to validate on: set data.validation to"
                " the part of the samples to hold out, such as 0.01"
            )
        return self

    @model_validator(mode="after")
    def _ends_documents_by_a_token(self) -> Self:
        end, num_tokens = self.data.end_of_document, self.model.vocab_size
        if isinstance(end, int) and end >= num_tokens:
            raise ValueError(
                f"data.end_of_document = {end} is no token of model.vocab_size = {num_tokens}: lower it, or raise "
                "model.vocab_size above it"
            )
        return self

    @model_validator(mode="after")
    def _compares_replicas(self) -> Self:
        if self.checkpoint.check_replicas is not None and self.mesh.replicate == 1:
            raise ValueError(
                f"checkpoint.check_replicas = {self.checkpoint.check_replicas} has nothing to compare with "
                "mesh.replicate = 1: leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _experts_for_all(self) -> Self:
        if self.train.expert_replicas > self.model.num_experts:
            raise ValueError(
                f"train.expert_replicas = {self.train.expert_replicas} is more than model.num_experts = "
                f"{self.model.num_experts}: a rank takes no expert twice, lower it"
            )
        if self.mesh.expert is not None and self.mesh.expert > self.model.num_experts:
            raise ValueError(
                f"mesh.expert = {self.mesh.expert} is more than model.num_experts = {self.model.num_experts}: "
                "some expert-parallel ranks would never hold an expert, lower it"
            )
        return self


class Setting(NamedTuple):
    """A value from outside the file, and what an error calls the place where it stands."""

    path: tuple[str, ...]
    value: Any
    origin: str


def load(path: str | Path, *, sets: Sequence[str] = (), environ: Mapping[str, str]) -> JobConfig:
    """Read the job in the TOML file `path`, and lay the environment and `sets` ("section.field=value") over it.

    Raises:
        UserError: the file is missing or no TOML, or a field is unknown or has a value that it cannot have.
    """
    path = Path(os.path.expanduser(path))
    tree = _read(path)
    settings = [*_from_environ(environ), *_from_sets(sets)]
    for setting in settings:
        _lay(tree, setting, path)
    _lay_over_calibration(tree)
    return checked(tree, str(path), settings)


def checked(tree: Mapping[str, Any], origin: str, settings: Sequence[Setting] = ()) -> JobConfig:
    """The job of what a file holds.

    Args:
        origin: the file, for errors.
        settings: what of `tree` is from elsewhere.

    Raises:
        UserError: a field is unknown or has a value that it cannot have.
    """
    try:
        return JobConfig.model_validate(tree)
    except ValidationError as error:
        raise UserError(_explain(error.errors(include_url=False), origin, settings)) from None


def mesh_spec(job: JobConfig) -> MeshSpec:
    """Take from `job` what the mesh planner has to know."""
    model, mesh, train = job.model, job.mesh, job.train
    return MeshSpec(
        global_batch=train.global_batch,
        num_experts=model.num_experts,
        top_k=model.top_k,
        dense_params=model.num_dense_params,
        expert_params=model.num_expert_params,
        num_layers=model.num_layers,
        model_dim=model.dim,
        ffn_dim=model.expert_dim,
        shared_dim=model.shared_expert_dim,
        query_dim=model.num_heads * model.head_width,
        key_dim=model.num_kv_heads * model.head_width,
        vocab_size=model.vocab_size,
        tokens_per_sample=train.seq_len,
        max_idle=mesh.max_idle,
        max_micro_batch=train.micro_batch_limit,
        recompute=train.recompute,
        counts_first=model.balance == "global",
        keep_gathered=train.keep_gathered,
        expert_replicas=train.expert_replicas,
        memory_cap_bytes=None if mesh.memory_gib is None else round(mesh.memory_gib * _GIB),
        expert=mesh.expert,
        shard=mesh.shard,
        replicate=mesh.replicate,
        activation_bytes=4 if train.dtype == "float32" else 2,
        reduce_bytes=8 if train.exact else 4,
        **{name: getattr(mesh, name) for name in MachineSpeed.model_fields},
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file() and not path.is_dir() and path.exists():
            raise UserError(
                f"job file {path} is a pipe or a device, and every worker reads it at every start: write it to a file"
            )
        with path.open("rb") as file:
            content = file.read(_FILE_BYTES_MAX + 1)
        if len(content) > _FILE_BYTES_MAX:
            raise UserError(f"{path} is not a job file: it is larger than {_FILE_BYTES_MAX >> 20} MiB")
        return tomllib.loads(content.decode("utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"job file {path} does not exist") from None
    except OSError as error:
        raise UserError(f"cannot read job file {path}: {error.strerror}") from None
    except RecursionError:
        raise UserError(f"{path} is not a job file: its values are nested too deeply") from None
    except ValueError as error:  # TOMLDecodeError names line and column; UnicodeDecodeError the byte
        raise UserError(f"{path} is not a TOML file: {error}") from None


def _from_environ(environ: Mapping[str, str]) -> Iterator[Setting]:
    for name in sorted(environ):
        if name.startswith(ENV_PREFIX):
            path = tuple(name.removeprefix(ENV_PREFIX).lower().split("__"))
            yield _setting(path, environ[name], name, f"{ENV_PREFIX}SECTION__FIELD")
        elif name.startswith(Environment.prefix) and "__" in name:  # which nobody else reads
            raise UserError(f"{name}: did you mean {ENV_PREFIX}{name.removeprefix(Environment.prefix)}?")


def _from_sets(sets: Iterable[str]) -> Iterator[Setting]:
    for text in sets:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--set {text}: there is no value; write SECTION.FIELD=VALUE")
        yield _setting(tuple(key.strip().split(".")), value.strip(), f"--set {key.strip()}", "SECTION.FIELD=VALUE")


def _setting(path: tuple[str, ...], text: str, origin: str, form: str) -> Setting:
    if len(path) != 2 or not all(path):
        homes = _homes(path[-1])
        hint = f"; did you mean {homes[0]}?" if homes else ""
        raise UserError(f"{origin}: write {form}{hint}")
    return Setting(path, _value(text), origin)


def _value(text: str) -> Any:
    try:
        tree = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):  # of a number with thousands of digits it is no TOMLDecodeError
        return text
    return tree["value"] if len(tree) == 1 else text


def _lay(tree: dict[str, Any], setting: Setting, path: Path) -> None:
    section, field = setting.path
    table = tree.setdefault(section, {})
    if not isinstance(table, dict):
        raise UserError(f"{path}: {section} = {table!r} is a value; it must be a section, [{section}]")
    table[field] = setting.value


def _lay_over_calibration(tree: dict[str, Any]) -> None:
    """Put the speeds of the file that `mesh.calibration` names under those that the job gives."""
    mesh = tree.get("mesh")
    if isinstance(mesh, dict) and isinstance(path := mesh.get("calibration"), str) and path not in ("", NONE):
        tree["mesh"] = {**read_calibration(path), **mesh}


def _fields(model: type[BaseModel], section: str | None = None) -> list[str]:
    """The names of the fields of `model`, or of one of its sections."""
    if section is None:
        return list(model.model_fields)
    inner = model.model_fields[section].annotation
    return list(inner.model_fields) if isinstance(inner, type) and issubclass(inner, BaseModel) else []


def _homes(field: str) -> list[str]:
    """Where a job file has a field of that name."""
    return [f"{section}.{field}" for section in _fields(JobConfig) if field in _fields(JobConfig, section)]


def _explain(errors: Sequence[ErrorDetails], file: str, settings: Sequence[Setting]) -> str:
    """Tell the first mistake in one line: where it stands, which field, its value, what is allowed."""
    first = errors[0]
    loc = tuple(map(str, first["loc"]))
    # An unknown section is named alone; a section's own validator too, but blames no single field.
    depth = len(loc) if first["type"] == "extra_forbidden" else 2
    origin = next((setting.origin for setting in reversed(settings) if setting.path[:depth] == loc[:2]), file)
    others = {tuple(map(str, error["loc"][:2])) for error in errors} - {loc[:2]}  # of a choice there are several
    more = f" (and {len(others)} more)" if others else ""
    return hide_secrets(f"{origin}: {_mistake(first, loc)}{more}")


def _mistake(error: ErrorDetails, loc: tuple[str, ...]) -> str:
    name = ".".join(loc[:2])
    if error["type"] == "extra_forbidden":
        known = _fields(JobConfig) if len(loc) == 1 else _fields(JobConfig, loc[0])
        close = difflib.get_close_matches(loc[-1], known, n=1, cutoff=0.75)
        close = close or _homes(loc[-1]) or difflib.get_close_matches(loc[-1], known, n=1)
        close = close or [name for name in known if loc[-1] in name]
        hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
        return f"unknown {'section' if len(loc) == 1 else 'key'} {_short('.'.join(loc))}; {hint}"
    if error["type"] == "value_error":  # a section's own validator names its fields itself
        return f"{name + ': ' if loc else ''}{error['msg'].removeprefix('Value error, ')}"
    allowed = error["msg"].replace("Input should", "it must").replace("String should", "it must")
    or_none = f', or "{NONE}"' if len(loc) > 1 and _may_be_none(*loc[:2]) else ""
    return f"{name} = {_shown(error['input'])}: {allowed}{or_none}"


def _may_be_none(section: str, field: str) -> bool:
    inner = JobConfig.model_fields[section].annotation
    return isinstance(inner, type) and issubclass(inner, Section) and inner.may_be_none(field)


def _shown(value: Any) -> str:
    try:
        return _short(repr(value))
    except ValueError:  # Python writes no number with more than 4300 digits
        return "a number with thousands of digits"


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 3]}..."
