"""Text that a `tokenizer.json` reads: its ids, where they are kept, and what is refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from tokenizers import Tokenizer, models

from elastic_moe.data import DataConfig, sources
from elastic_moe.data.corpus import Corpus, open_corpus
from elastic_moe.data.tokenizer import ByteTokenizer, FileTokenizer, TokenizerFiles, open_tokenizer, read_tokenizer
from elastic_moe.errors import UserError
from tests.moe.small_tokenizers import END, byte_level_bpe, saved

BPE = byte_level_bpe()
TEXTS = ["def first():\n    return 'ünïcode'\n", "", "import this, and more of it\n" * 9]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))


def json_lines(path: Path) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return str(path)


def ids_of(corpus: Corpus) -> list[int]:
    (shard,) = corpus.shards
    return [int(token) for token in shard[0 : len(shard)]]


def expected() -> list[int]:
    end = BPE.token_to_id(END)
    return [token for text in TEXTS for token in [*BPE.encode(text, add_special_tokens=False).ids, end]]


def test_the_ids_are_the_librarys_with_an_end_behind_each_document(tmp_path: Path) -> None:
    """Of whatever holds the documents; what the tokenizer says of padding and truncation is not heeded."""
    tokenizer = byte_level_bpe()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=40)
    folder = saved(tmp_path / "tokenizer", tokenizer)
    texts = tmp_path / "texts"
    texts.mkdir()
    for i, text in enumerate(TEXTS):
        (texts / f"{i}.txt.gz").write_bytes(gzip.compress(text.encode()))
        (tmp_path / f"plain{i}.txt").write_text(text)
    for url in (json_lines(tmp_path / "a.jsonl"), str(texts), f"{tmp_path}/plain*.txt"):
        corpus = open_corpus(DataConfig(url=url, tokenizer=folder), seq_len=4)
        assert ids_of(corpus) == expected(), url
        assert isinstance(corpus.shards[0], np.memmap)
        assert corpus.shards[0].dtype == np.uint16


def test_a_long_text_is_read_in_parts_that_end_with_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_PART_BYTES", 40)
    text = "".join(f"line {i} with ü and some words\n" for i in range(50))
    (tmp_path / "a.txt").write_text(text)
    unbroken = "ünbroken" * 99
    (tmp_path / "b.txt").write_text(unbroken)
    folder = saved(tmp_path / "tokenizer")
    ids = ids_of(open_corpus(DataConfig(url=f"{tmp_path}/*.txt", tokenizer=folder), seq_len=4))
    assert BPE.decode(ids, skip_special_tokens=False) == f"{text}{END}{unbroken}{END}"
    assert ids[: len(BPE.encode(text).ids)] == BPE.encode(text).ids


def test_the_standard_library_can_be_tokenized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = sources.stdlib_files()[:3]
    monkeypatch.setattr(sources, "stdlib_files", lambda: few)
    ids = ids_of(open_corpus(DataConfig(tokenizer=saved(tmp_path / "tokenizer")), seq_len=64))
    assert BPE.decode(ids, skip_special_tokens=False) == "".join(path.read_text() + END for path in few)


def test_the_fingerprint_includes_tokenizer_and_packing(tmp_path: Path) -> None:
    url, folder = json_lines(tmp_path / "a.jsonl"), saved(tmp_path / "tokenizer")
    other = saved(tmp_path / "other", byte_level_bpe(330))
    configs: list[dict[str, Any]] = [
        {},
        {"document_mask": True},
        {"tokenizer": folder},
        {"tokenizer": folder, "end_of_document": "<pad>"},
        {"tokenizer": folder, "document_mask": True},
        {"tokenizer": other},
    ]
    prints = [open_corpus(DataConfig(url=url, **config), seq_len=4).fingerprint for config in configs]
    assert len(set(prints)) == len(prints)
    again = open_corpus(DataConfig(url=url, tokenizer=f"{folder}/tokenizer.json"), seq_len=4)
    assert again.fingerprint == prints[2]


def test_ids_of_ones_own_go_with_a_tokenizer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    np.save(tmp_path / "ids.npy", np.arange(99, dtype=np.uint16))
    config = DataConfig(url=str(tmp_path / "ids.npy"), tokenizer=saved(tmp_path / "tokenizer"), document_mask=True)
    corpus = open_corpus(config, seq_len=4)
    assert ids_of(corpus) == list(range(99))
    assert corpus.tokenizer is not None
    assert corpus.end_of_document == BPE.token_to_id(END)
    bare = config.model_copy(update={"tokenizer": None})
    with pytest.raises(UserError, match=r"set data\.end_of_document to its id"):
        open_corpus(bare, seq_len=4)
    assert open_corpus(bare.model_copy(update={"end_of_document": 7}), seq_len=4).end_of_document == 7
    beyond = bare.model_copy(update={"end_of_document": 1000})
    with pytest.raises(UserError, match=r"end_of_document is 1000 and model\.vocab_size is 256"):
        open_corpus(beyond, seq_len=4, vocab_size=256)
    assert open_corpus(beyond, seq_len=4).end_of_document == 1000
    assert "no token 1000, which ends documents, was found" in caplog.text


@pytest.mark.parametrize(
    ("config", "special", "wanted", "end"),
    [
        ({"eos_token": "<pad>"}, ("<pad>", END), None, "<pad>"),
        ({"eos_token": {"content": "<pad>", "lstrip": False}}, ("<pad>", END), None, "<pad>"),
        ({"eos_token": None}, ("<pad>", END), None, END),
        (None, ("</s>",), None, "</s>"),
        (None, ("<pad>", END), "<pad>", "<pad>"),
        (None, ("<pad>", END), 5, None),
        ({"eos_token": "gone"}, ("<pad>", END), "<pad>", "<pad>"),
        ({"eos_token": 7}, ("<pad>", END), None, END),
    ],
)
def test_what_ends_a_document(
    tmp_path: Path, config: dict[str, Any] | None, special: tuple[str, ...], wanted: str | int | None, end: str | None
) -> None:
    bpe = byte_level_bpe(special_tokens=special)
    folder = saved(tmp_path, bpe, config)
    tokenizer = open_tokenizer(DataConfig(tokenizer=folder, end_of_document=wanted))
    assert tokenizer.end_of_document == (wanted if end is None else bpe.token_to_id(end))


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (b'{"eos_token": "gone"}', "has no token 'gone', which the tokenizer_config.json beside it names"),
        (b"[]", "the tokenizer_config.json beside .* is not a JSON object"),
        (b'{"eos_token": ', "the tokenizer_config.json beside .* is not a JSON object"),
        (b"[" * 100_000, "the tokenizer_config.json beside .* is not a JSON object"),
    ],
)
def test_a_config_that_lies_about_the_end_is_told(tmp_path: Path, config: bytes, told: str) -> None:
    """Else another token would end the documents, which the model's users do not expect."""
    folder = saved(tmp_path, BPE)
    (tmp_path / "tokenizer_config.json").write_bytes(config)
    with pytest.raises(UserError, match=told):
        open_tokenizer(DataConfig(tokenizer=folder))
    assert open_tokenizer(DataConfig(tokenizer=folder, end_of_document=END)).end_of_document == BPE.token_to_id(END)


