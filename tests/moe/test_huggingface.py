"""Models of `transformers`: the same numbers from the same weights, in and out."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from elastic_moe.cli.main import main
from elastic_moe.cli.weights import job_text
from elastic_moe.config import JobConfig, load
from elastic_moe.data.tokenizer import open_tokenizer
from elastic_moe.errors import UserError
from elastic_moe.huggingface.config import mixtral_config, model_config
from elastic_moe.huggingface.export import export
from elastic_moe.huggingface.folder import WeightFolder
from elastic_moe.huggingface.tokenizer import byte_tokenizer
from elastic_moe.model import ModelConfig
from elastic_moe.model.decoder import Decoder, token_loss
from elastic_moe.model.sampling import sample
from elastic_moe.parallel import gather_full, read_weights
from elastic_moe.trained import TrainedModel
from elastic_moe.trainer.run import train
from launcher.rounds.mesh import MeshPlan
from tests.moe.cases import SMALL, build, layout
from tests.ranks import Ranks
from tests.sample import turn

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def reference() -> Any:
    torch.manual_seed(0)
    shape = transformers.MixtralConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=6,
        num_experts_per_tok=2,
        rope_theta=5e5,
        initializer_range=0.05,
        attn_implementation="eager",
    )
    model = transformers.MixtralForCausalLM(shape).eval()
    for name, param in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.uniform_(param, 0.5, 1.5)
    return model


@pytest.fixture(scope="module")
def folder(reference: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `transformers` writes it, in several files with an index."""
    path = tmp_path_factory.mktemp("mixtral")
    reference.save_pretrained(path, max_shard_size="200KB")
    assert (path / "model.safetensors.index.json").exists()
    return path


