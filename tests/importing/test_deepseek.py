"""DeepSeek's models are imported as `transformers` computes them; what differs from them is named."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from small_run import small_config
from test_folder import SHAPE, change_weights, edit
from transformers import AutoModelForCausalLM, DeepseekV2Config, DeepseekV3Config

from nsa.config import Config
from nsa.exporting.families import format_of
from nsa.importing import FolderError, WeightReader, read_config, read_weights
from nsa.importing.families import FAMILIES
from nsa.models import AttentionConfig, Decoder, ModelConfig
from nsa.training import start

pytest.importorskip("transformers.models.deepseek_v32", reason="not in older releases of transformers")

LATENT = {"q_lora_rank": 10, "kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 8}
DENSE = SHAPE | LATENT | {"num_key_value_heads": 4, "first_k_dense_replace": 2}
EXPERTS = {
    "first_k_dense_replace": 1,
    "n_routed_experts": 6,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "moe_intermediate_size": 12,
}
# As DeepSeek-V3's, on a small range: both mscales, which cancel in the tables and sharpen the scores.
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 8.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
# With so many index heads no two scores are 0, a tie that torch.topk would break in its own way.
INDEXER = {"index_topk": 24, "index_n_heads": 16, "index_head_dim": 8}
MODELS: dict[str, Any] = {
    "v2": DeepseekV2Config(**DENSE, rope_parameters=YARN | {"mscale": 0.7}),
    "v2-whole-query": DeepseekV2Config(**DENSE | {"q_lora_rank": None}, tie_word_embeddings=True),
    "v3": DeepseekV3Config(**DENSE, rope_parameters=YARN),
    "v3-half-split": DeepseekV3Config(**DENSE, rope_interleave=False),
    "v3-experts": DeepseekV3Config(**DENSE | EXPERTS, rope_parameters=YARN, routed_scaling_factor=2.5),
    "v3.2": transformers.DeepseekV32Config(**DENSE, **INDEXER, rope_parameters=YARN | {"mscale_all_dim": 0.5}),
    "v3.2-experts": transformers.DeepseekV32Config(**DENSE | EXPERTS, **INDEXER),
}


def save(name: str, folder: Path) -> torch.nn.Module:
    """A model whose norms, biases and router biases are not those of a new one."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[name], attn_implementation="eager").eval()
    with torch.no_grad():
        tensors = [*model.named_parameters(), *model.named_buffers()]
        for key, tensor in tensors:
            if not key.endswith("inv_freq"):
                tensor.normal_(1.0 if key.endswith("norm.weight") else 0.0, 0.3)
    model.save_pretrained(folder)
    return model


def decoder_of(folder: Path) -> Decoder:
    sections = read_config(folder)
    model = ModelConfig.model_validate(sections["model"])
    decoder = Decoder(model, AttentionConfig.model_validate(sections["attention"]), backend="torch")
    decoder.load_state_dict(read_weights(folder, model))
    return decoder.eval()


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    model = save(name, tmp_path)
    decoder, ids = decoder_of(tmp_path), torch.randint(61, (2, 150))
    with torch.no_grad():
        torch.testing.assert_close(decoder(ids), model(ids).logits, rtol=0, atol=1e-4)


