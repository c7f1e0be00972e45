"""Where the training data comes from. No torch."""

from __future__ import annotations

from typing import Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from elastic_moe.urls import PathOrUrl


class DataConfig(BaseModel):
    """A corpus. All its files are read in the order of their names, which must not change while a job runs."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    url: PathOrUrl = "stdlib"
    """A path or any fsspec URL, with `*` for several files. `stdlib` is the source text of the running Python's own
    standard library: real text on every machine, without a download."""
    format: Literal["auto", "text", "jsonl", "parquet", "tokens"] = "auto"
    """`text`, `jsonl` and `parquet` are read as UTF-8 bytes, one token each; `tokens` are `.npy` arrays of uint8,
    uint16 or uint32 token ids. `auto` goes by the file name: `.jsonl`, `.parquet`, `.npy`, else text, if it is text.
    Text and JSON lines may be compressed (`.gz`, `.bz2`, `.xz`, `.zst`)."""
    text_field: str = Field("text", min_length=1, validation_alias=AliasChoices("text_field", "jsonl_field"))
    """The field of each JSON line, or the column, that holds the text."""
    validation: float = Field(0.0, ge=0, lt=1)
    """Part of the samples, picked evenly at random, that is never trained on; see `train.validate_every`."""
