"""Folders of Hugging Face's that are not what they say: refused in one line before a job file is written of them."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from elastic_moe.cli import weights
from elastic_moe.cli.main import main
from elastic_moe.cli.weights import job_text
from elastic_moe.errors import UserError
from elastic_moe.huggingface.config import mixtral_config
from elastic_moe.huggingface.names import published
from elastic_moe.model import ModelConfig
from elastic_moe.model.decoder import Decoder

MODEL = ModelConfig(
    vocab_size=20, dim=8, num_layers=1, num_heads=2, num_kv_heads=1, num_experts=2, top_k=2, expert_dim=4
)


class Told(NamedTuple):
    """A folder before it is written."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    weight_map: dict[str, Any]


def good() -> Told:
    sources = published(MODEL)
    tensors: dict[str, Tensor] = {}
    for name, param in Decoder(MODEL).named_parameters():
        source = sources[name]
        parts = param.detach().unbind() if source.is_stacked else (param.detach(),)
        tensors |= {theirs: part.clone() for theirs, part in zip(source.names, parts, strict=True)}
    config = mixtral_config(MODEL, num_positions=16, dtype="float32")
    return Told(config, tensors, dict.fromkeys(tensors, "one.safetensors"))


def write(told: Told, folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(told.config))
    save_file(told.tensors, folder / "one.safetensors")
    index = {"weight_map": told.weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def run(folder: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, str]:
    code = main(["ckpt", "import", str(folder), *more])
    return code, capsys.readouterr().err


def test_a_good_one_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(good(), tmp_path)
    assert run(tmp_path, capsys, "--out", str(tmp_path / "job.toml")) == (0, "")


HEAD = "lm_head.weight"
Edit = Callable[[Told], Any]
EDITS: dict[str, tuple[Edit, str]] = {
    "a shard is missing": (lambda t: t.weight_map.update({HEAD: "two.safetensors"}), "two.safetensors cannot be read"),
    "a shard is a folder": (lambda t: t.weight_map.update({HEAD: ".."}), "cannot be read"),
    "a shard has no name": (lambda t: t.weight_map.update({HEAD: ""}), "cannot be read"),
    "a file of the system": (
        lambda t: t.weight_map.update({HEAD: "/etc/passwd"}),
        "names a file outside of its folder",
    ),
    "a number for a file": (lambda t: t.weight_map.update({HEAD: 3}), "has no weight_map of names to files"),
    "another file has it": (lambda t: t.tensors.pop(HEAD), f"one.safetensors has no tensor {HEAD}, which model.safet"),
    "the index lacks it": (lambda t: t.weight_map.pop(HEAD), f"the tensor {HEAD} is missing"),
    "one more": (lambda t: t.weight_map.update(more="one.safetensors"), "has no use for the tensor more"),
    "of integers": (lambda t: t.tensors.update({HEAD: torch.zeros(20, 8, dtype=torch.int8)}), "lm_head.weight has I8"),
    "another shape": (
        lambda t: t.tensors.update({HEAD: torch.zeros(8, 20)}),
        "has shape (8, 20), its config's has (20",
    ),
    "tied": (lambda t: t.config.update(tie_word_embeddings=True), "embedding and head are two matrices here"),
    "layers in words": (lambda t: t.config.update(num_hidden_layers="two"), "num_hidden_layers is 'two': Input should"),
    "layers true": (lambda t: t.config.update(num_hidden_layers=True), "num_hidden_layers is True: Input should"),
    "no heads": (lambda t: t.config.update(num_attention_heads=0), "num_attention_heads is 0: Input should be greater"),
    "heads that do not fit": (
        lambda t: t.config.update(num_attention_heads=3, num_key_value_heads=2),
        "num_heads = 3 is",
    ),
    "theta is not finite": (lambda t: t.config.update(rope_theta=1e999, rope_parameters=None), "finite"),
    "theta is true": (lambda t: t.config.update(rope_theta=True, rope_parameters=None), "rope_theta is True, not a n"),
    "two thetas": (lambda t: t.config.update(rope_theta=5.0), "rope_theta is 5.0, and rope_parameters.rope_theta 100"),
    "no sizes": (lambda t: t.config.pop("hidden_size"), "has shape (20, 8), its config's has (20, 4096)"),
    "no layers": (lambda t: t.config.pop("num_hidden_layers"), "num_hidden_layers is 32, and there are 16 tensors"),
    "a billion layers": (
        lambda t: t.config.update(num_hidden_layers=10**9),
        "num_hidden_layers is 1000000000, and the",
    ),
    "a billion experts": (
        lambda t: t.config.update(num_local_experts=10**9),
        "have 1000000000 experts each, and there",
    ),
    "one expert a token": (lambda t: t.config.update(num_experts_per_tok=1), "gives one expert the weight 1"),
    "an unknown key": (lambda t: t.config.update(attention_sinks=4), "attention_sinks is 4, and it is not known"),
}


@pytest.mark.parametrize("what", EDITS)
def test_one_line_says_what_is_wrong(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit, message = EDITS[what]
    told = good()
    edit(told)
    write(told, tmp_path)
    code, line = run(tmp_path, capsys, "--out", str(tmp_path / "job.toml"))
    assert code == 2
    assert message in line
    assert line.count("\n") == 1
    assert not (tmp_path / "job.toml").exists()


def test_as_many_key_heads_as_heads_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`transformers` takes null for that; a key that is not there is another matter."""
    told = good()
    told.config.update(num_attention_heads=1, num_key_value_heads=None, head_dim=4)
    for name in ("q_proj", "o_proj"):
        name = f"model.layers.0.self_attn.{name}.weight"
        whole = told.tensors[name]
        told.tensors[name] = whole[:4].clone() if whole.shape[0] == 8 and "q_proj" in name else whole[:, :4].clone()
    write(told, tmp_path)
    assert run(tmp_path, capsys, "--out", str(tmp_path / "job.toml")) == (0, "")
    assert "num_kv_heads = 1\n" in (tmp_path / "job.toml").read_text()


def test_a_tensor_in_two_files_is_not_chosen_by_their_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = good()
    write(told, tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    save_file({HEAD: torch.zeros(20, 8)}, tmp_path / "two.safetensors")
    code, line = run(tmp_path, capsys)
    assert code == 2
    assert f"one.safetensors and two.safetensors both hold the tensor {HEAD}" in line


@pytest.mark.parametrize(
    "argv",
    [
        ["import", "s3://bucket/mixtral"],
        ["import", "{tmp}", "--out", "s3://bucket/job.toml"],
        ["export", "{tmp}", "s3://bucket/mixtral"],
    ],
)
def test_a_bucket_is_no_folder_here(
    argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["ckpt", *(part.format(tmp=tmp_path) for part in argv)])
    assert ended.value.code == 2
    assert "is a URL, and must be a path on this machine" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_job_file_that_does_not_fit_the_disk_is_not_left_in_part(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(good(), tmp_path)
    monkeypatch.setattr(weights, "open", Full, raising=False)
    code, line = run(tmp_path, capsys, "--out", str(tmp_path / "job.toml"))
    assert (code, line) == (2, f"elastic-moe: error: {tmp_path}/job.toml cannot be written: No space left on device\n")
    assert not (tmp_path / "job.toml").exists()


class Full:
    """A file that is opened anew, and whose disk is full once a part is written."""

    def __init__(self, path: Path, mode: str, **how: Any) -> None:
        self._file = path.open(mode, **how)

    def __enter__(self) -> Full:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def write(self, text: str) -> None:
        self._file.write(text[:10])
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b""),
        ("config.json", b"\xff"),
        ("config.json", b"[" * 100_000),
        ("config.json", b"[]"),
        ("model.safetensors.index.json", b"{}"),
        ("one.safetensors", b""),
        ("one.safetensors", b"\xff" * 99),
        ("one.safetensors", None),
    ],
)
def test_files_that_are_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes | None
) -> None:
    write(good(), tmp_path)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-1] if content is None else content)
    code, line = run(tmp_path, capsys)
    assert code == 2
    assert str(tmp_path) in line
    assert line.count("\n") == 1


@pytest.mark.parametrize("name", ["a\nb", "a\x7fb", "a\udcffb"])
def test_a_folder_whose_name_no_job_file_can_hold(name: str) -> None:
    with pytest.raises(UserError, match="cannot be written into a job file"):
        job_text(MODEL, Path("/tmp", name))