@pytest.fixture(scope="module")
def fused(reference: Any, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts held together, as `transformers` 5 has them in memory, in one file."""
    path = tmp_path_factory.mktemp("fused")
    shutil.copy(folder / "config.json", path)
    save_file({name: tensor.contiguous() for name, tensor in reference.state_dict().items()}, path / "all.safetensors")
    return path


@pytest.mark.parametrize("form", ["folder", "fused"])
def test_logits_and_loss_equal(reference: Any, form: str, request: pytest.FixtureRequest) -> None:
    source = WeightFolder(str(request.getfixturevalue(form)))
    model = Decoder(source.config)
    read_weights(model, source)
    tokens = torch.randint(97, (3, 41), generator=torch.Generator().manual_seed(2))
    inputs = tokens[:, :-1]
    with torch.no_grad():
        expected = reference(inputs).logits
        loss = reference(tokens, labels=tokens).loss
        got = model(inputs).logits_BSV
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    mean = token_loss(got, tokens[:, 1:], torch.ones(3, dtype=torch.bool)) / inputs.numel()
    assert float(mean) == pytest.approx(float(loss), rel=1e-5)


def read_by_ranks(path: str, plan: MeshPlan) -> dict[str, Tensor]:
    source = WeightFolder(path)
    model, _ = build(source.config, plan)
    read_weights(model, source)
    return gather_full(dict(model.state_dict()))


def test_any_mesh_reads_the_same_weights(ranks: Ranks, folder: Path, fused: Path) -> None:
    (alone,) = ranks.run(read_by_ranks, str(folder), layout(), world_size=1)
    for number, plan in enumerate((layout(expert=3), layout(shard=3), layout(shard=2, expert=2))):
        for path in turn((folder, fused), number, 1):
            weights = ranks.run(read_by_ranks, str(path), plan, world_size=plan.world_size)[-1]
            assert [name for name, tensor in alone.items() if not torch.equal(weights[name], tensor)] == []


# --- what is refused

CONFIG = mixtral_config(ModelConfig(), num_positions=128, dtype="float32")


def test_a_config_comes_back_as_it_was() -> None:
    for ours in (ModelConfig(), ModelConfig(head_dim=16, rope_theta=123.5, top_k=3, num_kv_heads=4, norm_eps=1e-6)):
        back = model_config(mixtral_config(ours, num_positions=9, dtype="float32"), "here")
        assert back == ours.model_copy(update={"head_dim": ours.head_width})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sliding_window": 4096}, "sliding_window is 4096: attention here sees all positions"),
        ({"model_type": "qwen3_moe"}, "model_type is 'qwen3_moe'; mixtral is read, and llama and mistral to upcycle"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling is"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_parameters.rope_type is 'yarn'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"router_jitter_noise": 0.1}, "router_jitter_noise is 0.1"),
        ({"logit_softcap": 30.0}, "logit_softcap is 30.0, and it is not known here what that changes"),
        ({"num_experts_per_tok": 99}, "top_k = 99 is more than num_experts = 8"),
        ({"hidden_size": "wide"}, "hidden_size is 'wide': Input should be a valid integer"),
    ],
)
def test_a_key_that_changes_the_model_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        model_config({**CONFIG, **change}, "config.json")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change", [{"shared_expert_dim": 32}, {"score": "sigmoid"}, {"norm_topk": False}, {"top_k": 1}, {"balance": "bias"}]
)
def test_a_model_that_mixtral_has_not_is_not_exported(change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="cannot be exported as one"):
        mixtral_config(ModelConfig.model_validate(change), num_positions=9, dtype="float32")


def read_all(path: str) -> None:
    source = WeightFolder(path)
    read_weights(Decoder(source.config), source)


def edited(folder: Path, to: Path, edit: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> str:
    config = json.loads((folder / "config.json").read_text())
    tensors: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    edit(tensors, config)
    save_file(tensors, to / "model.safetensors")
    (to / "config.json").write_text(json.dumps(config))
    return str(to)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors, config: config.update(num_hidden_layers=2), "has no use for the tensor model.layers.2."),
        (lambda tensors, config: config.update(num_hidden_layers=4), "the tensor model.layers.3."),
        (lambda tensors, config: config.update(num_local_experts=7), "experts.6.w1.weight is missing"),
        (lambda tensors, config: config.update(num_local_experts=5), "has no use for the tensor"),
        (lambda tensors, config: tensors.pop("lm_head.weight"), "the tensor lm_head.weight is missing"),
        (lambda tensors, config: config.update(vocab_size=98), "has shape (97, 64), its config's has (98, 64)"),
    ],
)
def test_weights_that_do_not_fit_their_config_are_refused(
    folder: Path, tmp_path: Path, edit: Callable[[dict[str, Tensor], dict[str, Any]], None], message: str
) -> None:
    path = edited(folder, tmp_path, edit)
    with pytest.raises(UserError) as caught:
        read_all(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_index_cannot_name_files_outside_of_its_folder(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    index = tmp_path / "copy" / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    listed["weight_map"]["lm_head.weight"] = "../../secret.safetensors"
    index.write_text(json.dumps(listed))
    with pytest.raises(UserError, match="names a file outside of its folder"):
        WeightFolder(str(tmp_path / "copy"))


# --- there and back


def trained(folder: Path, **model: Any) -> JobConfig:
    """A short run on this process alone, with its checkpoint in `folder`."""
    job = JobConfig.model_validate(
        {
            "model": SMALL.model_copy(update={"vocab_size": 256, "shared_expert_dim": 0, **model}).model_dump(),
            "train": {"steps": 2, "global_batch": 2, "seq_len": 16, "metrics": None},
            "checkpoint": {"url": str(folder)},
        }
    )
    train(job)
    return job


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "checkpoints"
    trained(path)
    return path


def test_a_trained_model_is_loaded_and_generates(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "exported"
    assert main(["ckpt", "export", "--format", "hf", str(run), str(out)]) == 0
    assert capsys.readouterr().out == f"step 2 of {run} is in {out}\n"
    assert [path.name for path in out.parent.iterdir()] == ["exported"]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    text = "def höl\n\tx\0"
    inputs = tokenizer(text, return_tensors="pt")
    assert inputs.input_ids[0].tolist() == list(text.encode())
    assert tokenizer.decode(inputs.input_ids[0]) == text
    ours = TrainedModel(str(run)).decoder()
    with torch.no_grad():
        logits = ours(inputs.input_ids).logits_BSV
        torch.testing.assert_close(logits, theirs(**inputs).logits, rtol=1e-5, atol=1e-5)
    chosen = theirs.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs.input_ids.shape[1] :].tolist()
    drawn = list(sample(ours, list(text.encode()), 6, temperature=0, seed=0, window=64))
    assert drawn[: len(chosen)] == chosen
    assert main(["ckpt", "export", str(run), str(out)]) == 2
    assert "exists: name another folder" in capsys.readouterr().err


def test_what_was_exported_is_trained_on(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """export, import, a first step from those weights: the loss is that of the trained model, not of a random one."""
    export(TrainedModel(str(run)), tmp_path / "exported", "float32", lambda done, total: None)
    assert main(["ckpt", "import", str(tmp_path / "exported"), "--out", str(tmp_path / "job.toml")]) == 0
    job = load(tmp_path / "job.toml", environ={})
    assert open_tokenizer(job.data).end_of_document == 0  # that of bytes, which no tokenizer says by itself
    assert job.model == TrainedModel(str(run)).config.model_copy(
        update={"head_dim": 8, "z_loss_coeff": 0.0}  # written out, and not of the model
    )
    again = tmp_path / "again"
    short = {"steps": 1, "global_batch": 2, "seq_len": 16, "metrics": None, "init_from": job.train.init_from}
    train(
        JobConfig.model_validate(
            {
                "model": job.model.model_dump(),
                "optim": {"lr": 1e-12, "weight_decay": 0.0},
                "train": short,
                "checkpoint": {"url": str(again)},
            }
        )
    )
    before, after = TrainedModel(str(run)), TrainedModel(str(again))
    names = dict(before.decoder().named_parameters())
    for name, tensor in before.load(names).items():
        torch.testing.assert_close(after.load([name])[name], tensor, rtol=1e-6, atol=1e-9)
    other = job.model.model_copy(update={"rope_theta": 5.0})
    with pytest.raises(UserError, match=r"model.rope_theta is 5.0 and the weights in .* with 10000"):
        WeightFolder(str(tmp_path / "exported")).check_model(other)


def test_a_failed_export_leaves_nothing(run: Path, tmp_path: Path) -> None:
    def fail(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(TrainedModel(str(run)), tmp_path / "exported", "bfloat16", fail)
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_is_ended_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a scheduler: the folders of many gigabytes would pile up, under names that nobody sees."""

    def write(trained: TrainedModel, folder: Path, dtype: str, tell: Callable[[int, int], None]) -> None:
        export(trained, folder, dtype, lambda done, total: signal.raise_signal(signal.SIGTERM))

    monkeypatch.setattr("elastic_moe.huggingface.export.export", write)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        main(["ckpt", "export", str(run), str(tmp_path / "exported")])
    assert ended.value.code == 143
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before


def test_generate_writes_bytes(run: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    for _ in range(2):
        assert main(["generate", str(run), "--prompt", "ab", "--tokens", "9", "--seed", "3"]) == 0
    first, second = capfdbinary.readouterr().out.split(b"ab", 2)[1:]
    assert first == second
    assert len(first) == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "{run}", "--prompt", ""], "--prompt is empty"),
        (["generate", "{run}", "--temperature", "-1"], "not a number >= 0"),
        (["generate", "{nothing}"], "no checkpoint"),
        (["ckpt", "export", "{nothing}", "{out}"], "no checkpoint"),
        (["ckpt", "import", "{nothing}"], "config.json cannot be read"),
    ],
)
def test_mistakes_are_told_in_one_line(
    run: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "nothing").mkdir()
    places = {"run": run, "nothing": tmp_path / "nothing", "out": tmp_path / "out"}
    code: int | str | None
    try:
        code = main([text.format(**places) for text in arguments])
    except SystemExit as ended:
        code = ended.code
    told = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert message in told[-1]
    assert not (tmp_path / "out").exists()


def test_job_files_quote_what_they_hold() -> None:
    text = job_text(ModelConfig(), Path('/tmp/a "b"\\c'))
    assert 'init_from = "/tmp/a \\"b\\"\\\\c"' in text


def test_every_byte_has_a_character_of_its_own() -> None:
    vocabulary = byte_tokenizer()["model"]["vocab"]
    assert sorted(vocabulary.values()) == list(range(256))
