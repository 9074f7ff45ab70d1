"""Compressed Sparse Attention as an export carries it, against the decoder that was trained."""

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_run import small_config, small_export, small_run
from transformers import AutoModelForCausalLM

from nsa.config import Config
from nsa.exporting import ExportError, export, load_decoder, proof
from nsa.layers.csa.config import CsaConfig
from nsa.models.hf import attention_nsa
from nsa.models.hf.configuration_nsa import NSAConfig
from tests.export.test_modeling_nsa import close, pair, tokens

SHAPE = (6, 3, 8, 8)  # the KV heads do not matter
SIZES = {"ratio": 3, "topk": 4, "window": 7, "index_heads": 3, "index_head_dim": 6, "index_rotary_dims": 4}
VARIANTS: list[dict[str, Any]] = [
    {},
    {"overlap": False, "rotary_dims": 4},
    {"topk": None, "q_lora_rank": 10},
    {"q_lora_rank": 10, "heavy_ratio": 8, "window": 1},
    {"phase": "warm-up"},
    {"ratio": 9, "window": 200, "heavy_ratio": 2},
    {"topk": None, "heavy_ratio": 5, "ratio": 2},
]
variants = pytest.mark.parametrize("changes", VARIANTS, ids=str)


def csa(kind: Any = "csa", section: Any = (), **changes: Any) -> tuple[Any, Any]:
    return pair(kind, SHAPE, csa=CsaConfig(**SIZES | dict(section)), **changes)


@variants
@torch.no_grad()
def test_logits_are_the_decoders(changes: dict[str, Any]) -> None:
    decoder, exported = csa(section=changes)
    for length in (1, 2, 3, 17, 70):
        ids = tokens(2, length)
        close(exported(ids).logits, decoder(ids))


@pytest.mark.parametrize("options", [{"yarn_factor": 4.0}, {"tie_embeddings": False}, {"norm_eps": 0.1}], ids=str)
@torch.no_grad()
def test_options_are_the_decoders(options: dict[str, Any]) -> None:
    """YaRN's temperature is left out, since it would scale values."""
    decoder, exported = csa(["csa", "nsa", "csa"], VARIANTS[3], **options)
    ids = tokens(2, 70)
    close(exported(ids).logits, decoder(ids))


