"""Models that transformers has itself are exported without code, and compute the same there."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_run import small_config, small_export, small_run
from transformers import AutoModelForCausalLM

from nsa import export as command_of_export
from nsa.config import Config, load_saved
from nsa.data.load_tokenizer import load_tokenizer
from nsa.exporting import ExportError, export, families, folder, load_decoder, proof
from nsa.exporting.families import FAMILIES, format_of
from nsa.models import Decoder
from nsa.training import checkpoint

pytest.importorskip("transformers.models.deepseek_v32", reason="not in older releases of transformers")

LATENT = {"q_lora_rank": 10, "kv_lora_rank": 12, "qk_nope_head_dim": 4, "qk_rope_head_dim": 6, "v_head_dim": 6}
# With so many index heads no two scores are 0, a tie that torch.topk would break in its own way.
INDEXER = {"topk": 20, "index_heads": 16, "index_head_dim": 8, "index_rotary_dims": 6}


def config_of(path: Path, kind: Any = "dsa", indexer: Any = (), latent: Any = (), **model: Any) -> Config:
    """A model of DeepSeek-V3.2 in all but size, unless something is changed."""
    mla = {"mla": LATENT | dict(latent), "projection": "mla", "num_kv_heads": 4, "head_dim": 10}
    tree = small_config(path, "dsa", **(mla | model)).model_dump()
    tree["attention"] |= {"kind": kind, "dsa": INDEXER | dict(indexer)}
    return Config.model_validate(tree)


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def exported(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The export of a decoder whose norms and biases are not those of a new one."""
    load = checkpoint.load_weights

    def drawn(step: Path) -> dict[str, torch.Tensor]:
        return {n: t.normal_(1.0, 0.5) if "norm." in n else t for n, t in load(step).items()}

    monkeypatch.setattr(checkpoint, "load_weights", drawn)
    return small_export(tmp_path, config=config_of(tmp_path, tie_embeddings=request.param, rope={"theta": 50.0}))


@torch.no_grad()
def test_deepseek_v32_loads_without_code_and_computes_the_same(exported: Path, asked_here: None) -> None:
    """Also in a padded batch with a cache: the proof generates in one."""
    written = json.loads((exported / "config.json").read_text())
    assert not list(exported.glob("*.py")) and "auto_map" not in written
    assert (written["mlp_layer_types"], written["layer_types"]) == (["dense"] * 2, ["indexed_attention"] * 2)
    assert written["first_k_dense_replace"] == written["num_hidden_layers"] == 2
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    assert type(model).__module__ == "transformers.models.deepseek_v32.modeling_deepseek_v32"
    decoder, config, tokenizer = load_decoder(exported)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == config.model.tie_embeddings
    ids = torch.randint(config.model.vocab_size, (2, 5 * INDEXER["topk"]))
    expected = decoder(ids)
    assert (model(ids).logits - expected).abs().max() < 1e-4 * expected.abs().max()
    assert proof.prove(exported, decoder, tokenizer).difference < proof.TOLERANCE


def test_all_weights_have_the_familys_names(exported: Path) -> None:
    """And get back their own. The family's model has neither more nor fewer."""
    decoder, config, _ = load_decoder(exported)
    written = load_file(exported / "model.safetensors")
    own = {n: t for n, t in decoder.state_dict().items() if n != "head.weight" or not config.model.tie_embeddings}
    family = format_of(config).family
    assert family is not None and family.rename(own).keys() == written.keys()
    assert all(torch.equal(tensor, written[name]) for name, tensor in family.rename(own).items())
    _, loading = AutoModelForCausalLM.from_pretrained(exported, output_loading_info=True)
    assert not any(loading[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))


ASKED = ["index_topk", "rope_parameters", "num_hidden_layers", "index_n_heads", "qk_rope_head_dim"]


@pytest.mark.parametrize("name", ASKED)
def test_a_field_that_is_lost_is_seen(tmp_path: Path, asked_here: None, name: str) -> None:
    path = small_export(tmp_path, config=config_of(tmp_path, rope={"theta": 50.0}))
    written = json.loads((path / "config.json").read_text())
    del written[name]
    (path / "config.json").write_text(json.dumps(written))
    decoder, _, tokenizer = load_decoder(path)
    with pytest.raises(ExportError, match=r"cannot use the export|differ"):
        proof.prove(path, decoder, tokenizer)


def test_pairs_of_the_indexer_that_are_laid_out_otherwise_are_seen(tmp_path: Path, asked_here: None) -> None:
    """Invisible in sequences of at most ``topk`` tokens."""
    path = small_export(tmp_path, config=config_of(tmp_path))
    weights, interleaved = load_file(path / "model.safetensors"), torch.tensor([0, 3, 1, 4, 2, 5, 6, 7])
    decoder, _, tokenizer = load_decoder(path)
    for name in ("wq_b.weight", "wk.weight", "k_norm.weight", "k_norm.bias"):
        name = f"model.layers.1.self_attn.indexer.{name}"
        weights[name] = weights[name].unflatten(0, (-1, 8))[:, interleaved].flatten(0, 1).contiguous()
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ExportError, match="logits of sequence"):
        proof.prove(path, decoder, tokenizer)


