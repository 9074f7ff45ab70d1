"""`nsa.training.start`: what a run can begin with, and what is refused."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from nsa.config import Config, dump_config, load_config, load_saved
from nsa.importing import read_weights
from nsa.layers.csa.config import CsaConfig
from nsa.layers.csa.kind import WITHOUT_INDEXER
from nsa.layers.dsa.kind import SERVED
from nsa.layers.kinds import kind_of
from nsa.models import AttentionConfig, Decoder, ModelConfig, MoEConfig
from nsa.plan import main as plan
from nsa.training import checkpoint, start
from nsa.training.start import check_stage_before, is_missing, source_of
from nsa.training.state import check_beginning
from tests.small_run import small_config, small_run

INDEX = {"topk": 8, "index_heads": 2, "index_head_dim": 8, "index_rotary_dims": 4}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return small_run(tmp_path_factory.mktemp("dense"), "dense")


def config_from(folder, start_from, kind="dsa", **model):
    config = small_config(folder, "dense", **model)
    tree = config.model_dump() | {"start_from": str(start_from), "name": "next"}
    tree["attention"] |= {"kind": kind, "dsa": tree["attention"]["dsa"] | INDEX}
    return type(config).model_validate(tree)


def test_a_run_and_one_of_its_checkpoints_mean_the_same(tmp_path, dense):
    tokenizer = dense / "step_00000003/tokenizer.model"
    for given in (dense, dense / "step_00000003"):
        assert source_of(config_from(tmp_path, given), tokenizer) == dense / "step_00000003"


def test_a_broken_run_to_start_from_is_told_with_what_to_do(tmp_path, dense):
    """Not to start over: the new run has not begun."""
    there = tmp_path / "there"
    shutil.copytree(dense, there)
    (there / "step_00000003/state.json").unlink()
    with pytest.raises(ValueError, match=r"none of its checkpoints can be used") as error:
        source_of(config_from(tmp_path, there), None)
    assert str(error.value).endswith("Mend one of them. To begin with another model, name its folder in start_from")


def test_text_that_the_first_run_was_trained_on_is_not_held_out_in_silence(tmp_path, dense, capsys):
    tokenizer = dense / "step_00000003/tokenizer.model"
    tree = config_from(tmp_path, dense).model_dump()
    other = tree["data"]["sources"]
    tree["data"]["sources"] = load_saved(dense / "step_00000003/config.yaml").data.model_dump()["sources"]

    def printed(**changes: object) -> str:
        source_of(Config.model_validate(tree | changes), tokenizer)
        return capsys.readouterr().out

    assert "held out" not in printed()
    assert f"set data.seed={tree['seed']} and data.validation_fraction=" in printed(seed=7)
    assert "held out" not in printed(seed=7, data=tree["data"] | {"seed": tree["seed"]})
    assert "held out" not in printed(seed=7, data=tree["data"] | {"sources": other}), "other text"


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"num_layers": 3}, "model.num_layers: 2 there, 3 here"),
        ({"qk_norm": True}, "model.qk_norm: False there, True here"),
    ],
)
def test_another_shape_is_refused(tmp_path, dense, changes, words):
    with pytest.raises(ValueError, match=words):
        source_of(config_from(tmp_path, dense, **changes), dense / "step_00000003/tokenizer.model")


def test_every_key_of_the_shape_is_compared(tmp_path, dense, monkeypatch):
    """One after the other: but for those that only say how the weights are used."""
    config, tokenizer = config_from(tmp_path, dense), dense / "step_00000003/tokenizer.model"
    moe = MoEConfig(num_experts=4, top_k=2, expert_size=8)
    experts = start._shape_of(config.model.model_copy(update={"moe": moe}))["moe"]
    here, free = start._shape_of(config.model), set()
    for key in here:
        both = iter((here | {key: "another value"}, here))
        monkeypatch.setattr(start, "_shape_of", lambda _, both=both: next(both))
        try:
            source_of(config, tokenizer)
            free.add(key)
        except ValueError as error:
            assert f"  model.{key}: another value there" in str(error)
    assert free == {"max_position", "rope", "rope_scaling", "init_std", "norm_eps"}
    assert MoEConfig.model_fields.keys() - experts.keys() == {"bias_rate", "loss_weight"}
    assert {"tie_embeddings", "qkv_bias", "moe", "mla", "head_dim"} <= here.keys()


def test_other_sources_are_refused(tmp_path, dense):
    tokenizer = dense / "step_00000003/tokenizer.model"
    with pytest.raises(ValueError, match="holds no checkpoint"):
        source_of(config_from(tmp_path, tmp_path / "nothing"), tokenizer)
    with pytest.raises(ValueError, match="of kind nsa, which cannot become dsa"):
        source_of(config_from(tmp_path, small_run(tmp_path / "nsa", "nsa")), tokenizer)
    other = tmp_path / "other.model"
    other.write_bytes(tokenizer.read_bytes() + b" ")
    with pytest.raises(ValueError, match=r"another tokenizer.*data.tokenizer.path="):
        source_of(config_from(tmp_path, dense), other)
    broken = shutil.copytree(dense, tmp_path / "broken")
    part = next(broken.glob("step_*/model-*"))
    content = part.read_bytes()
    for harmed, words in ((content[:-1], "cut short"), (content[:-1] + b"\1", "its content was changed")):
        part.write_bytes(harmed)
        for given in (broken, part.parent):  # a run, and the checkpoint itself
            with pytest.raises(ValueError, match=words):
                source_of(config_from(tmp_path, given), tokenizer)


def test_an_indexer_of_another_make_is_refused(tmp_path, dense):
    first = config_from(tmp_path, dense)
    run = small_run(tmp_path / "dsa", config=first.model_copy(update={"output_dir": str(tmp_path / "dsa")}))
    tree = config_from(tmp_path, run).model_dump()
    tree["attention"]["dsa"] |= {"index_rotary_pairs": "interleaved", "topk": 4}
    differing = "attention.dsa.index_rotary_pairs: half-split there, interleaved here"
    with pytest.raises(
        ValueError, match=rf"{differing}. Set these keys to the folder.s values, or begin with a dense model$"
    ):
        source_of(type(first).model_validate(tree), run / "step_00000003/tokenizer.model")


def test_sparse_layers_take_the_dense_weights():
    """NSA's branches begin with copies of the dense keys and values; an indexer is new."""
    there = {name: torch.rand(2) for name in ("query.weight", "key.weight", "value.weight", "output.weight")}
    nsa, dsa, dms = (kind_of(name).from_dense for name in ("nsa", "dsa", "dms"))
    for branch in ("cmp", "slc", "win"):
        for part in ("key", "value"):
            name = f"key_value.{branch}.{part}.weight"
            assert nsa(name, torch.Size([2]), None, there.__getitem__) is there[f"{part}.weight"]
    for take in (nsa, dsa, dms):
        for name in ("query.weight", "output.weight"):
            assert take(name, torch.Size([2]), None, there.__getitem__) is there[name]
    assert dsa("indexer.key.weight", torch.Size([2]), None, there.__getitem__) is None
    assert dms("evict.bias", torch.Size([2]), None, there.__getitem__) is None
    assert SERVED.from_dense("key.weight", torch.Size([2]), None, there.__getitem__) is there["key.weight"]
    csa, section = kind_of("csa").from_dense, CsaConfig()
    assert csa("query.weight", torch.Size([2]), section, there.__getitem__) is there["query.weight"]
    assert csa("query.weight", torch.Size([2]), CsaConfig(q_lora_rank=4), there.__getitem__) is None
    assert csa("compress.value.weight", torch.Size([2]), section, there.__getitem__) is None


