"""Every field of the `model` and `attention` sections reaches an export, and the proof notices one that does not.

The fields are those of the sections themselves: a new one is covered without a change here, or named as missing.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from small_run import small_config, small_export

from nsa.config import Config, load_config
from nsa.exporting import ExportError, load_decoder, proof
from nsa.exporting.folder import CONFIG
from nsa.layers.kinds import KINDS
from nsa.models import hf
from nsa.models.hf.modeling_nsa import NSAConfig
from nsa.strict_yaml import walk

# Names in config.json, where they are not the field's own: those that `transformers` expects.
NAMES = {
    "model.num_layers": "num_hidden_layers",
    "model.num_heads": "num_attention_heads",
    "model.num_kv_heads": "num_key_value_heads",
    "model.max_position": "original_max_position",
    "model.norm_eps": "rms_norm_eps",
    "model.tie_embeddings": "tie_word_embeddings",
    "model.init_std": "initializer_range",
    "model.rope.theta": "rotary_base",
    "model.moe.top_k": "num_experts_per_token",
    "model.moe.num_shared": "num_shared_experts",
    "attention.kind": "attention_kinds",
    "attention.dsa.topk": "index_topk",
    "attention.dsa.num_initial": "index_num_initial",
    "attention.dsa.num_local": "index_num_local",
    "attention.dsa.share_layers": "index_share_layers",
    "attention.dsa.share_from": "index_share_from",
    **{f"attention.entmax.{name}": f"entmax_{name}" for name in ("alpha", "scaling", "nope_heads", "position")},
}
TRAINING_ONLY = {"model.moe.bias_rate", "model.moe.loss_weight", "attention.dsa.kl_weight", "attention.nsa.kl_weight"}
TRAINING_ONLY |= {"attention.nsa.kl_stride"}
# What logits do not depend on: how fresh weights are drawn; the number of layers, which attention_kinds has, too; and
# a tie where the weights of both are there and differ, which `transformers` then leaves apart.
NO_LOGIT = {"initializer_range", "num_hidden_layers", "tie_word_embeddings"}
# Whole: its types have fields of their own, which are not there together (tests/export/test_modeling_nsa.py).
WHOLE = {"model.rope_scaling": "rotary_scaling"}
NOT_EXPORTED = tuple(f"attention.{kind.name}" for kind in KINDS if kind.export is None)
NOT_EXPORTED += (
    "model.projection",
    "model.mla",
    "attention.dsa.phase",
    "attention.nsa.phase",
)  # these have a test of their own,
NOT_EXPORTED += ("attention.csa",)  # and this has one in tests/export/test_entries_nsa.py
DENSE_ONLY = ("qkv_bias", "qk_norm")  # an NSA layer has neither
FIELDS = [
    (key, field)
    for key, field in walk(Config)
    if key.startswith(("model.", "attention."))
    and not key.startswith((*NOT_EXPORTED, *WHOLE))
    and key not in {f"model.{name}" for name in DENSE_ONLY}
]
EXPORTED = {key: NAMES.get(key, key.rpartition(".")[2]) for key, _ in FIELDS if key not in TRAINING_ONLY} | WHOLE

# Unlike every default, and large enough an effect on logits; what is not named here gets a value by itself.
MODEL = {
    "rope": {"theta": 50.0, "yarn_factor": 2.0, "yarn_beta_fast": 5.0, "yarn_beta_slow": 0.5},
    "rope_scaling": {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 60, "beta_fast": 4.0},
    "moe": {"num_experts": 5, "top_k": 3, "num_shared": 2, "expert_size": 9, "first_dense": 2},
    "num_layers": 5,
    "num_heads": 6,
    "norm_eps": 0.05,
    "tie_embeddings": False,
}
NSA = {"compress_hidden": 7, "key_compression": "pooled", "num_blocks": 5, "num_initial": 2, "num_local": 1}
DSA = {"num_initial": 5, "num_local": 6, "index_rotary_place": "last", "index_rotary_pairs": "interleaved"}
ENTMAX = {"alpha": 1.9, "scaling": "ssmax", "nope_heads": 1, "position": "alibi"}


def value_of(tree: Any, key: str) -> Any:
    for name in key.split("."):
        tree = tree[name]
    return tree


def with_value(tree: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    name, _, rest = key.partition(".")
    return {**tree, name: with_value(tree[name], rest, value) if rest else value}


def others(value: Any) -> list[Any]:
    """Values of the type of ``value`` that are not it."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [value + 1, value * 2, value / 2 if isinstance(value, float) else value // 2]
    return [3, 1.5, True]


