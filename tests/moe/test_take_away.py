"""A model that was trained with a tokenizer of Hugging Face's: checkpoint, export, import and samples have it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from elastic_moe.cli.main import main
from elastic_moe.config import JobConfig, load
from elastic_moe.errors import UserError
from elastic_moe.trained import TrainedModel
from elastic_moe.trainer.run import train
from tests.moe.cases import SMALL
from tests.moe.small_tokenizers import END, byte_level_bpe, saved

transformers = pytest.importorskip("transformers")

VOCAB_SIZE = 352  # more than the tokenizer has, as many published models have
TEXT = "def höl(x):\n\treturn x"


def job(folder: Path, **data: Any) -> JobConfig:
    model = SMALL.model_copy(update={"vocab_size": VOCAB_SIZE, "shared_expert_dim": 0})
    return JobConfig.model_validate(
        {
            "model": model.model_dump(),
            "data": {"url": str(folder / "text.txt"), "cache": str(folder / "cache"), **data},
            "train": {"steps": 2, "global_batch": 2, "seq_len": 16, "metrics": None},
            "checkpoint": {"url": str(folder / "run")},
        }
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("job")
    (path / "text.txt").write_text("some text of a few lines\nand words\n" * 40)
    saved(path / "tokenizer", config={"eos_token": END, "tokenizer_class": "PreTrainedTokenizerFast"})
    train(job(path, tokenizer=str(path / "tokenizer"), document_mask=True))
    return path


def test_an_exported_folder_has_the_tokenizer(folder: Path, tmp_path: Path) -> None:
    """`transformers` makes the same ids, the same logits, and goes on with the same tokens; text comes back."""
    out = tmp_path / "exported"
    assert main(["ckpt", "export", str(folder / "run"), str(out), "--quiet"]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    bpe = byte_level_bpe()
    inputs = tokenizer(TEXT, return_tensors="pt")
    assert inputs.input_ids[0].tolist() == bpe.encode(TEXT).ids
    assert theirs.config.eos_token_id == tokenizer.eos_token_id == bpe.token_to_id(END)
    ours = TrainedModel(str(folder / "run")).decoder()
    with torch.no_grad():
        torch.testing.assert_close(
            ours(inputs.input_ids).logits_BSV, theirs(input_ids=inputs.input_ids).logits, rtol=1e-5, atol=1e-5
        )
    made = theirs.generate(input_ids=inputs.input_ids, max_new_tokens=5, do_sample=False)
    assert tokenizer.decode(made[0]).startswith(TEXT)


def test_samples_are_text(folder: Path, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    """The checkpoint's own tokenizer reads the prompt; the job's folder of it need not be there any more."""
    url = str(folder / "run")
    for options in ([], ["--tokenizer", str(folder / "tokenizer")]):
        assert main(["generate", url, "--prompt", TEXT, "--tokens", "40", "--seed", "3", *options]) == 0
    told = capfdbinary.readouterr().out
    half = len(told) // 2
    assert told[:half] == told[half:]
    assert told.decode().startswith(TEXT)
    other = saved(tmp_path / "other", byte_level_bpe(400))
    assert main(["generate", url, "--tokenizer", other]) == 2
    assert b"--tokenizer has 400 tokens and the model" in capfdbinary.readouterr().err


def test_an_import_takes_the_tokenizer_along(folder: Path, tmp_path: Path) -> None:
    out, path = tmp_path / "exported", tmp_path / "job.toml"
    assert main(["ckpt", "export", str(folder / "run"), str(out), "--quiet"]) == 0
    assert main(["ckpt", "import", str(out), "--out", str(path)]) == 0
    imported = load(path, environ={})
    assert imported.data.tokenizer == imported.train.init_from == str(out)


def test_a_model_of_ids_asks_for_a_tokenizer_and_one_of_bytes_needs_none(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    """Whatever the size of its vocabulary, of which a sample has what stands for text alone."""
    text = "some text of a few lines\nand words\n" * 40
    (tmp_path / "text.txt").write_text(text)
    np.save(tmp_path / "ids.npy", np.frombuffer(text.encode(), dtype=np.uint8))
    of_bytes, url = job(tmp_path), str(tmp_path / "run")
    train(of_bytes)
    assert main(["generate", url, "--prompt", "wo", "--tokens", "9"]) == 0
    assert len(capfdbinary.readouterr().out) == len(b"wo") + 9 + len(b"\n")
    wider = of_bytes.model.model_copy(update={"dim": 2 * of_bytes.model.dim})
    longer = of_bytes.train.model_copy(update={"steps": 3})
    with pytest.raises(UserError, match=r"^model\.dim is \d+ but the checkpoint was trained with \d+: set it back, or"):
        train(of_bytes.model_copy(update={"model": wider, "train": longer}))
    checkpoint = of_bytes.checkpoint.model_copy(update={"url": f"{url}-of-ids"})
    of_ids = job(tmp_path, url=str(tmp_path / "ids.npy")).model_copy(update={"checkpoint": checkpoint})
    train(of_ids)
    assert main(["generate", f"{url}-of-ids"]) == 2
    told = b"has 352 tokens, and its checkpoint no tokenizer: give one by --tokenizer (or --tokenizer bytes, if its ids"
    assert told in capfdbinary.readouterr().err
    assert main(["generate", f"{url}-of-ids", "--tokenizer", "bytes", "--tokens", "1"]) == 0
    capfdbinary.readouterr()
    for run, lacks in ((url, b""), (f"{url}-of-ids", b", without a tokenizer: the checkpoint does not know what")):
        assert main(["ckpt", "export", run, f"{run}-out", "--quiet"]) == 0
        assert lacks in capfdbinary.readouterr().out
        assert Path(f"{run}-out", "tokenizer.json").exists() == (not lacks)


def test_a_resume_with_other_data_is_refused_unless_it_may_change(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    (tmp_path / "text.txt").write_text("some other text of a few lines\nand words\n" * 40)
    bpe = saved(tmp_path / "tokenizer")
    first = job(tmp_path, tokenizer=bpe)
    train(first)
    (tmp_path / "text.txt").write_text("it has changed since, and has other lines\n" * 40)
    longer = first.model_copy(update={"train": first.train.model_copy(update={"steps": 3})})
    with pytest.raises(UserError, match=r"trained on other data .*: set that back, set data\.may_change"):
        train(longer)
    may_change = longer.data.model_copy(update={"may_change": True})
    train(longer.model_copy(update={"data": may_change}))
    assert "the checkpoint of step 2 was trained on other data" in caplog.text
    last = longer.model_copy(update={"train": longer.train.model_copy(update={"steps": 4})})
    train(last)  # it has begun anew with these
    with pytest.raises(UserError, match=r"on other tokens \(data\.tokenizer .*, now bytes\)"):
        train(last.model_copy(update={"data": last.data.model_copy(update={"tokenizer": None})}))