def test_an_indexer_that_is_missing_is_new():
    for indexed, without in ((kind_of("dsa"), SERVED), (kind_of("csa"), WITHOUT_INDEXER)):
        assert is_missing("indexer.query.weight", without, indexed)
        assert not is_missing("query.weight", without, indexed)
        assert not any(is_missing("indexer.query.weight", indexed, there) for there in (indexed, without))


def nsa_config(folder, start_from, name, **nsa):
    """Of a run of NSA layers that begins with another."""
    tree = small_config(folder, "nsa").model_dump()
    tree |= {"start_from": str(start_from), "name": name, "train": "all" if "phase" not in nsa else "indexer"}
    tree["attention"]["nsa"] |= nsa
    return Config.model_validate(tree)


def started(config, monkeypatch, tokenizer):
    """The first value of each weight; None: it is that of a new run."""
    given: dict[str, torch.Tensor | None] = {}
    model = Decoder(config.model, config.attention)
    shards = {name: SimpleNamespace(logical_shape=parameter.shape) for name, parameter in model.named_parameters()}
    monkeypatch.setattr(start, "local_shards", lambda engine, keys: shards)
    monkeypatch.setattr(
        start, "scatter", lambda engine, shards, read: given.update({n: read(start.WEIGHT, n) for n in shards})
    )
    start.start_from(None, config, SimpleNamespace(on_main=lambda f: f()), tokenizer)
    return given