def test_a_tokenizer_that_draws_is_refused(tmp_path: Path) -> None:
    """By BPE dropout a text has other ids on each node, and each time."""
    told = json.loads(BPE.to_str())
    told["model"]["dropout"] = 0.1
    with pytest.raises(UserError, match=r"has a dropout of 0\.1.*set model\.dropout to null"):
        FileTokenizer(TokenizerFiles(json.dumps(told).encode()), "here")
    told["model"]["dropout"] = 0.0
    FileTokenizer(TokenizerFiles(json.dumps(told).encode()), "here")


def test_a_prompt_that_is_no_text_is_called_a_prompt() -> None:
    with pytest.raises(UserError, match=r"^--prompt is not UTF-8"):
        FileTokenizer(TokenizerFiles(BPE.to_str().encode()), "here").encode([b"\xff"], "--prompt")


def test_a_tokenizer_comes_back_as_it_was_packed(tmp_path: Path) -> None:
    files = read_tokenizer(saved(tmp_path, config={"eos_token": "<pad>"}))
    first = FileTokenizer(files, "here", END)
    back = TokenizerFiles.unpacked(first.files.packed())
    assert back == first.files
    again = FileTokenizer(back, "there")
    assert (again.digest, again.end_of_document) == (first.digest, BPE.token_to_id(END))


