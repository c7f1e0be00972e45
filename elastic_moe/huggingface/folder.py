"""A folder of safetensors that is read by boxes: a rank takes what it holds, and nothing is held whole."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elastic_moe.errors import UserError
from elastic_moe.huggingface.config import Upcycling, end_of_text, is_dense, is_tied, model_config
from elastic_moe.huggingface.names import Source, dense, fused, published, their_shape
from elastic_moe.model.config import TRAINING_FIELDS, ModelConfig

_INDEX = "model.safetensors.index.json"
_CONFIG = "config.json"
_WITHOUT_USE = "rotary_emb.inv_freq"  # a buffer that early files hold
_HEAD = "lm_head.weight"
_DTYPES = ("F64", "F32", "F16", "BF16")  # as safetensors names them


class WeightFolder:
    """The weights in a folder that `transformers` has written or that was published, under our names.

    Attributes:
        config: of the model that they are of, or become.
        end_of_text: the token that ends texts, as theirs says; None if it does not.
        is_dense: whether theirs has no experts, so that each feed-forward network is copied into all of its layer's.
    """

    def __init__(self, path: str, upcycling: Upcycling | None = None) -> None:
        """Args:
            upcycling: what becomes of a dense model's layers; none refuses such models.

        Raises:
            UserError: the folder is not a Mixtral's, or a dense model's to upcycle, or is not whole.
        """
        self._path = Path(path)
        theirs = read_json(self._path / _CONFIG)
        self.config = model_config(theirs, str(self._path / _CONFIG), upcycling)
        self.end_of_text = end_of_text(theirs)
        self.is_dense = is_dense(theirs)
        self._files = _files_by_name(self._path)
        self._opened: dict[Path, Any] = {}
        self._check_count()
        self._sources = self._form(is_tied=is_tied(theirs))
        names = [name for source in self._sources.values() for name in source.names]
        if missing := [name for name in names if name not in self._files]:
            raise UserError(f"{path}: the tensor {missing[0]} is missing ({len(missing)} of its config's model are)")
        ignored = (_WITHOUT_USE, _HEAD) if is_tied(theirs) else (_WITHOUT_USE,)
        if unused := [name for name in sorted(self._files.keys() - set(names)) if not name.endswith(ignored)]:
            raise UserError(
                f"{path}: its config's model has no use for the tensor {unused[0]} ({len(unused)} are left): are there "
                f"more layers or experts than {_CONFIG} says?"
            )

    def _check_count(self) -> None:
        """Raises UserError where the files cannot hold all layers: a config may say a billion, which are not listed."""
        config, num_tensors = self.config, len(self._files)
        if config.num_layers > num_tensors:
            raise UserError(
                f"{self._path / _CONFIG}: num_hidden_layers is {config.num_layers}, and there are {num_tensors} tensors"
            )
        if not (self.is_dense or self._is_fused()) and config.num_layers * config.num_experts > num_tensors:
            raise UserError(
                f"{self._path / _CONFIG}: {config.num_layers} layers have {config.num_experts} experts each, and there "
                f"are {num_tensors} tensors"
            )

    def _is_fused(self) -> bool:
        return any(name.endswith(".experts.gate_up_proj") for name in self._files)

    def _form(self, *, is_tied: bool) -> dict[str, Source]:
        if self.is_dense:
            return dense(self.config, is_tied=is_tied)
        return fused(self.config) if self._is_fused() else published(self.config)

    def holds(self, name: str) -> bool:
        """Whether one of our parameters is here; routers of a dense model are not."""
        return name in self._sources

    def check_model(self, config: ModelConfig) -> None:
        """Raises UserError where a job's model computes something else than the folder's."""
        for name in set(ModelConfig.model_fields) - TRAINING_FIELDS:
            theirs, ours = getattr(self.config, name), getattr(config, name)
            if name == "head_dim":
                theirs, ours = self.config.head_width, config.head_width
            if name == "norm_topk":
                theirs, ours = self.config.normalizes, config.normalizes
            if theirs != ours:
                raise UserError(f"model.{name} is {ours} and the weights in {self._path} are of a model with {theirs}")

    def read(self, name: str, starts: Sequence[int], sizes: Sequence[int], shape: Sequence[int]) -> Tensor:
        """A box of one of our parameters, in the dtype of the file.

        Args:
            name: of ours.
            starts, sizes: of the box.
            shape: of the whole parameter.

        Raises:
            UserError: the file's tensor has another shape.
        """
        source = self._sources[name]
        if source.is_copied:
            box = self._box(source.names[0], starts[1:], sizes[1:], tuple(shape[1:]))
            return box.expand(tuple(sizes))  # without a copy for each expert
        if not source.is_stacked:
            starts = list(starts)
            if source.first_row:
                starts[1] += source.first_row
            return self._box(source.names[0], starts, sizes, tuple(shape))
        rows = [
            self._box(source.names[index], starts[1:], sizes[1:], tuple(shape[1:]))
            for index in range(starts[0], starts[0] + sizes[0])
        ]
        return torch.stack(rows) if rows else torch.empty(tuple(sizes))

    def check_tensors(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Open each file, and compare the shape and the type of each tensor with what will be read.

        Args:
            shapes: of all of our parameters, whole.

        Raises:
            UserError: a file or a tensor is missing, damaged, or another than the config says.
        """
        for ours, source in self._sources.items():
            shape = tuple(shapes[ours])
            for name in source.names:
                self._part(name, shape[1:] if source.is_stacked or source.is_copied else shape)

    def _box(self, name: str, starts: Sequence[int], sizes: Sequence[int], shape: tuple[int, ...]) -> Tensor:
        part = self._part(name, shape)
        box: Tensor = part[tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))]
        return box

    def _part(self, name: str, shape: tuple[int, ...]) -> Any:
        from safetensors import SafetensorError

        file = self._file_of(name)
        try:
            part = file.get_slice(name)
        except SafetensorError:
            where = self._files[name].name
            raise UserError(f"{self._path}: {where} has no tensor {name}, which {_INDEX} says it holds") from None
        expected = their_shape(self.config, name, shape)
        if tuple(part.get_shape()) != expected:
            raise UserError(f"{self._path}: {name} has shape {tuple(part.get_shape())}, its config's has {expected}")
        if (dtype := part.get_dtype()) not in _DTYPES:
            raise UserError(f"{self._path}: {name} has {dtype} numbers: {', '.join(_DTYPES)} are read")
        return part

    def _file_of(self, name: str) -> Any:
        path = self._files[name]
        if path not in self._opened:
            self._opened[path] = _open(path)
        return self._opened[path]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file.

    Raises:
        UserError: there is none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a JSON object")
    return found


def _files_by_name(folder: Path) -> dict[str, Path]:
    if (folder / _INDEX).exists():
        listed = read_json(folder / _INDEX).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
            raise UserError(f"{folder / _INDEX} has no weight_map of names to files")
        if outside := [file for file in listed.values() if Path(file).name != file]:
            raise UserError(f"{folder / _INDEX} names a file outside of its folder: {outside[0]}")
        return {name: folder / file for name, file in listed.items()}
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} holds no .safetensors file")
    found: dict[str, Path] = {}
    for file in files:
        for name in _open(file).keys():  # noqa: SIM118 - it is no mapping
            if name in found:
                raise UserError(
                    f"{folder}: {found[name].name} and {file.name} both hold the tensor {name}, and there is no "
                    f"{_INDEX} that says which counts: leave the files of one model there"
                )
            found[name] = file
    return found


def _open(path: Path) -> Any:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise UserError(
            "safetensors is missing, which reads such folders: pip install safetensors tokenizers, "
            "or install elastic-moe with its extra huggingface"
        ) from None
    try:
        return safe_open(str(path), framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