@pytest.mark.parametrize("compression", ["mlp", "pooled"])
def test_a_taught_selection_is_kept_bit_for_bit(tmp_path, dense, monkeypatch, compression):
    """dense -> warm-up -> warm-up -> sparse: all weights of the run before, none of a new one."""
    changes = {"phase": "warm-up", "key_compression": compression}
    first = nsa_config(tmp_path, dense, "run", **changes)
    tokenizer = dense / "step_00000003/tokenizer.model"
    begun = started(first, monkeypatch, tokenizer)
    assert all(value is not None for value in begun.values())
    taught = small_run(tmp_path / "taught", config=first.model_copy(update={"output_dir": str(tmp_path / "taught")}))
    tokenizer = taught / "step_00000003/tokenizer.model"
    weights = checkpoint.load_weights(taught / "step_00000003")
    for config in (
        nsa_config(tmp_path, taught, "more", **changes),
        nsa_config(tmp_path, taught, "sparse", key_compression=compression, num_blocks=3, num_local=1, window=20),
    ):
        given = started(config, monkeypatch, tokenizer)
        assert any(".compress.key." in name for name in given)
        assert all(torch.equal(value, weights[name]) for name, value in given.items())


def test_a_sparse_selection_is_not_taught(tmp_path, dense):
    """Its layers were not dense. Nor does one compression become the other."""
    sparse = small_run(tmp_path / "sparse", "nsa")
    tokenizer = sparse / "step_00000003/tokenizer.model"
    with pytest.raises(ValueError, match=r"attention.nsa.phase: sparse there, warm-up here"):
        source_of(nsa_config(tmp_path, sparse, "next", phase="warm-up"), tokenizer)
    with pytest.raises(ValueError, match=r"attention.nsa.key_compression: mlp there, pooled here"):
        source_of(nsa_config(tmp_path, sparse, "next", key_compression="pooled"), tokenizer)


