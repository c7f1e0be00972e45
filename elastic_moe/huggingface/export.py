"""A checkpoint as a folder that `transformers` loads and generates from."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elastic_moe.data.tokenizer import CONFIG_FILE, FILE, FileTokenizer
from elastic_moe.errors import UserError
from elastic_moe.huggingface.config import mixtral_config
from elastic_moe.huggingface.names import Source, layers, published
from elastic_moe.huggingface.tokenizer import END_OF_DOCUMENT, NUM_BYTES, byte_tokenizer
from elastic_moe.trained import TrainedModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export(trained: TrainedModel, folder: Path, dtype: str, tell: Callable[[int, int], None]) -> bool:
    """Write `folder`: config, weights, and the tokenizer that the model was trained with, also where it is of bytes.

    A layer is in memory at a time. The folder has its name only once all of it is there.

    Args:
        folder: must not exist.
        dtype: of `DTYPES`.
        tell: called with the parts that are done, and all.

    Returns:
        Whether there is a tokenizer in it: of a model that was trained on ids it is not known.

    Raises:
        UserError: the folder exists or cannot be written, or Mixtral has no such model.
        StorageError: the checkpoint is damaged, or cannot be read.
    """
    config = mixtral_config(trained.config, num_positions=trained.seq_len, dtype=dtype)
    tokenizer, end = _tokenizer_files(trained)
    config["eos_token_id"] = end
    if folder.exists():
        raise UserError(f"{folder} exists: name another folder, or remove it")
    unfinished = folder.with_name(f".{folder.name}.unfinished-{os.getpid()}")
    try:
        unfinished.mkdir(parents=True)
        _write_weights(trained, unfinished, DTYPES[dtype], tell)
        _write_json(unfinished / "config.json", config)
        for name, content in tokenizer.items():
            (unfinished / name).write_bytes(content)
        unfinished.rename(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return bool(tokenizer)


def _tokenizer_files(trained: TrainedModel) -> tuple[dict[str, bytes], int | None]:
    """The files of a model's tokenizer, by their names, and the token that ends its documents; none of an unknown."""
    told: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": trained.seq_len}
    if trained.tokenizer is not None:
        tokenizer = FileTokenizer(trained.tokenizer, "the checkpoint's tokenizer")
        told["eos_token"] = tokenizer.name_of(tokenizer.end_of_document)
        config = trained.tokenizer.config or _json(told)
        return {FILE: trained.tokenizer.tokenizer, CONFIG_FILE: config}, tokenizer.end_of_document
    if not trained.is_of_bytes or trained.config.vocab_size < NUM_BYTES:
        return {}, None
    return {FILE: _json(byte_tokenizer()), CONFIG_FILE: _json(told)}, END_OF_DOCUMENT


def _write_weights(trained: TrainedModel, folder: Path, dtype: torch.dtype, tell: Callable[[int, int], None]) -> None:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError:
        raise UserError(
            "safetensors is missing, which writes such folders: pip install safetensors tokenizers, "
            "or install elastic-moe with its extra huggingface"
        ) from None
    parts = list(layers(trained.config, published(trained.config)))
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for number, sources in enumerate(parts, start=1):
        name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        tensors = _theirs(trained.load(sources), sources, dtype)
        try:
            save_file(tensors, str(folder / name), metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk, say
            raise UserError(f"{folder / name} cannot be written: {' '.join(str(error).split())}") from error
        weight_map |= dict.fromkeys(tensors, name)
        total_bytes += sum(tensor.nbytes for tensor in tensors.values())
        tell(number, len(parts))
    _write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))},
    )


def _theirs(ours: Mapping[str, Tensor], sources: Mapping[str, Source], dtype: torch.dtype) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, tensor in ours.items():
        parts = tensor.to(dtype).unbind() if sources[name].is_stacked else (tensor.to(dtype),)
        # Each has memory of its own: safetensors refuses what shares some.
        out |= {theirs: part.clone() for theirs, part in zip(sources[name].names, parts, strict=True)}
    return out


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_bytes(_json(content))


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
