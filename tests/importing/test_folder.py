"""An imported model computes what `transformers` computes; what cannot be imported is named."""

import io
import json
import re
import shutil
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from nsa.data.tokenizer import Tokenizer
from nsa.importing import FolderError, read_config, read_weights
from nsa.models import AttentionConfig, Decoder, ModelConfig
from tests.conftest import ROOT

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 64}
MODELS = {
    "llama": LlamaConfig(**SHAPE, rope_parameters=LLAMA3, rms_norm_eps=1e-3),
    "llama-tied": LlamaConfig(**SHAPE, head_dim=10, tie_word_embeddings=True),
    "llama-mha": LlamaConfig(**SHAPE | {"num_key_value_heads": None}),
    "mistral": MistralConfig(**SHAPE, head_dim=8, sliding_window=None),
    "mistral-long-window": MistralConfig(**SHAPE, sliding_window=256),
    "qwen2": Qwen2Config(**SHAPE, tie_word_embeddings=True, rope_parameters=YARN, sliding_window=16),
    "qwen3": Qwen3Config(**SHAPE, head_dim=14, rms_norm_eps=1e-2, sliding_window=16),
}


def save(name: str, folder: Path, **options: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[name], attn_implementation="eager").eval()
    with torch.no_grad():  # norms of 1 and biases of 0 would hide a mistake
        for key, parameter in model.named_parameters():
            parameter.normal_(1.0 if key.endswith("norm.weight") else 0.0, 0.3)
    model.save_pretrained(folder, **options)
    return model


def decoder_of(folder: Path) -> Decoder:
    sections = read_config(folder)
    model = ModelConfig.model_validate(sections["model"])
    decoder = Decoder(model, AttentionConfig.model_validate(sections["attention"]), backend="torch")
    decoder.load_state_dict(read_weights(folder, model))
    return decoder


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """One is in shards. Planted: two names of a table exchanged, the norm's epsilon, the scaled frequencies."""
    model = save(name, tmp_path, **({"max_shard_size": "10KB"} if name == "llama" else {}))
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (name == "llama")
    decoder, ids = decoder_of(tmp_path), torch.randint(61, (2, 200))
    with torch.no_grad():
        torch.testing.assert_close(decoder(ids), model(ids).logits, rtol=0, atol=1e-4)
    assert (decoder.head.weight is decoder.embedding.weight) == bool(MODELS[name].tie_word_embeddings)


def test_a_config_of_earlier_versions_is_the_same(tmp_path: Path) -> None:
    """rope_theta, rope_scaling with type, and fields left out or null that have a default."""
    save("llama", tmp_path)
    today = read_config(tmp_path)
    edit(tmp_path, lambda c: c.pop("rope_parameters"))
    old = {k if k != "rope_type" else "type": v for k, v in LLAMA3.items() if k != "rope_theta"}
    edit(tmp_path, lambda c: c.update(rope_theta=500.0, rope_scaling=old, head_dim=None, pretraining_tp=1))
    assert read_config(tmp_path) == today
    edit(tmp_path, lambda c: [c.pop(key) for key in ("rope_scaling", "rope_theta", "max_position_embeddings")])
    model = read_config(tmp_path)["model"]
    assert (model["max_position"], model["rope"]) == (2048, {"theta": 10_000.0}) and "rope_scaling" not in model


@pytest.mark.parametrize("name", ["LlamaConfig", "MistralConfig", "Qwen2Config", "Qwen3Config"])
def test_defaults_are_those_of_transformers(name: str) -> None:
    """Notices a default that `transformers` changes. A file may leave out a field that has it."""
    import transformers

    from nsa.importing.families import FAMILIES

    fresh = getattr(transformers, name)().to_dict()
    (family,) = (f for f in FAMILIES if f.architecture == name.replace("Config", "ForCausalLM"))
    for key, value in family.defaults.items():
        if key not in ("sliding_window", "layer_types"):  # which the class itself derives
            assert fresh[key] == value, key
    assert (fresh["rms_norm_eps"], fresh["initializer_range"], fresh["tie_word_embeddings"]) == (1e-6, 0.02, False)
    assert fresh["rope_parameters"]["rope_theta"] == 10_000.0


# Of a model's config.json: fields that are taken out (None) or put in, which transformers reads in its own way.
READ_AS_THERE: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"rms_norm_eps": None}),
    ("llama", {"rope_parameters": {**YARN, "factor": None}}),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}, "rope_theta": 9.0}),
    ("llama-tied", {"rope_parameters": None, "rope_theta": 300.0}),
    ("mistral", {"sliding_window": None}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2, "layer_types": None}),
]