CONFIGS: list[tuple[str, dict[str, Any], str]] = [
    ("v2", {"first_k_dense_replace": 1}, "layers from 1 on have experts (first_k_dense_replace = 1) whose gates are a"),
    ("v2", {"rms_norm_eps": 1e-5}, "rms_norm_eps = 1e-05: transformers norms the latents with 1e-06"),
    ("v2", {"num_key_value_heads": 2}, "num_key_value_heads = 2: with latents every one of 4 heads"),
    ("v2", {"kv_lora_rank": None}, "kv_lora_rank must be a whole number of at least 1, got None"),
    ("v2", {"attention_bias": True}, "attention_bias = True"),
    ("v2", {"qk_rope_head_dim": 3}, "qk_rope_head_dim (3) must be even"),
    ("v2", {"first_k_dense_replace": "all"}, "first_k_dense_replace must be a whole number"),
    ("v3-experts", {"n_group": 2}, "n_group = 2 with topk_group = 1: experts are selected from all groups here"),
    ("v3-experts", {"norm_topk_prob": False}, "norm_topk_prob = False: gates are normalised here"),
    ("v3-experts", {"num_experts_per_tok": 1}, "num_experts_per_tok = 1: a gate of one expert is constant"),
    ("v3-experts", {"routed_scaling_factor": "much"}, "routed_scaling_factor = 'much': a number above 0"),
    ("v3-experts", {"n_routed_experts": 2}, "model.moe.top_k (3) exceeds model.moe.num_experts (2)"),
    ("v3-experts", {"quantization_config": {"quant_method": "fp8"}}, "quantized weights cannot be trained"),
    ("v3.2", {"q_lora_rank": None}, "q_lora_rank = null: the indexer makes its queries of that latent"),
    ("v3.2", {"index_topk": 0}, "index_topk must be a whole number of at least 1, got 0"),
    ("v3.2", {"index_head_dim": 2}, "index_rotary_dims (4) must be even and at most index_head_dim (2)"),
    ("v3.2", {"layer_types": ["full_attention"] * 2}, "only indexed_attention, in all layers"),
    ("v3.2", {"mlp_layer_types": ["sparse", "dense"]}, "all layers after the first with experts have experts"),
    ("v3.2", {"mlp_layer_types": "dense"}, "mlp_layer_types = 'dense'"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name in ("v2", "v3", "v3-experts", "v3.2", "v3.2-experts"):
        save(name, root / name)
    return root


@pytest.fixture
def folder(folders: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    return Path(shutil.copytree(folders / request.param, tmp_path / "model"))


@pytest.mark.parametrize(("folder", "change", "words"), CONFIGS, indirect=["folder"], ids=range(len(CONFIGS)))
def test_a_config_that_cannot_be_honoured_is_refused(folder: Path, change: dict[str, Any], words: str) -> None:
    read_config(folder)
    edit(folder, lambda config: config.update(change))
    with pytest.raises(FolderError, match=re.escape(words)):
        read_config(folder)


def cut_indexer(weights: dict[str, torch.Tensor]) -> None:
    name = "model.layers.0.self_attn.indexer.wq_b.weight"
    weights[name] = weights[name][:-8].clone()


def cut_expert(weights: dict[str, torch.Tensor]) -> None:
    name = "model.layers.1.mlp.experts.4.up_proj.weight"
    weights[name] = weights[name].T.contiguous()


def add_layer(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.2.input_layernorm.weight"] = torch.ones(24)


BROKEN: list[tuple[str, Callable[[dict[str, torch.Tensor]], object], str]] = [
    ("v3.2", lambda w: w.pop("model.layers.1.self_attn.indexer.k_norm.bias"), "no model.layers.1.self_attn.indexer.k_"),
    ("v3.2", cut_indexer, "indexer.wq_b.weight is [120, 10], the configuration says [128, 10]"),
    ("v3-experts", lambda w: w.pop("model.layers.1.mlp.experts.5.down_proj.weight"), "experts.5.down_proj.weight"),
    ("v3-experts", lambda w: w.pop("model.layers.1.mlp.gate.e_score_correction_bias"), "gate.e_score_correction_bias"),
    ("v3-experts", cut_expert, "experts.4.up_proj.weight is [24, 12], the configuration says [12, 24]"),
    ("v3.2", add_layer, "has model.layers.2.input_layernorm.weight, which DeepseekV32ForCausalLM"),
]


@pytest.mark.parametrize(("folder", "damage", "words"), BROKEN, indirect=["folder"], ids=range(len(BROKEN)))
def test_weights_that_are_not_those_of_the_config_are_named(
    folder: Path, damage: Callable[[dict[str, torch.Tensor]], object], words: str
) -> None:
    change_weights(folder, damage)
    with pytest.raises(FolderError, match=re.escape(words)):
        read_weights(folder, ModelConfig.model_validate(read_config(folder)["model"]))


@pytest.mark.parametrize("folder", ["v3.2"], indirect=True)
def test_an_indexer_that_config_does_not_have_is_named(folder: Path) -> None:
    """The same weights as a V3, which attends to all tokens."""
    edit(folder, lambda config: config.update(architectures=["DeepseekV3ForCausalLM"], model_type="deepseek_v3"))
    with pytest.raises(FolderError, match=r"indexer.*which DeepseekV3ForCausalLM of this configuration has not"):
        read_weights(folder, ModelConfig.model_validate(read_config(folder)["model"]))


@pytest.mark.parametrize("folder", ["v3"], indirect=True)
def test_a_layer_that_predicts_later_tokens_is_left_out(folder: Path) -> None:
    """If the configuration says that there is one, as in DeepSeek-V3; transformers leaves it out, too."""
    change_weights(folder, add_layer)
    edit(folder, lambda config: config.update(num_nextn_predict_layers=1))
    model = ModelConfig.model_validate(read_config(folder)["model"])
    assert not any(".2." in name for name in WeightReader(folder, model).names())
    edit(folder, lambda config: config.update(num_nextn_predict_layers=0))
    with pytest.raises(FolderError, match=r"has model.layers.2.input_layernorm.weight"):
        read_weights(folder, model)


@pytest.mark.parametrize("name", ["DeepseekV2Config", "DeepseekV3Config", "DeepseekV32Config"])
def test_defaults_are_those_of_transformers(name: str) -> None:
    fresh = getattr(transformers, name)().to_dict()
    (family,) = (f for f in FAMILIES if f.architecture == name.replace("Config", "ForCausalLM"))
    for key, value in family.defaults.items():
        if value is not None:
            assert fresh[key] == value, key


def config_from(folder: Path, path: Path, kind: str, **dsa: Any) -> Config:
    """A run that begins with ``folder``, with the sections that `read_config` says."""
    sections = read_config(folder)
    tree = small_config(path).model_dump() | {"start_from": str(folder), "model": sections["model"]}
    indexer = sections["attention"].get("dsa", {"topk": 24, "index_head_dim": 8, "index_rotary_dims": 4})
    tree["attention"] |= {"kind": kind, "dsa": indexer | dsa}
    tree["data"]["tokenizer"] = {"path": "tokenizer.model"}
    return Config.model_validate(tree)


def started(config: Config, monkeypatch: pytest.MonkeyPatch) -> tuple[Decoder, set[str]]:
    """The decoder that the run begins with, and what of it is new."""
    decoder = Decoder(config.model, config.attention, backend="torch")
    state = decoder.state_dict()
    shards = {name: SimpleNamespace(logical_shape=tensor.shape) for name, tensor in state.items()}
    new = set()

    def scatter(engine: Any, shards: dict[str, Any], value: Any) -> None:
        for name in shards:
            if (tensor := value(start.WEIGHT, name)) is None:
                new.add(name)
            else:
                assert tensor.dtype == torch.float32
                state[name].copy_(tensor)

    monkeypatch.setattr(start, "local_shards", lambda engine, keys: shards)
    monkeypatch.setattr(start, "scatter", scatter)
    ranks = SimpleNamespace(on_main=lambda function: function())
    start.start_from(None, config, ranks, Path("tokenizer.model"))  # type: ignore[arg-type]
    return decoder, new


STARTS = [("v2", "dsa"), ("v3-experts", "dense"), ("v3.2", "dense"), ("v3.2", "dsa"), ("v3.2-experts", "dsa")]


@pytest.mark.parametrize(("folder", "kind"), STARTS, indirect=["folder"])
def test_a_run_begins_with_it_and_learns(
    folder: Path, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As dense, where an indexer is left out, and as DSA, where one that is not there is new. At T > k."""
    config = config_from(folder, tmp_path, kind)
    decoder, new = started(config, monkeypatch)
    indexed = read_config(folder)["attention"]["kind"] == "dsa"
    assert bool(new) == (kind == "dsa" and not indexed) and all(".indexer." in name for name in new)
    assert "note:" not in capsys.readouterr().out
    ids = torch.randint(61, (2, 65))
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    same = indexed == (kind == "dsa")
    with torch.no_grad():
        theirs = model(ids if same else ids[:, :24]).logits  # with so few tokens DSA attends to all of them
        torch.testing.assert_close(decoder(ids)[:, : theirs.shape[1]], theirs, rtol=0, atol=1e-4)
    optimizer = torch.optim.SGD(decoder.parameters(), lr=0.01)
    losses = []
    for _ in range(3):
        loss = decoder(ids[:, :-1], ids[:, 1:]).mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in decoder.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]


@pytest.mark.parametrize("folder", ["v3.2"], indirect=True)
def test_an_indexer_that_contradicts_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    """What its weights mean may not change; how many tokens it selects may."""
    config = config_from(folder, tmp_path, "dsa", topk=12, kl_weight=0.5)
    assert start.source_of(config, tmp_path) == folder
    for changes, words in (
        ({"index_heads": 8}, "attention.dsa.index_heads: 16 there, 8 here"),
        ({"index_head_dim": 16}, "attention.dsa.index_head_dim: 8 there, 16 here"),
        ({"index_rotary_pairs": "interleaved"}, "attention.dsa.index_rotary_pairs: half-split there, interleaved here"),
        ({"index_rotary_place": "last"}, "attention.dsa.index_rotary_place: first there, last here"),
        ({"index_rotary_dims": 8}, "attention.dsa.index_rotary_dims: 4 there, 8 here"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            start.source_of(config_from(folder, tmp_path, "dsa", **changes), tmp_path)


@pytest.mark.parametrize("folder", ["v3-experts"], indirect=True)
def test_how_experts_are_balanced_may_change_and_their_shape_may_not(folder: Path, tmp_path: Path) -> None:
    tree = config_from(folder, tmp_path, "dense").model_dump()
    tree["model"]["moe"] |= {"bias_rate": 0.0, "loss_weight": 0.1}
    assert start.source_of(Config.model_validate(tree), tmp_path) == folder
    tree["model"]["moe"]["top_k"] = 2
    with pytest.raises(ValueError, match=r"model.moe: .*'top_k': 3.* there, .*'top_k': 2.* here"):
        start.source_of(Config.model_validate(tree), tmp_path)


@pytest.mark.parametrize("folder", ["v3.2"], indirect=True)
def test_an_export_is_what_was_imported(folder: Path, tmp_path: Path) -> None:
    """Written as `deepseek_v32` again: the same tensors and the same model, YaRN included."""
    config = config_from(folder, tmp_path, "dsa")
    form = format_of(config)
    assert form.family is not None and form.family.model_type == "deepseek_v32"
    named = {"architectures": [form.family.architecture], "model_type": form.family.model_type}
    fields = {**form.family.fields(config), **form.attention, **named}
    again = tmp_path / "again"
    again.mkdir()
    (again / "config.json").write_text(json.dumps(fields))
    weights = form.family.rename(read_weights(folder, config.model))
    save_file(weights, again / "model.safetensors", {"format": "pt"})
    assert read_config(again) == read_config(folder)
    theirs = load_file(folder / "model.safetensors")
    assert weights.keys() == theirs.keys() and all(torch.equal(weights[name], theirs[name]) for name in theirs)
    ids = torch.randint(61, (1, 100))
    with torch.no_grad():
        one, other = (AutoModelForCausalLM.from_pretrained(path)(ids).logits for path in (folder, again))
    assert torch.equal(one, other)