def nsa_of_dense(hidden, tokens, compression="mlp"):
    """Logits of a dense decoder and of the NSA decoder that begins with it; the latter."""
    torch.manual_seed(0)
    shape = {"vocab_size": 50, "hidden_size": 24, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
    model = ModelConfig(**shape, v_head_dim=6, intermediate_size=40, max_position=512, init_std=0.3)
    dense = Decoder(model, AttentionConfig(kind="dense"), backend="torch")
    sizes = {"compress_length": 8, "compress_stride": 4, "block_size": 8, "num_blocks": 6, "window": 48}
    sizes |= {"compress_hidden": hidden, "key_compression": compression}
    attention = AttentionConfig.model_validate({"kind": "nsa", "nsa": sizes})
    sparse, there = Decoder(model, attention, backend="torch"), dense.state_dict()
    first = {}
    for name, value in sparse.state_dict().items():
        prefix, inside = name.split(".attention.") if ".attention." in name else (name, "")
        read = lambda part, prefix=prefix: there[f"{prefix}.attention.{part}"]  # noqa: E731
        first[name] = kind_of("nsa").from_dense(inside, value.shape, attention.nsa, read) if inside else there[name]
    sparse.load_state_dict(first)
    ids = torch.randint(50, (1, tokens))
    with torch.no_grad():
        return dense(ids), sparse(ids), sparse


@pytest.mark.parametrize("hidden", [None, 5, 16, 19])
def test_nsa_begins_as_dense_attention(hidden):
    """Where window and selection see all tokens: but for the branch that is almost shut. Of any hidden width. Planted:
    gates in another order; values of the mean by the keys' width."""
    expected, found, _ = nsa_of_dense(hidden, 48)
    assert (found - expected).abs().max() < 0.1 * expected.abs().max()
    assert torch.nn.functional.cosine_similarity(found, expected, dim=-1).min() > 0.99


@pytest.mark.parametrize("hidden", [None, 9, 16, 19])
def test_its_compression_begins_as_a_mean(hidden):
    """Exactly where the hidden layer has twice the width; in a narrower one, of what is small."""
    *_, sparse = nsa_of_dense(hidden, 1)
    compress = sparse.layers[0].attention.compress
    for part, width in (("key", 8), ("value", 6)):
        phi, wide = getattr(compress, part), (hidden or width) >= 2 * width
        x = torch.randn(1, 20, 2, width) * (1 if wide else 0.1)
        found = phi(x)
        expected = torch.stack([x[:, i : i + 8].mean(1) for i in range(0, 13, 4)], 1)
        assert (found - expected).abs().max() < (1e-5 if wide else 0.02 * expected.abs().max())
        found.square().sum().backward()
        assert all(p.grad.abs().sum() > 0 for p in phi.parameters())


def test_pooled_keys_begin_as_a_mean():
    expected, found, sparse = nsa_of_dense(None, 48, "pooled")
    assert (found - expected).abs().max() < 0.1 * expected.abs().max()
    phi, x = sparse.layers[0].attention.compress.key, torch.randn(2, 20, 2, 8)
    torch.testing.assert_close(phi(x), torch.stack([x[:, i : i + 8].mean(1) for i in range(0, 13, 4)], 1))
    phi(x).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in phi.parameters())


@pytest.fixture
def foreign(tmp_path):
    """A Hugging Face folder of the shape of `small_config`, of a rotary base of its own."""
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"head_dim": 8, "vocab_size": 420, "intermediate_size": 40, "max_position_embeddings": 512}
    config = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True, "rope_theta": 500.0, **sizes}
    shapes = {"self_attn.q_proj": (32, 24), "self_attn.k_proj": (16, 24), "self_attn.v_proj": (16, 24)}
    shapes |= {"self_attn.o_proj": (24, 32), "mlp.gate_proj": (40, 24), "mlp.up_proj": (40, 24)}
    shapes |= {"mlp.down_proj": (24, 40), "input_layernorm": (24,), "post_attention_layernorm": (24,)}
    weights = {"model.embed_tokens.weight": torch.randn(420, 24), "model.norm.weight": torch.randn(24)}
    weights |= {f"model.layers.{i}.{n}.weight": torch.randn(shape) for i in (0, 1) for n, shape in shapes.items()}
    folder = tmp_path / "foreign"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.bfloat16() for name, tensor in weights.items()}, folder / "model.safetensors")
    return folder