@variants
@torch.no_grad()
def test_padding_in_any_pieces_equals_each_row_alone(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    """Rows whose entries are complete at different times; also a few queries at a time."""
    _, exported = csa(["csa", "dense", "csa"], changes)
    ids, mask = tokens(3, 60), torch.rand(3, 60) < torch.tensor([[0.9], [0.4], [0.1]])
    mask[0, :13], mask[1, -1], mask[2, 50] = False, False, True
    alone = [exported(ids[row : row + 1, mask[row]], use_cache=False).logits[0] for row in range(3)]
    pieces = [0, 4, 5, 6, 7, 8, 21, 22, 40, 41, 60]
    for scores in (2**25, 7 * 3 * 6 * 60):
        cache, logits = None, []
        monkeypatch.setattr(attention_nsa, "CHUNK_SCORES", scores)
        for start, stop in pairwise(pieces):
            part = mask[:, :stop].long()
            out = exported(ids[:, start:stop], attention_mask=part, past_key_values=cache, use_cache=True)
            cache = out[1]
            logits.append(out.logits)
        for row in range(3):
            close(torch.cat(logits, 1)[row, mask[row]], alone[row])


@torch.no_grad()
def test_cache_keeps_what_later_queries_see_and_no_more() -> None:
    _, exported = csa(section={"heavy_ratio": 8})  # entries of 3 tokens with an overlap, of 8 without
    cache = exported(tokens(2, 50), use_cache=True)[1]
    kept = [{name: (span.start, *span.keys.shape[1:]) for name, span in spans.items()} for spans in cache.layers]
    assert kept[0] == {
        "window": (44, 6, 1, 8),
        "entries": (0, 16, 1, 8),
        "entries tail": (45, 5, 1, 16),
        "index entries": (0, 16, 1, 6),
        "index entries tail": (45, 5, 1, 12),
    }
    assert kept[1] == {"window": (44, 6, 1, 8), "entries": (0, 6, 1, 8), "entries tail": (48, 2, 1, 8)}


@torch.no_grad()
def test_equal_index_scores_go_to_the_first_entries() -> None:
    decoder, exported = csa()
    for model in (decoder, exported):
        for layer in model.layers:
            layer.attention.indexer.head_weight.weight.zero_()
    ids = tokens(1, 50)
    close(exported(ids).logits, decoder(ids))


@torch.no_grad()
def test_an_indexer_in_warm_up_is_kept_and_chooses_nothing() -> None:
    decoder, exported = csa(section={"phase": "warm-up"})
    kept = exported.layers[2].attention.indexer.state_dict()
    assert kept and all(torch.equal(kept[n], t) for n, t in decoder.layers[2].attention.indexer.state_dict().items())
    exported.config.csa_phase, ids = "sparse", tokens(2, 70)
    assert (exported(ids).logits - decoder(ids)).abs().max() > 0.01


@pytest.mark.parametrize("changes", [VARIANTS[0], VARIANTS[3]], ids=str)
def test_loss_and_gradients_are_the_decoders(changes: dict[str, Any]) -> None:
    decoder, exported = csa(section=changes)
    exported.train()
    ids = tokens(2, 50)
    loss, expected = exported(ids, labels=ids).loss, decoder(ids[:, :-1], ids[:, 1:]).mean()
    close(loss, expected)
    expected.backward()
    loss.backward()
    theirs = dict(exported.named_parameters())
    for name, parameter in decoder.named_parameters():
        if ".indexer." in name:  # the loss that trains it stays with the trainer
            assert theirs[name].grad is None
        else:
            close(theirs[name].grad, parameter.grad)


@pytest.mark.parametrize("mode", [{"do_sample": False}, {"num_beams": 3, "do_sample": False}], ids=str)
def test_generation_with_cache_equals_without(mode: dict[str, Any]) -> None:
    _, exported = csa(section=VARIANTS[3])
    ids = tokens(2, 21)
    made = [exported.generate(ids, max_new_tokens=30, use_cache=cache, **mode) for cache in (True, False)]
    assert made[0].shape == (2, 51) and made[0].tolist() == made[1].tolist()


# ---- The exported folder ----

FOLDER = {"ratio": 3, "overlap": False, "topk": 5, "heavy_ratio": 6, "window": 9, "rotary_dims": 4, "q_lora_rank": 10}
FOLDER |= {"index_heads": 3, "index_head_dim": 6, "index_rotary_dims": 4}
FIELDS = sorted(CsaConfig.model_fields.keys() - {"kl_weight", "phase"})  # the loss is the trainer's; phase: above


def config_of(folder: Path, **section: Any) -> Config:
    tree = small_config(folder, "dense", num_layers=3, v_head_dim=None).model_dump()
    tree["attention"] |= {"kind": "csa", "csa": FOLDER | section}
    return Config.model_validate(tree)


@pytest.fixture(scope="module")
def exported_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("csa")
    return small_export(folder, config=config_of(folder))


def test_an_export_is_proven_and_loads_again(tmp_path: Path) -> None:
    """In a process that has torch and transformers alone; the loaded folder, saved again, gives the same logits."""
    path, proven = export(small_run(tmp_path, config=config_of(tmp_path)))
    assert proven.difference < proof.TOLERANCE and proven.form.family is None
    assert "one of every 3 tokens; of every 6 in every second layer" in (path / "README.md").read_text()
    decoder, config, _ = load_decoder(path)
    assert config.attention.csa == CsaConfig(**FOLDER)
    ids = torch.randint(400, (2, 100))
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, dtype=torch.float32)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=True, dtype=torch.float32)
    with torch.no_grad():
        close(model(ids).logits, decoder(ids))
        assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("name", FIELDS)
def test_an_export_that_lost_a_field_is_refused(
    exported_folder: Path, tmp_path: Path, asked_here: None, name: str
) -> None:
    """Each field is there, unlike its default, which takes its place when the export is read without it."""
    assert FOLDER[name] != CsaConfig.model_fields[name].default
    broken = Path(shutil.copytree(exported_folder, tmp_path / "broken"))
    written = json.loads((broken / "config.json").read_text())
    assert written.pop(f"csa_{name}") == FOLDER[name] != getattr(NSAConfig(), f"csa_{name}")
    (broken / "config.json").write_text(json.dumps(written))
    decoder, _, tokenizer = load_decoder(exported_folder)
    with pytest.raises(ExportError, match=r"transformers cannot use the export|logits of .* differ"):
        proof.prove(broken, decoder, tokenizer)


def test_an_export_with_one_weight_changed_is_refused(exported_folder: Path, tmp_path: Path, asked_here: None) -> None:
    broken = Path(shutil.copytree(exported_folder, tmp_path / "broken"))
    decoder, _, tokenizer = load_decoder(exported_folder)
    assert proof.prove(broken, decoder, tokenizer).difference < proof.TOLERANCE
    weights = load_file(broken / "model.safetensors")
    names = ["sink", "compress.position", "compress.norm.weight", "key_value_norm.weight", "query_norm.weight"]
    names += ["indexer.compress.position", "indexer.head_weight.weight"]
    for name in (f"layers.0.attention.{name}" for name in names):
        tensor = weights[name].clone()
        tensor.view(-1)[tensor.abs().argmax()] += 0.5
        save_file({**weights, name: tensor}, broken / "model.safetensors", {"format": "pt"})
        with pytest.raises(ExportError, match="differ"):
            proof.prove(broken, decoder, tokenizer)