@pytest.mark.parametrize(("folder", "change"), READ_AS_THERE, indirect=["folder"], ids=range(len(READ_AS_THERE)))
def test_fields_are_read_as_transformers_reads_them(folder: Path, change: dict[str, Any]) -> None:
    """Those that are left out, in two places, or at the edge of what they mean: its logits on the changed folder."""

    def apply(config: dict[str, Any]) -> None:
        for key, value in change.items():
            config.pop(key, None)
            if value is not None:
                config[key] = value

    edit(folder, apply)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    ids = torch.randint(61, (1, 200))
    with torch.no_grad():
        torch.testing.assert_close(decoder_of(folder)(ids), model(ids).logits, rtol=0, atol=1e-4)


def test_a_window_that_is_left_out_is_mistrals_own(folder: Path) -> None:
    """4096 tokens: no matter for a model of as many, and refused for a longer one."""
    edit(folder, lambda c: c.update(architectures=["MistralForCausalLM"], max_position_embeddings=4096))
    edit(folder, lambda c: c.pop("rope_parameters"))
    assert read_config(folder)["model"]["max_position"] == 4096
    edit(folder, lambda c: c.update(max_position_embeddings=4097))
    with pytest.raises(FolderError, match="a sliding window of 4096 tokens is in use"):
        read_config(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name in ("llama", "llama-tied", "mistral", "qwen2", "qwen3"):
        save(name, root / name)
    return root


@pytest.fixture
def folder(folders: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    return Path(shutil.copytree(folders / getattr(request, "param", "llama"), tmp_path / "model"))


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


SLIDING = {"use_sliding_window": True, "sliding_window": 9}
CONFIGS: list[tuple[str, dict[str, Any], str]] = [
    (
        "llama",
        {"architectures": ["GPT2LMHeadModel"]},
        "architectures is ['GPT2LMHeadModel']; those that can be",
    ),
    ("llama", {"architectures": None}, "architectures is None"),
    ("llama", {"attention_bias": True}, "attention_bias = True: no weight has a bias here but"),
    ("llama", {"mlp_bias": True}, "mlp_bias = True"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu': the MLP here is SwiGLU"),
    ("llama", {"attention_dropout": 0.1}, "attention_dropout = 0.1: there is no dropout here"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantized weights cannot be trained"),
    ("llama", {"auto_map": {"AutoModel": "x.Y"}}, "the model has code of its own"),
    ("llama", {"hidden_size": "24"}, "hidden_size must be a positive whole number, got '24'"),
    ("llama", {"vocab_size": None}, "vocab_size must be a positive whole number, got None"),
    ("llama", {"num_key_value_heads": 3}, "must be a multiple of model.num_kv_heads (3)"),
    ("llama", {"head_dim": 7}, "must be even"),
    ("llama", {"rms_norm_eps": "small"}, "norm_eps: Input should be a valid number"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rotary embedding of type 'dynamic'"),
    ("llama", {"rope_parameters": YARN | {"truncate": False}}, "rope_parameters.truncate = False cannot be honoured"),
    ("llama", {"rope_parameters": YARN | {"short": 1}}, "rope_parameters.short is unknown for type 'yarn'"),
    ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor = 0.5"),
    ("llama", {"rope_parameters": LLAMA3 | {"factor": None}}, "rope_scaling.factor"),
    (
        "llama",
        {"rope_parameters": YARN | {"factor": None, "original_max_position_embeddings": "x"}},
        "cannot be honoured",
    ),
    ("mistral", {"sliding_window": 64}, "a sliding window of 64 tokens is in use"),
    ("mistral", {"sliding_window": "64"}, "cannot be honoured"),
    (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 9, "layer_types": None, "max_window_layers": 1},
        "of 9 tokens",
    ),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 9, "layer_types": ["sliding_attention"]}, "of 9 tokens"),
    ("qwen3", {"attention_bias": True}, "attention_bias = True"),
]


@pytest.mark.parametrize(("folder", "change", "words"), CONFIGS, indirect=["folder"], ids=range(len(CONFIGS)))
def test_a_config_that_cannot_be_honoured_is_refused(folder: Path, change: dict[str, Any], words: str) -> None:
    read_config(folder)
    edit(folder, lambda config: config.update(change))
    with pytest.raises(FolderError, match=re.escape(words)):
        read_config(folder)


def test_all_reasons_are_told_at_once(folder: Path) -> None:
    edit(
        folder, lambda config: config.update(hidden_act="gelu", mlp_bias=True, rope_parameters={"rope_type": "linear"})
    )
    with pytest.raises(FolderError, match=r"(?s)hidden_act.*mlp_bias.*'linear'"):
        read_config(folder)


def test_a_field_that_the_architecture_does_not_read_changes_nothing(folder: Path) -> None:
    before = read_config(folder)
    edit(folder, lambda config: config.update(use_sliding_window=True, sliding_window=4, logit_scale=2.0))
    assert read_config(folder) == before
    assert type(AutoConfig.from_pretrained(folder)).__name__ == "LlamaConfig"


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def rename(folder: Path) -> None:
    change_weights(folder, lambda w: w.update({"model.norm.bias": w.pop("model.norm.weight")}))


def cut(folder: Path) -> None:
    change_weights(folder, lambda w: w.update({"lm_head.weight": w["lm_head.weight"][1:].clone()}))


def cast(folder: Path) -> None:
    change_weights(folder, lambda w: w.update({"model.norm.weight": w["model.norm.weight"].to(torch.int8)}))


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def lost(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def linked(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "blob")
    (folder / "model.safetensors").symlink_to(folder.parent / "blob")


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def lost_shard(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": "model-1.safetensors"}}')


def led_out(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": "../blob.safetensors"}}')


def no_map(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("[]")


def fewer_layers(folder: Path) -> None:
    edit(folder, lambda config: config.update(num_hidden_layers=1))


def not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


BROKEN: list[tuple[Callable[[Path], None], str]] = [
    (rename, "has no model.norm.weight and has model.norm.bias, which LlamaForCausalLM of this configuration has not"),
    (cut, "lm_head.weight is [60, 24], the configuration says [61, 24]"),
    (cast, "weights of type I8 cannot be trained"),
    (pickled, "a pickle can run any code"),
    (lost, "has neither model.safetensors nor model.safetensors.index.json"),
    (linked, "is a link; copy what it points to"),
    (truncated, "tensors of"),
    (lost_shard, "model-1.safetensors, which model.safetensors.index.json names, is not there"),
    (led_out, "leads out of the folder"),
    (no_map, "has no weight_map"),
    (fewer_layers, "has model.layers.1.input_layernorm.weight"),
    (not_json, "no valid JSON"),
    (no_config, "has no config.json"),
]


@pytest.mark.parametrize(("damage", "words"), BROKEN, ids=[damage.__name__ for damage, _ in BROKEN])
def test_a_folder_that_is_not_whole_is_refused(folder: Path, damage: Callable[[Path], None], words: str) -> None:
    damage(folder)
    with pytest.raises(FolderError, match=re.escape(words)):
        read_weights(folder, ModelConfig.model_validate(read_config(folder)["model"]))


def test_ties_that_weights_and_configuration_disagree_on(folders: Path, folder: Path) -> None:
    tied = ModelConfig.model_validate(read_config(folder)["model"] | {"tie_embeddings": True})
    with pytest.raises(FolderError, match=r"lm_head.weight differs from .*set model.tie_embeddings to false"):
        read_weights(folder, tied)
    change_weights(folder, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    weights = read_weights(folder, tied)
    assert weights["head.weight"] is weights["embedding.weight"]
    sections = read_config(folders / "llama-tied")
    apart = ModelConfig.model_validate(sections["model"] | {"tie_embeddings": False})
    weights = read_weights(folders / "llama-tied", apart)
    assert torch.equal(weights["head.weight"], weights["embedding.weight"])
    assert weights["head.weight"].data_ptr() != weights["embedding.weight"].data_ptr()


def test_a_model_with_what_the_family_lacks_is_refused(folder: Path) -> None:
    model = ModelConfig.model_validate(read_config(folder)["model"] | {"qk_norm": True})
    with pytest.raises(FolderError, match=r"query_norm.weight, which LlamaForCausalLM lacks: use the model section"):
        read_weights(folder, model)


def test_weights_keep_their_type_and_frequencies_of_old_files_are_left_out(folder: Path) -> None:
    def old(weights: dict[str, torch.Tensor]) -> None:
        weights.update({name: tensor.bfloat16() for name, tensor in weights.items()})
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)

    change_weights(folder, old)
    weights = read_weights(folder, ModelConfig.model_validate(read_config(folder)["model"]))
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


def test_the_examples_of_the_guide_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In turn, on a folder whose tokenizer puts a space before every text, as Llama's does."""
    model = io.BytesIO()
    lines = (ROOT / "data/tokenizer.py").read_text().splitlines()
    lossless = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=450, minloglevel=2, **lossless
    )
    folder.rename(tmp_path / "FOLDER")
    (tmp_path / "FOLDER/tokenizer.model").write_bytes(model.getvalue())
    with pytest.raises(ValueError, match="add_dummy_prefix=false"):
        Tokenizer(tmp_path / "FOLDER/tokenizer.model")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for example in re.findall(r"```python\n(.*?)```", (ROOT / "docs/importing.md").read_text(), re.DOTALL):
        exec(textwrap.dedent(example), names)  # noqa: S102
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed == read_config("FOLDER") == names["sections"]
    text = "def f(self):\n    return  1"
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    assert names["tokenizer"].encode(" " + text) == theirs.encode(text)
