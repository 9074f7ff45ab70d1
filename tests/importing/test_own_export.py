"""An export of this project is read back from config.json and safetensors alone: the same function, the same weights.

Also where transformers has saved it again. What is compared with: the decoder of the training's own configuration, and
transformers with the export's code.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from nsa import evaluate
from nsa.config import Config, load_saved
from nsa.data.load_tokenizer import load_tokenizer
from nsa.evaluation.comparison.config import SiblingConfig, Training
from nsa.evaluation.comparison.identity import tokenizer_digest
from nsa.evaluation.comparison.models import OpenedDecoder, candidate_of, open_model
from nsa.exporting import ExportError, load_decoder, load_imported
from nsa.exporting.families import format_of
from nsa.exporting.folder import CONFIG, STATE, is_export
from nsa.importing import FolderError, own, read_config, read_weights
from nsa.importing.folder import is_own
from nsa.layers.kinds import KINDS
from nsa.models import AttentionConfig, Decoder, ModelConfig
from nsa.models.hf.modeling_nsa import NSAConfig, NSAForCausalLM, NSAForSequenceClassification
from nsa.training import start
from tests.small_run import small_config, small_export

MLA = {"q_lora_rank": 10, "kv_lora_rank": 12, "qk_nope_head_dim": 4, "qk_rope_head_dim": 6, "v_head_dim": 6}
LATENT = {"projection": "mla", "mla": MLA, "num_kv_heads": 4, "head_dim": 10}
MOE = {"num_experts": 5, "top_k": 3, "num_shared": 2, "expert_size": 9, "first_dense": 0}
YARN = {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 60, "beta_fast": 4.0}
ROPE = {"theta": 50.0, "yarn_factor": 2.0, "yarn_beta_fast": 5.0, "yarn_beta_slow": 0.5}
CSA = {"topk": 5, "window": 9, "index_heads": 2, "index_head_dim": 8, "index_rotary_dims": 4, "rotary_dims": 4}
# Kinds of the layers, what is unusual in their sections, and in the model's.
CASES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "dense": ("dense", {}, {"qkv_bias": True, "qk_norm": True, "tie_embeddings": False, "norm_eps": 0.03}),
    "nsa": ("nsa", {"nsa": {"compress_hidden": 7, "num_initial": 2, "num_local": 1}}, {"v_head_dim": 8}),
    "pooled": (["dense", "nsa"], {"nsa": {"key_compression": "pooled"}}, {"rope": ROPE, "rope_scaling": YARN}),
    "taught": ("nsa", {"nsa": {"phase": "warm-up"}}, {}),
    "dsa": ("dsa", {"dsa": {"num_local": 3, "index_rotary_pairs": "interleaved", "index_fp8": True}}, {"moe": MOE}),
    "shared": (["dense", "dsa", "dsa"], {"dsa": {"share_layers": 2, "share_from": 1}}, {"num_layers": 6}),
    "csa": ("csa", {"csa": CSA | {"heavy_ratio": 16, "q_lora_rank": 10}}, {"v_head_dim": None}),
    "entmax": ("entmax", {"entmax": {"alpha": 1.9, "scaling": "ssmax", "position": "alibi"}}, {}),
    "latent": ("dense", {}, LATENT | {"mla": MLA | {"q_lora_rank": None, "rope_interleave": False}, "moe": MOE}),
    "latent-dsa": (["dsa", "dense"], {"dsa": {"index_rotary_place": "last"}}, LATENT | {"rope": ROPE}),
    "deepseek": ("dsa", {"dsa": {"index_rotary_dims": 6}}, LATENT | {"rope_scaling": YARN}),  # without code
}


def config_of(folder: Path, name: str) -> Config:
    kind, sections, model = CASES[name]
    tree = small_config(folder, "dense").model_dump()
    tree["model"] |= model
    tree["attention"]["kind"] = kind
    for section, changes in sections.items():
        tree["attention"][section] |= changes
        if changes.get("phase") == "warm-up":
            tree |= {"train": "indexer", "start_from": "somewhere"}
    return Config.model_validate(tree)


def noisy(tensor: torch.Tensor) -> torch.Tensor:
    """A norm of 1 or a bias of 0 would hide a mistake."""
    return tensor + 0.1 * torch.randn(tensor.shape)


def written(root: Path, name: str) -> Path:
    folder = small_export(root / name, config=config_of(root / name, name))
    weights = load_file(folder / "model.safetensors")
    save_file({n: noisy(t) for n, t in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root, done = tmp_path_factory.mktemp("exports"), dict[str, Path]()

    def get(name: str) -> Path:
        if name not in done:
            done[name] = written(root, name)
        return done[name]

    return get


@pytest.fixture
def folder(exports: Callable[[str], Path], tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A copy with the weights, config.json and the tokenizer alone, as transformers leaves it."""
    path = Path(shutil.copytree(exports(getattr(request, "param", "pooled")), tmp_path / "model"))
    for name in (CONFIG, STATE):
        (path / name).unlink()
    return path