def unlike_defaults(folder: Path) -> Config:
    """A configuration of which no field of the two sections has its default."""
    config = small_config(folder, ["entmax", "nsa", "dsa", "dsa", "dsa"], **MODEL)
    tree = with_value(config.model_dump(), "attention.nsa", config.attention.nsa.model_dump() | NSA)
    tree = with_value(tree, "attention.dsa", config.attention.dsa.model_dump() | DSA)
    tree = with_value(tree, "attention.entmax", ENTMAX)
    for key, field in FIELDS:
        if not field.is_required() and value_of(tree, key) == field.default:
            for other in others(field.default):
                try:
                    tree = Config.model_validate(with_value(tree, key, other)).model_dump()
                    break
                except ValueError:
                    continue
    return Config.model_validate(tree)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("every_field")
    return small_export(folder, config=unlike_defaults(folder))


def test_every_field_of_the_export_is_unlike_its_default(exported: Path) -> None:
    """Else the other tests would not see that it is lost."""
    tree = load_config(exported / CONFIG).model_dump()
    same = [key for key, field in FIELDS if not field.is_required() and value_of(tree, key) == field.default]
    assert same == []
    fresh = NSAConfig().to_dict()
    written = json.loads((exported / "config.json").read_text())
    assert [name for name in EXPORTED.values() if written.get(name) == fresh.get(name)] == []


@pytest.mark.parametrize("key", EXPORTED)
def test_every_field_reaches_config_json_and_comes_back(exported: Path, key: str) -> None:
    """Notices a field that hf_config does not pass on, that NSAConfig forgets, or that takes the place of another."""
    value = value_of(load_config(exported / CONFIG).model_dump(), key)
    written = json.loads((exported / "config.json").read_text())
    assert EXPORTED[key] in written, f"{key} is lost: add it to hf_config and NSAConfig, or to NAMES"
    assert written[EXPORTED[key]] == getattr(NSAConfig.from_pretrained(exported), EXPORTED[key]) == value
    assert value_of(load_decoder(exported)[1].model_dump(), key) == value


def test_the_rotary_range_is_that_of_the_extension(exported: Path) -> None:
    config = load_config(exported / CONFIG).model
    assert NSAConfig.from_pretrained(exported).max_position_embeddings == 2 * config.max_position


def prove(folder: Path, of: Path) -> proof.Proof:
    decoder, _, tokenizer = load_decoder(of)
    return proof.prove(folder, decoder, tokenizer)


def test_an_export_that_is_right_is_proven(exported: Path, asked_here: None) -> None:
    assert prove(exported, exported).difference < proof.TOLERANCE


@pytest.mark.parametrize("name", sorted({*EXPORTED.values()} - NO_LOGIT))
def test_an_export_that_lost_a_field_is_refused(exported: Path, tmp_path: Path, asked_here: None, name: str) -> None:
    """Its default takes its place when the export is read."""
    broken = Path(shutil.copytree(exported, tmp_path / "broken"))
    config = json.loads((broken / "config.json").read_text())
    del config[name]
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match=r"transformers cannot use the export|logits of .* differ"):
        prove(broken, exported)


def test_an_export_with_one_weight_changed_is_refused(exported: Path, tmp_path: Path, asked_here: None) -> None:
    """The largest element of some tensors, of every part of the model; of the embedding, of a token that is asked."""
    asked = load_decoder(exported)[2].encode(hf.FILES[0].read_text())[0]
    broken = Path(shutil.copytree(exported, tmp_path / "broken"))
    weights = load_file(broken / "model.safetensors")
    names = ["embedding.weight", "norm.weight", "head.weight"]
    names += [f"layers.1.attention{name}" for name in ("_norm.weight", ".gate.bias")]
    names += [name for name in weights if name.startswith("layers.1.attention.compress.key.")][:1]
    names += [f"layers.2.attention.indexer.{name}" for name in ("key_norm.bias", "head_weight.weight")]
    names += ["layers.2.mlp.router.bias"]
    for name in names:
        tensor = weights[name].clone()
        part = tensor[asked] if name == "embedding.weight" else tensor.view(-1)
        part[part.abs().argmax()] += 0.5
        save_file({**weights, name: tensor}, broken / "model.safetensors", {"format": "pt"})
        with pytest.raises(ExportError, match="differ"):
            prove(broken, exported)


