"""Dense models of `transformers` that become experts: at first they compute what they did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from elastic_moe.cli.main import main
from elastic_moe.config import load
from elastic_moe.errors import UserError
from elastic_moe.huggingface.config import Upcycling, model_config
from elastic_moe.huggingface.folder import WeightFolder
from elastic_moe.model.decoder import Decoder
from elastic_moe.parallel import gather_full, read_weights
from elastic_moe.trainer.run import first_weights
from launcher.rounds.mesh import MeshPlan
from tests.moe.cases import build, layout
from tests.moe.small_tokenizers import saved
from tests.ranks import Ranks

transformers = pytest.importorskip("transformers")

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.05,
    "attn_implementation": "eager",
}


def dense_model(kind: str, **more: Any) -> Any:
    torch.manual_seed(0)
    config = {"llama": transformers.LlamaConfig, "mistral": transformers.MistralConfig}[kind]
    extra = {"sliding_window": None} if kind == "mistral" else {}
    model = transformers.AutoModelForCausalLM.from_config(config(**SHAPE, **extra, **more)).eval()
    for name, param in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.uniform_(param, 0.5, 1.5)
    return model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    dense_model("llama").save_pretrained(path)
    return path


@pytest.mark.parametrize(("kind", "more"), [("llama", {}), ("mistral", {}), ("llama", {"tie_word_embeddings": True})])
@pytest.mark.parametrize("top_k", [2, 3])
@torch.no_grad()
def test_it_begins_as_the_dense_model(tmp_path: Path, kind: str, more: dict[str, Any], top_k: int) -> None:
    theirs = dense_model(kind, **more)
    theirs.save_pretrained(tmp_path)
    source = WeightFolder(str(tmp_path), Upcycling(5, top_k))
    ours = Decoder(source.config)
    read_weights(ours, source, seed=3)
    tokens = torch.randint(97, (3, 40), generator=torch.Generator().manual_seed(2))
    expected, out = theirs(tokens).logits, ours(tokens)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(out.logits_BSV, expected, rtol=1e-5, atol=1e-5)
    assert (out.load_LE > 0).sum(dim=1).min() > 2  # the routers differ, so tokens spread


def test_routers_are_drawn_by_the_seed(llama: Path) -> None:
    source = WeightFolder(str(llama), Upcycling(4, 2))
    routers = []
    for seed in (3, 3, 4):
        model = Decoder(source.config)
        read_weights(model, source, seed)
        routers.append(model.blocks[1].moe.router.weight.detach().clone())
    assert torch.equal(routers[0], routers[1])
    assert not torch.equal(routers[0], routers[2])
    assert routers[0].std() == pytest.approx(0.05, rel=0.2)


def read_by_ranks(path: str, plan: MeshPlan) -> tuple[dict[str, Tensor], int]:
    """The whole weights, and the most elements of a feed-forward network's matrix that were read at once."""
    source = WeightFolder(path, Upcycling(6, 2))
    largest, box = 0, source._box

    def counted(name: str, *args: Any) -> Tensor:
        nonlocal largest
        found = box(name, *args)
        largest = max(largest, found.numel() if ".mlp." in name else 0)
        return found

    source._box = counted  # type: ignore[method-assign]
    model, _ = build(source.config, plan)
    read_weights(model, source, seed=0)
    return gather_full(dict(model.state_dict())), largest


def test_any_mesh_begins_alike_and_no_rank_reads_all(ranks: Ranks, llama: Path) -> None:
    ((alone, _),) = ranks.run(read_by_ranks, str(llama), layout(), world_size=1)
    for plan, parts in ((layout(expert=3), 1), (layout(shard=2, expert=2), 2)):
        weights, largest = ranks.run(read_by_ranks, str(llama), plan, world_size=plan.world_size)[-1]
        assert [name for name, tensor in alone.items() if not torch.equal(weights[name], tensor)] == []
        assert largest == 96 * 64 / parts


def test_a_job_file_of_it(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "job.toml")
    arguments = ["ckpt", "import", str(llama), "--upcycle-experts", "4", "--top-k", "2", "--out", path]
    assert main(arguments) == 0
    job = load(path, environ={})
    assert (job.model.num_experts, job.model.top_k, job.model.expert_dim) == (4, 2, 96)
    assert job.train.init_from == str(llama)
    model = Decoder(job.model)
    first_weights(model, job)
    gate = model.blocks[0].moe.experts.gate_EFD
    assert torch.equal(gate[0], gate[3])
    saved(tmp_path / "with")
    for file in llama.iterdir():
        (tmp_path / "with" / file.name).write_bytes(file.read_bytes())
    assert main(["ckpt", "import", str(tmp_path / "with"), "--upcycle-experts", "4"]) == 0
    assert f'tokenizer = "{tmp_path}/with"' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "a llama has no experts: import it with --upcycle-experts"),
        (["--upcycle-experts", "4", "--top-k", "1"], "with top_k 1 they do not, it must be 2 or more"),
        (["--upcycle-experts", "2", "--top-k", "3"], "top_k = 3 is more than num_experts = 2"),
        (["--upcycle-experts", "0"], "--upcycle-experts"),
        (["--top-k", "2"], "--top-k is for --upcycle-experts"),
    ],
)
def test_mistakes_are_told(llama: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code: int | str | None
    try:
        code = main(["ckpt", "import", str(llama), *options])
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


CONFIG = {"model_type": "llama", **SHAPE}
del CONFIG["attn_implementation"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling is"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_parameters"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"model_type": "mistral"}, "sliding_window is 4096"),  # what it is where a file leaves it out
        ({"model_type": "mistral", "sliding_window": 32}, "sliding_window is 32"),
        ({"num_local_experts": 8}, "num_local_experts is 8, and it is not known here"),
        ({"softcap": 30.0}, "softcap is 30.0, and it is not known here what that changes"),
        ({"rope_theta": "big"}, "rope_theta is 'big'"),
        ({"model_type": "qwen2"}, "model_type is 'qwen2'"),
    ],
)
def test_a_key_that_changes_the_model_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        model_config({**CONFIG, **change}, "config.json", Upcycling(4, 2))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_a_config_leaves_out_is_what_transformers_takes() -> None:
    for kind, key_heads in (("llama", 4), ("mistral", 8)):
        given = {"model_type": kind, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
        given |= {"num_attention_heads": 8 if kind == "mistral" else 4, "sliding_window": None}
        ours = model_config({**given}, "config.json", Upcycling(4, 2))
        assert (ours.num_kv_heads, ours.norm_eps, ours.rope_theta, ours.vocab_size) == (key_heads, 1e-6, 1e4, 32000)


def test_a_mixtral_is_not_upcycled(tmp_path: Path, llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = transformers.MixtralConfig(**SHAPE, num_local_experts=4)
    transformers.MixtralForCausalLM(shape).save_pretrained(tmp_path)
    assert main(["ckpt", "import", str(tmp_path), "--upcycle-experts", "4"]) == 2
    assert "has experts already" in capsys.readouterr().err


def test_weights_of_more_layers_than_the_config_says_are_refused(llama: Path, tmp_path: Path) -> None:
    config = json.loads((llama / "config.json").read_text()) | {"num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(load_file(llama / "model.safetensors"), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"has no use for the tensor model\.layers\.1\."):
        WeightFolder(str(tmp_path), Upcycling(4, 2))