MOE = {"num_experts": 4, "top_k": 2, "expert_size": 8}
UNLIKE = [
    ({"kind": ["dsa", "dense"]}, "no layers of another kind"),
    ({"latent": {"q_lora_rank": None}}, "no model.mla.q_lora_rank null"),
    ({"latent": {"rope_interleave": False}}, "no model.mla.rope_interleave false"),
    ({"indexer": {"num_local": 2}}, "no attention.dsa.num_local 2"),
    ({"indexer": {"index_rotary_dims": 4}}, "no attention.dsa.index_rotary_dims 4"),
    ({"indexer": {"index_rotary_place": "last"}}, "no attention.dsa.index_rotary_place last"),
    ({"indexer": {"index_rotary_pairs": "interleaved"}}, "no attention.dsa.index_rotary_pairs interleaved"),
    ({"indexer": {"index_fp8": True}}, "no attention.dsa.index_fp8 True"),
    ({"indexer": {"phase": "warm-up"}}, "no attention.dsa.phase warm-up"),
    ({"indexer": {"share_layers": 2}}, "no index sets that layers share (attention.dsa.share_layers 2)"),
    ({"norm_eps": 1e-5, "moe": MOE}, "no model.norm_eps 1e-05, no model.moe"),
    ({"rope": {"yarn_factor": 2.0}}, "no model.rope.yarn_factor 2"),
]


@pytest.mark.parametrize(("changes", "what"), UNLIKE, ids=str)
def test_what_the_family_has_not_is_named(tmp_path: Path, changes: dict[str, Any], what: str) -> None:
    found = format_of(config_of(tmp_path, **changes))
    assert found.family is None
    assert str(found) == f"code of its own (trust_remote_code): deepseek_v32 has {what}"


def test_a_model_is_not_written_as_what_it_is_not(tmp_path: Path) -> None:
    """A caller may choose the format, not what it can express."""
    asked = format_of(config_of(tmp_path / "asked"))
    run = small_run(tmp_path, config=config_of(tmp_path, indexer={"share_layers": 2}))
    weights, written = checkpoint.load_weights(run / "step_00000003"), tmp_path / "written"
    config, tokenizer = load_saved(run / "step_00000003/config.yaml"), load_tokenizer(run / "step_00000003")
    with pytest.raises(
        ExportError, match=r"as DeepseekV32ForCausalLM: deepseek_v32 has no index sets .* code of its own"
    ):
        folder.write_folder(written, config, weights, tokenizer, asked)
    with pytest.raises(ExportError, match="as DeepseekV32ForCausalLM: it has other layers"):
        folder.write_folder(written, small_config(tmp_path / "other", "nsa"), weights, tokenizer, asked)
    assert not written.exists()


def test_other_models_come_near_no_family(tmp_path: Path) -> None:
    for kind in ("dense", "nsa", "dsa"):
        assert str(format_of(small_config(tmp_path, kind))) == "code of its own (trust_remote_code)"


def test_where_the_family_computes_something_else_the_export_has_code(tmp_path: Path, asked_here: None) -> None:
    """With one index head half of the scores are 0: equal, and transformers takes any of them."""
    path, proven = export(small_run(tmp_path, config=config_of(tmp_path, indexer={"index_heads": 1, "topk": 60})))
    assert proven.form.family is None and proven.difference < proof.TOLERANCE
    assert str(proven.form).startswith("code of its own (trust_remote_code): deepseek_v32 computes something else")
    card = (path / "README.md").read_text()
    assert (path / "modeling_nsa.py").is_file() and "trust_remote_code=True" in card and str(proven.form) in card
    assert isinstance(load_decoder(path)[0], Decoder)


def test_a_release_without_the_family_gets_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also an export that was made with another release is read."""
    path = small_export(tmp_path, config=config_of(tmp_path))
    monkeypatch.setattr(families.transformers, "CONFIG_MAPPING", {})
    assert "for deepseek_v32 it takes transformers 5.24, this is" in str(format_of(config_of(tmp_path)))
    assert isinstance(load_decoder(path)[0], Decoder)


def test_every_family_is_known_to_this_release() -> None:
    assert {family.model_type for family in FAMILIES} <= set(families.transformers.CONFIG_MAPPING)


def test_the_command_and_the_card_ask_for_no_trust(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a process of its own, as every export is proven."""
    monkeypatch.setattr(proof, "hostile_texts", lambda: ["a </s> b"])
    run = small_run(tmp_path, config=config_of(tmp_path))
    assert command_of_export.main([str(run)]) == 0
    said = capsys.readouterr().out
    assert "format: deepseek_v32 of transformers 5.24, no code of its own" in said
    card = (run / "export" / "README.md").read_text()
    assert "trust_remote_code" not in card and "custom_code" not in card and "`transformers` 5.24." in card
    assert "DeepSeek Sparse Attention" in card and folder.CONFIG in card
