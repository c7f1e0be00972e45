"""Text to token ids and back: by bytes, or by a `tokenizer.json` of Hugging Face's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import fsspec
import numpy as np
import numpy.typing as npt

from elastic_moe.data.config import DataConfig
from elastic_moe.data.stores import tells_of_a_store
from elastic_moe.errors import UserError

Ids = npt.NDArray[np.unsignedinteger[Any]]

FILE, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
_MAX_FILE_BYTES = 256 << 20  # the largest published ones have 33 MiB
_MAX_16_BIT_TOKENS = 1 << 16
# What ends a document in most published tokenizers that come without their config.
_USUAL_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<｜end▁of▁sentence｜>")


class TextTokenizer(Protocol):
    """Makes token ids of text. No token is added but those that end documents."""

    digest: str
    """Of all that decides which ids a text has; "" for bytes."""
    num_tokens: int
    """One more than the highest id."""
    end_of_document: int
    dtype: np.dtype[Any]
    """Of ids, as narrow as they allow."""

    def encode(self, texts: Sequence[bytes], origin: str) -> list[Ids]:
        """Ids of each text, 1-D. Raises UserError, which names `origin`, where one is no text."""


class ByteTokenizer:
    """A byte is a token, and a zero byte ends a document."""

    digest = ""
    num_tokens = 256
    end_of_document = 0
    dtype = np.dtype(np.uint8)

    def encode(self, texts: Sequence[bytes], origin: str) -> list[Ids]:
        """Any bytes do."""
        return [np.frombuffer(text, dtype=np.uint8) for text in texts]

    def decode(self, before: Sequence[int], ids: Iterable[int]) -> Iterator[bytes]:
        """Yield a byte for each token, if it stands for one."""
        for one in ids:
            yield bytes([one])


class TokenizerFiles(NamedTuple):
    """What a tokenizer is read from, and what checkpoints and exported folders hold of it."""

    tokenizer: bytes
    """The content of `tokenizer.json`."""
    config: bytes = b""
    """That of `tokenizer_config.json`; empty where there is none."""
    end: int | None = None
    """The token that ends a document, where it is known already."""

    def packed(self) -> bytes:
        """All in one; `unpacked` takes it."""
        head = json.dumps({"tokenizer": len(self.tokenizer), "end": self.end}).encode()
        return b"\n".join((head, self.tokenizer)) + self.config

    @classmethod
    def unpacked(cls, packed: bytes) -> TokenizerFiles:
        """What `packed` has made one of."""
        head, _, files = packed.partition(b"\n")
        told = json.loads(head)
        return cls(files[: told["tokenizer"]], files[told["tokenizer"] :], told["end"])


class FileTokenizer:
    """A `tokenizer.json`, as the library `tokenizers` reads it, without what it says of padding and truncation.

    Text that spells a special token becomes that token, as it does in `transformers`.
    """

    def __init__(self, files: TokenizerFiles, origin: str, end: int | str | None = None) -> None:
        """Args:
            files: what it is read from.
            origin: its place, for errors.
            end: `data.end_of_document`.

        Raises:
            UserError: it is no tokenizer, `tokenizers` is not installed, or it is not known what ends a document.
        """
        self._tokenizer = _parsed(files.tokenizer, origin)
        if dropout := getattr(self._tokenizer.model, "dropout", None):
            raise UserError(
                f"data.tokenizer: {origin} has a dropout of {dropout:g}, by which a text has other ids each time: set "
                "model.dropout to null in it"
            )
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.num_tokens = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        if not self.num_tokens:
            raise UserError(f"data.tokenizer: {origin} has no tokens")
        self.end_of_document = self._end(files.end if end is None else end, files.config, origin)
        self.files = files._replace(end=self.end_of_document)
        content = b"%d %s" % (self.end_of_document, files.tokenizer)
        self.digest = hashlib.sha256(content).hexdigest()
        self.dtype = np.dtype(np.uint16 if self.num_tokens <= _MAX_16_BIT_TOKENS else np.uint32)

    def encode(self, texts: Sequence[bytes], origin: str) -> list[Ids]:
        decoded = [_utf8(text, origin) for text in texts]
        try:
            encodings = self._tokenizer.encode_batch_fast(decoded, add_special_tokens=False)  # on all cores
        except Exception as error:  # noqa: BLE001 - the library raises bare `Exception`
            why = " ".join(str(error).split())
            raise UserError(f"data.tokenizer cannot read all of {origin}: {why}") from None
        return [np.array(encoding.ids, dtype=self.dtype) for encoding in encodings]

    def decode(self, before: Sequence[int], ids: Iterable[int]) -> Iterator[bytes]:
        """Yield the text of `ids` as they come, in UTF-8, in parts that are whole characters.

        Args:
            before: the tokens that they follow, which says whether they begin with a space.
        """
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(list(before), skip_special_tokens=False)
        for one in ids:
            if (text := stream.step(self._tokenizer, one)) is not None:
                yield text.encode()

    def name_of(self, token: int) -> str | None:
        """What the tokenizer calls a token."""
        name: str | None = self._tokenizer.id_to_token(token)
        return name

    def _end(self, wanted: int | str | None, config: bytes, origin: str) -> int:
        if isinstance(wanted, int):
            if wanted >= self.num_tokens:
                raise UserError(f"data.end_of_document is {wanted}, and {origin} has {self.num_tokens} tokens")
            return wanted
        told = [] if wanted else _eos_names(config, origin)
        for name in [wanted] if wanted else told or _USUAL_ENDS:
            if (found := self._tokenizer.token_to_id(name)) is not None:
                return int(found)
        if told:
            raise UserError(
                f"{origin} has no token {told[0]!r}, which the {CONFIG_FILE} beside it names as its eos_token: set "
                "data.end_of_document to a token's name or id"
            )
        if wanted:
            raise UserError(f"data.end_of_document is {wanted!r}, which {origin} has no token for")
        raise UserError(
            f"{origin} does not say which token ends a document: set data.end_of_document to its name or id"
        )


def open_tokenizer(config: DataConfig) -> ByteTokenizer | FileTokenizer:
    """The tokenizer of a job.

    Raises:
        UserError: it cannot be read.
    """
    if config.tokenizer is None:
        return ByteTokenizer()
    return FileTokenizer(read_tokenizer(config.tokenizer), config.tokenizer, config.end_of_document)


def read_tokenizer(url: str) -> TokenizerFiles:
    """The files of the tokenizer at a path or URL, that of its `tokenizer.json` or of the folder which holds it.

    Raises:
        UserError: there is none.
    """
    try:
        fs, path = fsspec.core.url_to_fs(url)
        if fs.isdir(path):
            path = f"{path.rstrip('/')}/{FILE}"
            if not fs.exists(path):
                raise UserError(
                    f"data.tokenizer: {url} holds no {FILE}: let transformers make one "
                    "(AutoTokenizer.from_pretrained(...).save_pretrained(...))"
                )
        content = _read(fs, path)
        beside = f"{path.rpartition('/')[0]}/{CONFIG_FILE}"
        return TokenizerFiles(content, _read(fs, beside) if fs.exists(beside) else b"")
    except Exception as error:
        # ValueError is fsspec's answer to a protocol that it does not know.
        if not isinstance(error, (OSError, ImportError, ValueError)) and not tells_of_a_store(error):
            raise
        raise UserError(f"data.tokenizer {url!r} cannot be read: {' '.join(str(error).split())}") from error


def _read(fs: Any, path: str) -> bytes:
    with fs.open(path, "rb") as file:
        content: bytes = file.read(_MAX_FILE_BYTES + 1)
    if len(content) > _MAX_FILE_BYTES:
        raise UserError(f"data.tokenizer: {path} has more than {_MAX_FILE_BYTES >> 20} MiB: it is no tokenizer")
    return content


def _parsed(content: bytes, origin: str) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise UserError(
            f"data.tokenizer is {origin}, for which tokenizers is missing: pip install safetensors tokenizers, "
            "or install elastic-moe with its extra huggingface"
        ) from None
    try:
        return Tokenizer.from_str(content.decode("utf-8"))
    except Exception as error:  # noqa: BLE001 - the library raises bare `Exception`
        why = " ".join(str(error).split())
        raise UserError(f"data.tokenizer: {origin} is not a {FILE} of Hugging Face's: {why}") from None


def _eos_names(config: bytes, origin: str) -> list[str]:
    """The end-of-sequence token that a `tokenizer_config.json` names: as text, or as an object with its text.

    Raises:
        UserError: it is no JSON object.
    """
    try:
        named = json.loads(config).get("eos_token") if config else None
    except (ValueError, AttributeError, RecursionError):
        raise UserError(f"data.tokenizer: the {CONFIG_FILE} beside {origin} is not a JSON object") from None
    content = named.get("content") if isinstance(named, dict) else named
    return [content] if isinstance(content, str) else []


def _utf8(text: bytes, origin: str) -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{origin} is not UTF-8 ({error.reason}: {text[error.start : error.start + 4]!r}), which a "
            "tokenizer reads: convert it (iconv -t utf-8)"
        ) from None
