"""Tokenizers of Hugging Face's form, made for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from elastic_moe.data.sources import stdlib_files

END = "<|endoftext|>"


def byte_level_bpe(vocab_size: int = 320, special_tokens: tuple[str, ...] = ("<pad>", END)) -> Tokenizer:
    """A byte-level BPE of some Python source: any text has ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([stdlib_files()[0].read_text()[:50_000]], trainer)
    return tokenizer


def saved(folder: Path, tokenizer: Tokenizer | None = None, config: dict[str, Any] | None = None) -> str:
    """A folder that holds a tokenizer, and what `transformers` writes beside it if it is given."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text((tokenizer or byte_level_bpe()).to_str())
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)