def test_text_comes_in_whole_characters(tmp_path: Path) -> None:
    tokenizer = FileTokenizer(read_tokenizer(saved(tmp_path)), "here")
    ids = [int(token) for token in tokenizer.encode(["a ü € 漢字 🙂 b".encode()], "here")[0]]
    parts = list(tokenizer.decode(ids[:1], ids[1:]))
    assert b"".join(parts).decode() == " ü € 漢字 🙂 b"
    assert all(part.decode() for part in parts)
    assert b"".join(ByteTokenizer().decode([1], [65, 255])) == b"A\xff"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"tokenizer": "{folder}/nothing"}, "cannot be read"),
        ({"tokenizer": "{folder}/empty"}, "holds no tokenizer.json: let transformers make one"),
        ({"tokenizer": "{folder}/bad.json"}, "is not a tokenizer.json of Hugging Face's"),
        ({"tokenizer": "{folder}/latin.txt"}, "is not a tokenizer.json of Hugging Face's"),
        ({"tokenizer": "nowhere://x"}, "cannot be read"),
        ({"tokenizer": "{folder}/good", "end_of_document": "</s>"}, "is '</s>', which .* has no token for"),
        ({"tokenizer": "{folder}/good", "end_of_document": 320}, "is 320, and .* has 320 tokens"),
        ({"tokenizer": "{folder}/endless"}, "does not say which token ends a document: set data.end_of_document"),
        ({"tokenizer": "{folder}/good", "url": "{folder}/latin.txt"}, "latin.txt is not UTF-8 .*: convert it"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.json").write_text('{"version": "1.0",\n "model": 3}')
    (tmp_path / "latin.txt").write_bytes("längst".encode("latin-1"))
    saved(tmp_path / "good", BPE)
    saved(tmp_path / "endless", byte_level_bpe(special_tokens=()))
    named = {name: value.format(folder=tmp_path) if isinstance(value, str) else value for name, value in config.items()}
    with pytest.raises(UserError, match=message) as caught:
        open_corpus(DataConfig.model_validate(named), seq_len=4)
    assert "\n" not in str(caught.value)


def test_a_model_with_too_few_tokens_is_told_at_once(tmp_path: Path) -> None:
    config = DataConfig(tokenizer=saved(tmp_path, BPE))
    with pytest.raises(UserError, match=r"has 320 tokens and model\.vocab_size is 256: set model\.vocab_size to 320"):
        open_corpus(config, seq_len=4, vocab_size=256)
    assert not (tmp_path / "caches").exists()


def test_text_that_a_tokenizer_has_no_token_for_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("words that it does not know\n" * 9)
    bare = Tokenizer(models.WordLevel({"</s>": 0}, unk_token="<unk>"))
    config = DataConfig(url=str(tmp_path / "a.txt"), tokenizer=saved(tmp_path / "bare", bare))
    with pytest.raises(UserError, match=r"data\.tokenizer cannot read all of .*a\.txt"):
        open_corpus(config, seq_len=4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"url": ""}, "it is empty"),
        ({"end_of_document": "</s>"}, "is a token of a tokenizer, and there is none"),
        ({"end_of_document": 3, "format": "text"}, "ends its documents by 0"),
        ({"end_of_document": -1}, "greater than or equal to 0"),
    ],
)
def test_configurations_that_contradict_themselves(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataConfig.model_validate(config)