def decoder_of(folder: Path) -> Decoder:
    sections = read_config(folder)
    model = ModelConfig.model_validate(sections["model"])
    decoder = Decoder(model, AttentionConfig.model_validate(sections["attention"]), backend="torch")
    decoder.load_state_dict({name: tensor.float() for name, tensor in read_weights(folder, model).items()})
    return decoder.eval()


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def next_config(folder: Path, source: Path, **changes: Any) -> Config:
    """Of a run that begins with ``source``, of the configuration that `read_config` says, without what it is told."""
    sections = read_config(source)
    tree = small_config(folder, "dense").model_dump() | {"start_from": str(source), "name": "next"}
    tree |= {"model": sections["model"], "attention": sections["attention"]}
    tree["data"]["tokenizer"]["path"] = str(source)
    taught = "warm-up" in json.dumps(sections["attention"])
    return Config.model_validate(tree | {"train": "indexer" if taught else "all"} | changes)


def started(config: Config, monkeypatch: pytest.MonkeyPatch, tokenizer: Path) -> dict[str, torch.Tensor | None]:
    """The first value of each parameter and buffer; None: it is that of a new run."""
    given: dict[str, torch.Tensor | None] = {}
    model = Decoder(config.model, config.attention)
    shards = {name: SimpleNamespace(logical_shape=tensor.shape) for name, tensor in model.state_dict().items()}
    monkeypatch.setattr(start, "local_shards", lambda engine, keys: shards)
    monkeypatch.setattr(
        start, "scatter", lambda engine, shards, read: given.update({n: read(start.WEIGHT, n) for n in shards})
    )
    start.start_from(None, config, SimpleNamespace(on_main=lambda f: f()), tokenizer)  # type: ignore[arg-type]
    return given