def test_a_hugging_face_folder_is_a_start(tmp_path, foreign, monkeypatch, capsys):
    """Of a dense layer, which takes all, and one with DSA, which keeps its indexer's values; in fp32."""
    config = config_from(tmp_path, foreign, ["dense", "dsa"], v_head_dim=None)
    with pytest.raises(ValueError, match=r"data.tokenizer.path is null: set it to that tokenizer"):
        source_of(config, tmp_path / "tokenizer.model")
    tree = config.model_dump()
    tree["data"]["tokenizer"]["path"] = "tokenizer.model"
    config = type(config).model_validate(tree)
    given = started(config, monkeypatch, tmp_path / "tokenizer.model")
    printed = capsys.readouterr().out
    assert "note: model.rope is {'theta': 10000.0" in printed and f"begins with the weights of {foreign}" in printed
    dense = config.model_copy(update={"attention": small_config(tmp_path, "dense").attention})
    weights = read_weights(foreign, dense.model)
    kept = {name for name, tensor in given.items() if tensor is None}
    assert kept and all(".indexer." in name for name in kept)
    for name, tensor in given.items():
        if tensor is not None:
            assert torch.equal(tensor, weights[name].float()) and tensor.dtype == torch.float32


def test_a_hugging_face_folder_of_another_shape_is_refused(tmp_path, foreign):
    with pytest.raises(ValueError, match=r"model.qkv_bias: False there, True here"):
        source_of(config_from(tmp_path, foreign, "dense", v_head_dim=None, qkv_bias=True), tmp_path / "any")


