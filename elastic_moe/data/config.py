"""Where the training data comes from. No torch."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AliasChoices, Field, model_validator

from elastic_moe.section import Section
from elastic_moe.urls import LocalPath, PathOrUrl


class DataConfig(Section):
    """A corpus. All its files are read in the order of their names, which must not change while a job runs."""

    url: PathOrUrl = "stdlib"
    """A path or any fsspec URL, with `*` for several files. `stdlib` is the source text of the running Python's own
    standard library: real text on every machine, without a download."""
    format: Literal["auto", "text", "jsonl", "parquet", "tokens"] = "auto"
    """`text`, `jsonl` and `parquet` hold documents; `tokens` are `.npy` arrays of uint8, uint16 or uint32 token ids.
    `auto` goes by the file name: `.jsonl`, `.parquet`, `.npy`, else text, if it is text. Text and JSON lines may be
    compressed (`.gz`, `.bz2`, `.xz`, `.zst`)."""
    text_field: str = Field("text", min_length=1, validation_alias=AliasChoices("text_field", "jsonl_field"))
    """The field of each JSON line, or the column, that holds the text."""
    tokenizer: PathOrUrl | None = None
    """A `tokenizer.json` of Hugging Face's, or a folder that holds one, by path or any fsspec URL; needs the extra
    `huggingface`. None reads text as its UTF-8 bytes, one token each. Checkpoints hold it."""
    end_of_document: Annotated[int, Field(ge=0)] | str | None = None
    """Token behind each document: an id, or the tokenizer's name for it. None means the `eos_token` of the
    `tokenizer_config.json` beside the tokenizer, or a name by which most tokenizers have one. Of bytes it is 0."""
    document_mask: bool = False
    """Let no token attend to another document's: a sequence holds as many documents as fit. Positions go on counting
    over them, for attention depends on distances alone; what follows a document's end is not predicted from it."""
    validation: float = Field(0.0, ge=0, lt=1)
    """Part of the samples, picked evenly at random, that is never trained on; see `train.validate_every`."""
    may_change: bool = False
    """Go on from a checkpoint of other data, another tokenizer or another way of packing, which is refused
    otherwise: from there on a step holds the samples that it would have held in a new job with these."""
    cache: LocalPath | None = None
    """Local folder that the processes of a node share, for token ids of what is not read where it lies: remote and
    compressed files, JSON lines, parquet, and all that a tokenizer has read. None means `elastic-moe` in
    `$XDG_CACHE_HOME`, or in `~/.cache`."""
    cache_gib: float = Field(100.0, gt=0, le=1e9)
    """Most that `cache` may hold; what was used longest ago goes first."""

    @model_validator(mode="after")
    def _documents_end(self) -> Self:
        if self.end_of_document is not None and self.tokenizer is None:
            if isinstance(self.end_of_document, str):
                raise ValueError(
                    f"end_of_document = {self.end_of_document[:60]!r} is a token of a tokenizer, and there is none: "
                    "set tokenizer, or give a token id"
                )
            if self.format in ("text", "jsonl", "parquet") and self.end_of_document:
                raise ValueError(
                    f"end_of_document = {self.end_of_document}, and text that is read as bytes ends its documents by 0:"
                    " leave it out, or set tokenizer"
                )
        return self
