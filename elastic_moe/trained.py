"""A trained model in a checkpoint, read without a process group: for exports, and to sample from it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, Self

import torch
from pydantic import ValidationError
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from elastic_moe.data.corpus import TokenKind
from elastic_moe.data.tokenizer import ByteTokenizer, TokenizerFiles
from elastic_moe.errors import UserError
from elastic_moe.model.config import ModelConfig
from elastic_moe.model.decoder import Decoder
from storage import ShardReader, checkpoints, locate

_MODEL, _FIELDS, _STEP, _SEQ_LEN = "model.", "data.model.", "data.step", "data.seq_len"
_TOKENIZER, _TOKENS = "data.tokenizer_files", "data.tokens"


class TrainedModel:
    """The newest checkpoint of a run, or one step of it; a context manager, since its store stays open.

    Attributes:
        config: of its model.
        step: after which it was saved.
        seq_len: tokens in a sequence that it was trained on.
        tokenizer: that of its job; None of one that was trained on bytes, or on ids.
        tokens: what its token ids stand for, a `TokenKind`; "" where its checkpoint does not say.
    """

    def __init__(self, url: str) -> None:
        """Find the checkpoint.

        Raises:
            StorageError: there is none at `url`, or it cannot be read.
            UserError: it is none of `elastic-moe train`, or was saved before these kept their model's fields.
        """
        with locate(url) as location:
            folder = location.prefix if location.prefix is not None else checkpoints(location)[0]
        # One step from here on: a job that trains on saves newer ones meanwhile.
        self._url = url if location.prefix is not None else f"{url.rstrip('/')}/{folder.rstrip('/')}"
        self._reader = ShardReader(self._url)
        try:
            self._look()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the store."""
        self._reader.close()

    def _look(self) -> None:
        self._metadata = self._reader.read_metadata()
        known = self._metadata.state_dict_metadata
        fields = [name for name in known if name.startswith(_FIELDS)]
        if not fields or _STEP not in known:
            raise UserError(
                f"the checkpoint at {self._url} does not say what its model is: `elastic-moe train` did not save it, "
                "or an early release did: train one step on from it"
            )
        optional = [name for name in (_TOKENIZER, _TOKENS) if name in known]
        values = self._load(dict.fromkeys([*fields, _STEP, _SEQ_LEN, *optional]))
        try:
            self.config = ModelConfig.model_validate({name.removeprefix(_FIELDS): values[name] for name in fields})
        except ValidationError as error:
            (first, *_) = error.errors(include_url=False)
            raise UserError(
                f"the checkpoint at {self._url} has a model that this release does not know: {first['msg']}"
            ) from None
        self.step: int = values[_STEP]
        self.seq_len: int = values[_SEQ_LEN]
        self.tokens: str = values.get(_TOKENS, "")
        packed: bytes = values.get(_TOKENIZER, b"")
        self.tokenizer = TokenizerFiles.unpacked(packed) if packed else None

    @property
    def is_of_bytes(self) -> bool:
        """Whether its token ids are bytes, as far as is known: once that was told by their number alone."""
        return self.tokens == TokenKind.BYTES or (
            not self.tokens and self.config.vocab_size == ByteTokenizer.num_tokens
        )

    def load(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Parameters or buffers of the model by their names, whole, fp32, on the CPU, every byte verified.

        Raises:
            StorageError: they are damaged, or cannot be read.
        """
        empty: dict[str, Any] = {}
        for name in names:
            entry = self._metadata.state_dict_metadata.get(_MODEL + name)
            if not isinstance(entry, TensorStorageMetadata):
                raise UserError(f"the checkpoint at {self._url} holds no tensor {_MODEL}{name}")
            empty[_MODEL + name] = torch.empty(entry.size)
        return {name.removeprefix(_MODEL): tensor for name, tensor in self._load(empty).items()}

    def decoder(self) -> Decoder:
        """The model with its weights, on the CPU, to be evaluated."""
        with torch.device("meta"):
            model = Decoder(self.config)
        model.to_empty(device="cpu")
        model.load_state_dict(self.load(model.state_dict()))
        return model.eval()

    def _load(self, state: dict[str, Any]) -> dict[str, Any]:
        with warnings.catch_warnings():
            # DCP finds it worth a warning that there is no process group.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
            load(state, storage_reader=self._reader, no_dist=True)
        return state