def test_options_of_dense_layers_reach_an_export(tmp_path: Path, asked_here: None) -> None:
    """Biases and norms whose values matter. Without the field in config.json the weights have no place."""
    folder = small_export(tmp_path, "dense", tie_embeddings=False, **dict.fromkeys(DENSE_ONLY, True))
    decoder, config, tokenizer = load_decoder(folder)
    assert all(getattr(config.model, name) for name in DENSE_ONLY)
    for name, parameter in decoder.named_parameters():
        if name.endswith(("bias", "query_norm.weight", "key_norm.weight")):
            parameter.normal_()
    save_file(decoder.state_dict(), folder / "model.safetensors", {"format": "pt"})
    assert proof.prove(folder, decoder, tokenizer).difference < proof.TOLERANCE
    written = json.loads((folder / "config.json").read_text())
    for name in DENSE_ONLY:
        (folder / "config.json").write_text(json.dumps({**written, name: False}))
        with pytest.raises(ExportError, match=r"transformers cannot use the export|logits of .* differ"):
            proof.prove(folder, decoder, tokenizer)


@pytest.mark.parametrize(("kind", "name"), [("dsa", "index_phase"), ("nsa", "nsa_phase")])
def test_the_phase_of_a_warm_up_reaches_an_export(tmp_path: Path, asked_here: None, kind: str, name: str) -> None:
    config = small_config(tmp_path, kind)
    changes = {"train": "indexer", "start_from": "somewhere"}
    tree = with_value(config.model_dump() | changes, f"attention.{kind}.phase", "warm-up")
    config = Config.model_validate(tree)
    folder = small_export(tmp_path, config=config)
    assert prove(folder, folder).difference < proof.TOLERANCE
    written = json.loads((folder / "config.json").read_text())
    assert written.pop(name) == "warm-up"
    (folder / "config.json").write_text(json.dumps(written))
    with pytest.raises(ExportError, match="differ"):
        prove(folder, folder)


LATENT = {"q_lora_rank": 10, "kv_lora_rank": 12, "qk_nope_head_dim": 4, "qk_rope_head_dim": 6, "v_head_dim": 6}


LATENTS = [(kind, changes) for kind in ("dense", "dsa") for changes in ({}, {"q_lora_rank": None})]
LATENTS += [("dense", {"rope_interleave": False})]


@pytest.mark.parametrize(("kind", "changes"), LATENTS, ids=str)
def test_latent_attention_reaches_an_export(
    tmp_path: Path, asked_here: None, kind: str, changes: dict[str, Any]
) -> None:
    """With YaRN, whose factor is in the tables for a part of a head's dims only."""
    sizes = {"projection": "mla", "mla": LATENT | changes, "num_kv_heads": 4, "head_dim": 10, "norm_eps": 0.05}
    scaling = {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 64, "mscale": 1.0}
    scaling["mscale_all_dim"] = 0.7
    rope = {"theta": 50.0, "yarn_factor": 4.0}
    folder = small_export(tmp_path, kind, rope=rope, rope_scaling=scaling, **sizes)
    decoder, _, tokenizer = load_decoder(folder)
    assert proof.prove(folder, decoder, tokenizer).difference < proof.TOLERANCE
    written = json.loads((folder / "config.json").read_text())
    assert {name: written[name] for name in LATENT | changes} == LATENT | changes
    wrong = {"projection": "gqa", "rope_interleave": not written["rope_interleave"], "q_lora_rank": 7}
    wrong |= {"kv_lora_rank": 13, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4}
    for name, value in wrong.items():
        (folder / "config.json").write_text(json.dumps({**written, name: value}))
        with pytest.raises(ExportError, match=r"transformers cannot use the export|logits of .* differ"):
            proof.prove(folder, decoder, tokenizer)