def test_a_head_that_is_tied_in_name_only_is_refused(tmp_path, foreign):
    weights = load_file(foreign / "model.safetensors")
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"] + 1}, foreign / "model.safetensors")
    tree = config_from(tmp_path, foreign, "dense", v_head_dim=None).model_dump()
    tree["data"]["tokenizer"]["path"] = "tokenizer.model"
    with pytest.raises(ValueError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        source_of(Config.model_validate(tree), tmp_path / "any")


def test_a_dry_run_says_what_the_run_would(tmp_path, run_python):
    """Of a start of another shape; the plan is printed all the same."""
    file, run = tmp_path / "run.yaml", small_run(tmp_path / "dense", "dense", v_head_dim=None)
    file.write_text(dump_config(config_from(tmp_path, run, "dense", v_head_dim=None, intermediate_size=48)))
    dry, real = (run_python("-m", "nsa.train", str(file), *options) for options in (["--dry-run"], []))
    assert dry.returncode == real.returncode == 2
    assert "  model.intermediate_size: 40 there, 48 here" in dry.stderr
    assert dry.stderr[dry.stderr.index("error: start_from:") :] in real.stderr
    assert "Memory per GPU" in dry.stdout and not (tmp_path / "next/step_00000003").exists()


def test_a_plan_notes_a_start_that_is_not_here(tmp_path, capsys):
    file, run = tmp_path / "run.yaml", small_run(tmp_path / "dense", "dense", v_head_dim=None)
    for given, noted in ((tmp_path / "nothing", True), (run, False)):
        file.write_text(dump_config(config_from(tmp_path, given, "dense", v_head_dim=None)))
        assert plan([str(file), "--gpus", "1"]) == 0
        assert ("note: here the run could not begin: start_from" in capsys.readouterr().out) is noted


def test_what_a_run_begins_with_is_checked_without_reading_it(tmp_path, dense, monkeypatch, foreign):
    """The sizes of a checkpoint's files and the shapes in a folder's headers; no tensor and no hash."""
    monkeypatch.setattr(checkpoint.hashlib, "file_digest", lambda *_: pytest.fail("reads a checkpoint"))
    monkeypatch.setattr("nsa.importing.folder.WeightReader._read", lambda *_: pytest.fail("reads a weight"))
    check_beginning(config_from(tmp_path, dense))
    tree = config_from(tmp_path, foreign, "dense", v_head_dim=None).model_dump()
    with pytest.raises(ValueError, match=r"data.tokenizer.path is null"):
        check_beginning(Config.model_validate(tree))
    tree["data"]["tokenizer"]["path"] = "tokenizer.model"
    check_beginning(Config.model_validate(tree))
    weights = load_file(foreign / "model.safetensors")
    save_file(weights | {"model.norm.weight": torch.ones(23)}, foreign / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.norm.weight is \[23\], the configuration says \[24\]"):
        check_beginning(Config.model_validate(tree))
    cut = shutil.copytree(dense, tmp_path / "cut")
    for given, words in ((tmp_path / "nothing", "holds no checkpoint"), (cut, "cut short")):
        for part in given.glob("step_*/model-*"):
            part.write_bytes(part.read_bytes()[:-1])
        with pytest.raises(ValueError, match=words):
            check_beginning(config_from(tmp_path, given))


def test_the_tokenizers_are_compared_before_a_run_where_both_are_there(tmp_path, dense):
    tree = config_from(tmp_path, dense).model_dump()
    other = tmp_path / "other.model"
    for content, refused in ((b"", False), (b" ", True)):
        other.write_bytes((dense / "step_00000003/tokenizer.model").read_bytes() + content)
        tree["data"]["tokenizer"]["path"] = str(other)
        if not refused:
            check_beginning(Config.model_validate(tree))
            continue
        with pytest.raises(ValueError, match="another tokenizer"):
            check_beginning(Config.model_validate(tree))


def test_a_run_that_goes_on_is_compared_with_its_checkpoint(tmp_path, dense, monkeypatch):
    """It does not begin, so what it began with may be gone."""
    monkeypatch.setattr(checkpoint.hashlib, "file_digest", lambda *_: pytest.fail("reads a checkpoint"))
    there = load_saved(dense / "step_00000003/config.yaml")
    tree = there.model_dump() | {"start_from": str(tmp_path / "gone")}
    check_beginning(Config.model_validate(tree))
    with pytest.raises(ValueError, match=r"written under another configuration:\n  seed: 1234 there, 7 now"):
        check_beginning(Config.model_validate(tree | {"seed": 7}))


def test_a_stage_whose_predecessor_is_not_trained_says_what_to_train(tmp_path):
    """The user wrote no start_from. Of several stages that are not trained the first is named."""
    tree = small_config(tmp_path, "dense").model_dump() | {"name": "small"}
    tree["stages"] = [{"name": name} for name in ("one", "two", "three")]
    file = tmp_path / "with space.yaml"
    file.write_text(json.dumps(tree))

    def refused(*overrides):
        given = ["name=x", *overrides, "training.steps=5"]
        try:
            check_stage_before(load_config(file, given), str(file), given)
        except ValueError as error:
            return str(error)
        return None

    command = f"python -m nsa.train '{file}' stage={{}} name=x training.steps=5\n"
    assert refused("stage=one") is None
    assert command.format("one") in refused("stage=three") and "train stage one first" in refused("stage=two")
    assert refused("stage=three", f"start_from={tmp_path}/other") is None, "that is told by its key"
    (tmp_path / "x-one/step_00000003").mkdir(parents=True)
    assert refused("stage=two") is None and command.format("two") in refused("stage=three")
    (tmp_path / "x-three/step_00000003").mkdir(parents=True)
    assert refused("stage=three") is None, "it goes on"


def test_a_refused_resume_prepares_nothing(tmp_path, dense, run_python):
    file, runs = tmp_path / "run.yaml", shutil.copytree(dense, tmp_path / "runs/run").parent
    tree = load_saved(dense / "step_00000003/config.yaml").model_dump()
    tree["data"]["cache_dir"] = str(tmp_path / "none")
    file.write_text(json.dumps(tree | {"output_dir": str(runs), "seed": 7}))
    result = run_python("-m", "nsa.train", str(file))
    assert result.returncode == 2 and "seed: 1234 there, 7 now" in result.stderr
    assert not (tmp_path / "none").exists()


def test_a_command_without_a_file_asks_for_one_alone(run_python):
    result = run_python("-m", "nsa.train")
    assert result.returncode == 2 and "error: name a YAML file" in result.stderr