@torch.no_grad()
@pytest.mark.parametrize("folder", CASES, indirect=True)
def test_a_run_begins_with_the_exported_function(
    folder: Path,
    exports: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Bit for bit; no weight is new, and nothing is said to differ. Without the files of the training, without code."""
    source = exports(request.node.callspec.params["folder"])
    trained, config, _ = load_decoder(source)
    for path in folder.glob("*.py"):
        path.unlink()
    assert is_own(folder) == (format_of(config).family is None)
    begun = next_config(tmp_path, folder)
    given = started(begun, monkeypatch, folder)
    expected = trained.state_dict()
    assert given.keys() == expected.keys()
    assert all(value is not None and torch.equal(value, expected[name]) for name, value in given.items())
    assert capsys.readouterr().out.splitlines() == [f"begins with the weights of {folder}"]
    decoder = Decoder(begun.model, begun.attention, backend="naive").eval()
    decoder.load_state_dict(given)
    reference = Decoder(config.model, config.attention, backend="naive").eval()
    reference.load_state_dict(expected)
    ids = torch.randint(420, (2, 63))
    assert torch.equal(decoder(ids), reference(ids))


@pytest.mark.parametrize("name", CASES)
def test_the_sections_are_those_of_the_training(exports: Callable[[str], Path], name: str) -> None:
    """But for what trains only."""
    config, found = load_saved(exports(name) / CONFIG), next_config(exports(name).parents[1], exports(name))
    layers = config.model.num_layers
    assert start._shape_of(found.model) == start._shape_of(config.model)
    assert [k.name for k in found.attention.kinds(layers)] == [k.name for k in config.attention.kinds(layers)]
    if name != "deepseek":
        assert found.attention.kind == config.attention.kind
    for kind in {*config.attention.kinds(layers)} - {k for k in KINDS if k.config is None}:
        ours, theirs = (a.of(kind).model_dump() for a in (found.attention, config.attention))
        assert {key: ours[key] for key in kind.export} == {key: theirs[key] for key in kind.export}


SAVED = ["dense", "pooled", "dsa", "csa", "latent"]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("folder", SAVED, indirect=True)
def test_a_model_that_was_tuned_and_saved_again_is_a_start(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """By transformers, in shards. Of bf16 the weights are its own, to the bit, and the router's stay fp32."""
    tuned = NSAForCausalLM.from_pretrained(folder, dtype=dtype)
    for parameter in tuned.parameters():
        parameter.copy_(noisy(parameter))
    saved = tmp_path / "saved"
    tuned.save_pretrained(saved, max_shard_size="20KB")
    assert len([*saved.glob("*.safetensors")]) > 1
    given = started(next_config(tmp_path, saved), monkeypatch, folder)
    theirs = tuned.state_dict()
    assert given.keys() == theirs.keys()
    assert all(value is not None and torch.equal(value, theirs[name].float()) for name, value in given.items())
    ids = torch.randint(420, (2, 63))
    expected = NSAForCausalLM.from_pretrained(saved, dtype=torch.float32)(ids).logits
    torch.testing.assert_close(decoder_of(saved)(ids), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_an_embedding_that_was_enlarged_is_read(folder: Path, tmp_path: Path) -> None:
    model = NSAForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(430)
    model.save_pretrained(tmp_path / "saved")
    assert decoder_of(tmp_path / "saved").embedding.weight.shape == (430, 24)
    with pytest.raises(ValueError, match=r"model.vocab_size: 430 there, 420 here"):
        tree = next_config(tmp_path, folder).model_dump() | {"start_from": str(tmp_path / "saved")}
        start.source_of(Config.model_validate(tree), folder)


def test_every_field_has_a_place_and_its_default() -> None:
    """Of an older export, which lacks newer fields, a section's default must be what the export's code has."""
    fresh = NSAConfig().to_dict()
    assert {name for name in fresh if not name.startswith("_")} <= own.KNOWN | own.GENERAL and fresh.keys() >= own.KNOWN
    required = ("vocab_size", "hidden_size", "num_layers", "num_heads", "intermediate_size")
    assert own.OWN.defaults == {name: own.OWN.defaults[name] and fresh[name] for name in own.OWN.defaults}
    fields = {own.MODEL[name]: fresh[own.MODEL[name]] for name in required} | {"num_key_value_heads": 1}
    for full in (fields | {name: fresh[name] for name in own.KNOWN}, fields):
        filled = {**own.OWN.defaults, **full}
        model = own.model(filled)
        shape = {name: filled[own.MODEL[name]] for name in (*required, "num_kv_heads", "head_dim")}
        assert ModelConfig.model_validate(shape | model) == ModelConfig(**shape, max_position=4096)
        for kind in KINDS:
            if kind.export:
                found = own.attention({**filled, "attention_kinds": [kind.name]})
                assert AttentionConfig.model_validate(found).of(kind) == kind.config()


def test_a_pattern_of_kinds_is_found() -> None:
    """The shortest, also where it ends within; of many unlike layers there is none."""
    for kinds, expected in (
        (["dense"] * 40, "dense"),
        (["dense", "nsa", "nsa", "dense", "nsa"], ["dense", "nsa", "nsa"]),
        (["dense"] * 19 + ["nsa"], ["dense"] * 19 + ["nsa"]),
        (None, "nsa"),
    ):
        assert own.attention({"attention_kinds": kinds})["kind"] == expected


@pytest.mark.parametrize("folder", [name for name in CASES if name != "deepseek"], indirect=True)
def test_an_export_of_an_earlier_version_is_read(folder: Path) -> None:
    """What an export lacks, since its version had no such field, had the default of today in effect."""
    before, fresh = next_config(folder.parent, folder), NSAConfig().to_dict()
    weights = read_weights(folder, before.model)
    written = json.loads((folder / "config.json").read_text())
    lacking = [name for name in own.KNOWN if written[name] == fresh[name] and name != "num_attention_heads"]
    edit(folder, lambda config: [config.pop(name) for name in lacking])
    found = next_config(folder.parent, folder)
    assert (found.model, found.attention) == (before.model, before.attention)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in read_weights(folder, found.model).items())


CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"sink_tokens": 4}, "sink_tokens = 4 is unknown: a newer version of this project may have written it. Update"),
    ({"model_type": "other"}, "model_type = 'other': NSAForCausalLM of this project is 'nsa'"),
    ({"auto_map": {"AutoModelForCausalLM": "mine.Model"}}, "auto_map.AutoModelForCausalLM = 'mine.Model': an export"),
    ({"auto_map": "x"}, "cannot be honoured"),
    ({"quantization_config": {"bits": 4}}, "quantized weights cannot be trained"),
    ({"attention_kinds": ["dense"]}, "attention_kinds must name the kind of each of 2 layers"),
    ({"attention_kinds": "nsa"}, "attention_kinds must name the kind of each of 2 layers"),
    ({"attention_kinds": ["dense", "lightning"]}, "attention_kinds has lightning: no export of this version has it"),
    ({"attention_kinds": ["dense", "dms"]}, "attention_kinds has dms: no export of this version has it"),
    ({"attention_kinds": ["dense", 3]}, "attention_kinds has 3: no export"),
    ({"block_size": 6}, "attention.nsa.block_size (6) must be a multiple of"),
    ({"window": "12"}, "nsa.window: Input should be a valid integer"),
    ({"key_compression": "sums"}, "key_compression"),
    ({"qk_norm": True}, "model.qk_norm does not go with attention.kind nsa"),
    ({"projection": "mla"}, "mla.kv_lora_rank"),
    ({"rotary_scaling": {"rope_type": "longrope"}}, "rope_scaling"),
    ({"num_experts": 4}, "moe.top_k"),
    ({"vocab_size": None}, "vocab_size must be a positive whole number"),
    ({"num_hidden_layers": None}, "num_hidden_layers"),
    ({"architectures": ["NSAForSequenceClassification"]}, "those that can be imported are"),
]


@pytest.mark.parametrize(("change", "words"), CONFIGS, ids=range(len(CONFIGS)))
def test_a_config_that_cannot_be_honoured_is_refused(folder: Path, change: dict[str, Any], words: str) -> None:
    read_config(folder)
    edit(folder, lambda config: config.update(change))
    with pytest.raises(FolderError, match=re.escape(words)):
        read_config(folder)


def test_what_transformers_and_hubs_write_is_no_reason(folder: Path) -> None:
    before = read_config(folder)
    hub = {name: f"user/model--{value}" for name, value in own.AUTO_MAP.items()} | {"AutoTokenizer": ["x.Y", None]}
    edit(folder, lambda c: c.update(auto_map=hub, _name_or_path="x", torch_dtype="float16", use_cache=False))
    edit(folder, lambda c: c.update(_attn_implementation_autoset=True, id2label={"0": "LABEL_0"}))
    assert read_config(folder) == before
    edit(folder, lambda config: config.pop("auto_map"))
    assert read_config(folder) == before


def test_a_folder_that_is_not_whole_is_refused(folder: Path) -> None:
    model = ModelConfig.model_validate(read_config(folder)["model"])
    weights = load_file(folder / "model.safetensors")

    def refused(words: str, **tensors: torch.Tensor | None) -> None:
        changed = {name: tensor for name, tensor in {**weights, **tensors}.items() if tensor is not None}
        save_file(changed, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(FolderError, match=re.escape(words)):
            read_weights(folder, model)

    refused("has no layers.1.attention.gate.weight;", **{"layers.1.attention.gate.weight": None})
    refused("has layers.0.more, which NSAForCausalLM of this configuration has not", **{"layers.0.more": torch.ones(1)})
    refused("norm.weight is [23], the configuration says [24]", **{"norm.weight": torch.ones(23)})
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    edit(folder, lambda config: config.update(num_hidden_layers=10**9, attention_kinds=None))
    endless = model.model_copy(update={"num_layers": 10**9})
    with pytest.raises(FolderError, match=r"tensors, fewer than the 1000000000 layers"):
        read_weights(folder, endless)


def test_a_folder_of_links_is_left_to_others(folder: Path, tmp_path: Path) -> None:
    """As in a download cache. nsa.compare reads such models of transformers."""
    assert is_own(folder) and not is_own(tmp_path / "nothing")
    (folder / "config.json").rename(tmp_path / "blob")
    (folder / "config.json").symlink_to(tmp_path / "blob")
    assert not is_own(folder) and not is_export(folder)


def test_a_classifier_is_refused(folder: Path, tmp_path: Path) -> None:
    NSAForSequenceClassification.from_pretrained(folder, num_labels=3).save_pretrained(tmp_path / "saved")
    with pytest.raises(FolderError, match=r"architectures is \['NSAForSequenceClassification'\]; those that"):
        read_config(tmp_path / "saved")


def test_another_model_is_refused_as_of_a_run(folder: Path, tmp_path: Path) -> None:
    """Shape, kind, section and tokenizer; a longer range and the like are said."""
    config = next_config(tmp_path, folder)

    def source(**changes: dict[str, Any]) -> Path:
        tree = config.model_dump()
        for section, values in changes.items():
            tree[section] |= values
        return start.source_of(Config.model_validate(tree), folder)

    assert source() == folder
    with pytest.raises(ValueError, match=r"model.intermediate_size: 40 there, 41 here"):
        source(model={"intermediate_size": 41})
    with pytest.raises(ValueError, match=r"layer 1 of .* has attention of kind nsa, which cannot become dsa"):
        source(attention={"kind": ["dense", "dsa"], "dsa": config.attention.dsa.model_dump() | {"topk": 20}})
    with pytest.raises(ValueError, match=r"attention.nsa.key_compression: pooled there, mlp here"):
        source(attention={"nsa": config.attention.nsa.model_dump() | {"key_compression": "mlp"}})
    assert source(attention={"nsa": config.attention.nsa.model_dump() | {"num_blocks": 6, "window": 20}}) == folder


@pytest.mark.parametrize("folder", ["dense"], indirect=True)
def test_a_dense_export_can_become_sparse(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of its weights are kept, and an indexer's are new."""
    dsa = small_config(tmp_path).attention.dsa.model_dump()
    tree = next_config(tmp_path, folder).model_dump() | {"attention": {"kind": "dsa", "dsa": dsa}}
    given = started(Config.model_validate(tree), monkeypatch, folder)
    weights = load_file(folder / "model.safetensors")
    assert {name for name, value in given.items() if value is None} == {name for name in given if ".indexer." in name}
    assert all(torch.equal(value, weights[name]) for name, value in given.items() if value is not None)


@pytest.mark.parametrize("folder", ["taught"], indirect=True)
def test_the_sparse_stage_begins_with_a_warm_up(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = next_config(tmp_path, folder)
    attention = config.attention.model_dump()
    attention["nsa"]["phase"] = "sparse"
    sparse = Config.model_validate(config.model_dump() | {"train": "all", "attention": attention})
    weights = read_weights(folder, config.model)
    given = started(sparse, monkeypatch, folder)
    assert all(value is not None and torch.equal(value, weights[name]) for name, value in given.items())


@pytest.mark.parametrize("folder", ["nsa"], indirect=True)
def test_the_default_width_of_values_is_no_other_shape(folder: Path, tmp_path: Path) -> None:
    """Named or not."""
    assert read_config(folder)["model"]["v_head_dim"] is None
    tree = next_config(tmp_path, folder).model_dump()
    for width in (None, 8):
        tree["model"]["v_head_dim"] = width
        assert start.source_of(Config.model_validate(tree), folder) == folder
    tree["model"]["v_head_dim"] = 6
    with pytest.raises(ValueError, match=r"model.v_head_dim: 8 there, 6 here"):
        start.source_of(Config.model_validate(tree), folder)


def test_the_tokenizer_is_compared_where_it_can_be(folder: Path, tmp_path: Path) -> None:
    """The export's own tokenizer.model is; transformers does not write it, so a tokenizer has to be named: its own."""
    tree = next_config(tmp_path, folder).model_dump()
    own_tokenizer, other = folder / "tokenizer.model", tmp_path / "other.model"
    other.write_bytes(own_tokenizer.read_bytes() + b" ")
    with pytest.raises(ValueError, match=r"another tokenizer.*data.tokenizer.path="):
        start.source_of(Config.model_validate(tree), other)
    tree["data"]["tokenizer"]["path"] = None
    assert start.source_of(Config.model_validate(tree), own_tokenizer) == folder, "a run trained it, and it is the same"
    kept = shutil.copyfile(own_tokenizer, tmp_path / "tokenizer.model")
    own_tokenizer.unlink()
    with pytest.raises(ValueError, match=r"data.tokenizer.path is null: set it to that tokenizer"):
        start.source_of(Config.model_validate(tree), kept)
    tree["data"]["tokenizer"]["path"] = str(folder)
    assert start.source_of(Config.model_validate(tree), folder) == folder
    assert load_tokenizer(folder).encode("def f(x):") == load_tokenizer(kept).encode("def f(x):")


@torch.no_grad()
def test_a_saved_model_is_opened_without_files_of_the_training(folder: Path, exports: Callable[[str], Path]) -> None:
    """As by transformers with the export's code; also for longer texts, and among the models of a comparison."""
    (folder / "tokenizer.model").unlink()
    with pytest.raises(ExportError, match=rf"is no export: it has no {CONFIG}"):
        load_decoder(folder)
    ids = torch.randint(420, (1, 40))
    theirs = NSAForCausalLM.from_pretrained(folder).eval()
    decoder, tokenizer = load_imported(folder)
    torch.testing.assert_close(decoder(ids), theirs(ids).logits)
    assert tokenizer.encode("def f(x):") == load_decoder(exports("pooled"))[2].encode("def f(x):")
    extended = load_imported(folder, yarn_factor=3.0)[0]
    torch.testing.assert_close(extended(ids), load_decoder(exports("pooled"), yarn_factor=3.0)[0](ids))
    assert (extended(ids) - decoder(ids)).abs().max() > 1e-3
    opened = open_model("tuned", folder)
    assert isinstance(opened, OpenedDecoder) and (opened.trained, opened.train_seed) == ("dense+nsa", 0)
    training = Training(SiblingConfig(name="tuned", export=str(folder)), None, folder)
    assert candidate_of(training).trained == "dense+nsa"


def test_a_saved_model_is_asked_the_questions_of_its_export(
    folder: Path, exports: Callable[[str], Path], tmp_path: Path
) -> None:
    """Its tokenizer is the same, also if another token pads since; one with more tokens is another."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"has neither tokenizer.model nor tokenizer.json.*save_pretrained"):
        candidate_of(Training(SiblingConfig(name="tuned", export=str(folder)), None, folder))
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    assert tokenizer_digest(folder) == tokenizer_digest(exports("pooled"))
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(tmp_path / "more")
    assert tokenizer_digest(tmp_path / "more") != tokenizer_digest(folder)


def test_a_saved_model_is_measured(
    folder: Path, exports: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The results are those of the export, whose weights these are. Only which text was held out must be named."""
    (folder / "tokenizer.model").unlink()
    few = ["evaluation.recall_samples=3", "evaluation.bpb_samples=4", "evaluation.length_factors=[1]"]
    assert evaluate.main([str(folder), *few, "data.seed=3"]) == 2
    error = capsys.readouterr().err
    assert "unknown key data" in error and f"with --config EXPORT/{CONFIG}" in error
    export = exports("pooled")
    assert evaluate.main([str(export), "--out", str(tmp_path / "there"), *few]) == 0
    given = ["--config", str(export / CONFIG)]
    assert evaluate.main([str(folder), "--out", str(tmp_path / "here"), *given, *few]) == 0
    there, here = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("there", "here"))
    assert here["bits_per_byte"] == there["bits_per_byte"] != []
    assert here["recall"] == there["recall"] and (here["training"], there["training"]["step"]) == (None, 3)
    assert evaluate.main([str(folder), "--out", str(tmp_path / "alone"), *few]) == 0
    assert f"bits per byte are left out: no {CONFIG} says which text was held out" in capsys.readouterr().out
    alone = json.loads((tmp_path / "alone/evaluation.json").read_text())
    reach, trained = load_saved(export / CONFIG).model.max_position, there["training_length"]
    assert (alone["training_length"], alone["bits_per_byte"]) == (None, [])
    long = [*few[:2], f"evaluation.length_factors=[{reach // trained}]"]
    assert evaluate.main([str(export), "--out", str(tmp_path / "long"), *long]) == 0
    expected = json.loads((tmp_path / "long/evaluation.json").read_text())["recall"]
    assert [{**row, "factor": reach // trained} for row in alone["recall"]] == expected and len(expected) > 1
