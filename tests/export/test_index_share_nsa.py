"""Layers that share index sets, as an export carries them, against the decoder that was trained."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import small_config, small_run
from transformers import AutoModelForCausalLM

from nsa.config import Config
from nsa.exporting import export, load_decoder
from nsa.exporting.proof import TOLERANCE
from nsa.layers.dsa.config import DsaConfig
from nsa.models.hf import attention_nsa
from nsa.models.hf.indexer_nsa import SharedTokens
from tests.export.test_modeling_nsa import INDEXERS, close, pair, tokens

# kinds, share_layers, share_from; of three layers
GROUPS: list[tuple[Any, int, int]] = [
    ("dsa", 2, 0),
    ("dsa", 2, 1),
    ("dsa", 3, 0),
    (["dsa", "nsa", "dsa"], 2, 0),
    (["dense", "dsa"], 5, 0),
]
SERVED = [[1], [2], [1, 2], [2], []]
LATENT = {"q_lora_rank": 10, "kv_lora_rank": 12, "qk_nope_head_dim": 2, "qk_rope_head_dim": 6, "v_head_dim": 6}


def sharing(groups: tuple[Any, int, int], **changes: Any) -> tuple[Any, Any]:
    kind, layers, first = groups
    return pair(kind, (6, 3, 8, 6), share={"share_layers": layers, "share_from": first}, **changes)


@pytest.mark.parametrize("phase", ["sparse", "warm-up"])
@pytest.mark.parametrize(("groups", "served"), list(zip(GROUPS, SERVED, strict=True)), ids=str)
@torch.no_grad()
def test_logits_are_the_decoders(groups: Any, served: list[int], phase: str) -> None:
    for indexer in INDEXERS:
        decoder, exported = sharing(groups, phase=phase, indexer=indexer)
        assert [
            i for i in range(3) if isinstance(getattr(exported.layers[i].attention, "indexer", 0), SharedTokens)
        ] == served
        assert not any(f"layers.{i}.attention.indexer." in name for name in exported.state_dict() for i in served)
        for length in (1, 17, 70):
            ids = tokens(2, length)
            close(exported(ids).logits, decoder(ids))


@torch.no_grad()
def test_over_latents() -> None:
    sizes = {"projection": "mla", "mla": LATENT}
    decoder, exported = pair("dsa", (6, 6, 8, 6), share={"share_layers": 2, "share_from": 1}, **sizes)
    ids = tokens(2, 70)
    close(exported(ids).logits, decoder(ids))


@torch.no_grad()
def test_layers_attend_to_what_the_groups_indexer_chose() -> None:
    """Another choice in the first layer of a group reaches the others, and no layer before it."""
    _, exported = sharing(GROUPS[1])
    ids = tokens(1, 40)
    before = exported(ids, output_hidden_states=True).hidden_states
    exported.layers[1].attention.output.weight.zero_()  # what this layer attends to itself does not matter
    exported.layers[1].mlp.down.weight.zero_()
    alone = exported(ids, output_hidden_states=True).hidden_states
    exported.layers[1].attention.indexer.query.weight.neg_()
    after = exported(ids, output_hidden_states=True).hidden_states
    assert torch.equal(alone[2], after[2]) and torch.equal(before[1], after[1])
    assert not torch.allclose(alone[3], after[3])


@torch.no_grad()
def test_padding_pieces_and_chunks_equal_each_row_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    _, exported = sharing(GROUPS[3])
    ids, mask, cache, logits = tokens(2, 60), torch.ones(2, 60, dtype=torch.long), None, []
    mask[0, :13] = 0
    alone = [exported(ids[row : row + 1, mask[row].bool()], use_cache=False).logits[0] for row in range(2)]
    for scores in (2**25, 7 * 2 * 6 * 60):
        cache, logits = None, []
        monkeypatch.setattr(attention_nsa, "CHUNK_SCORES", scores)
        for start, stop in ((0, 30), (30, 31), (31, 60)):
            out = exported(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True)
            cache = out[1]
            logits.append(out.logits)
        for row in range(2):
            close(torch.cat(logits, 1)[row, mask[row].bool()], alone[row])
    assert "index" in cache.layers[0] and "index" not in cache.layers[2], "no index keys without an indexer"


@pytest.mark.parametrize("mode", [{"do_sample": False}, {"num_beams": 3, "do_sample": False}], ids=str)
def test_generation_with_cache_equals_without(mode: dict[str, Any]) -> None:
    _, exported = sharing(GROUPS[1])
    ids = tokens(2, 21)
    made = [exported.generate(ids, max_new_tokens=30, use_cache=cache, **mode) for cache in (True, False)]
    assert made[0].shape == (2, 51) and made[0].tolist() == made[1].tolist()


def test_an_export_is_proven_and_loads_again(tmp_path: Path) -> None:
    """In a process that has torch and transformers alone; the loaded folder, saved again, gives the same logits."""
    tree = small_config(tmp_path, "dsa", num_layers=3).model_dump()
    tree["attention"]["dsa"] |= {"share_layers": 2, "share_from": 1}
    path, proof = export(small_run(tmp_path, config=Config.model_validate(tree)))
    assert proof.difference < TOLERANCE and proof.form.family is None
    written = json.loads((path / "config.json").read_text())
    assert (written["index_share_layers"], written["index_share_from"]) == (2, 1)
    assert "groups of 2 layers attend to the tokens of one indexer" in (path / "README.md").read_text()
    decoder, config, _ = load_decoder(path)
    assert config.attention.dsa == DsaConfig.model_validate(tree["attention"]["dsa"])
    ids = torch.randint(400, (2, 100))
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, dtype=torch.float32)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=True, dtype=torch.float32)
    with torch.no_grad():
        close(model(ids).logits, decoder(ids))
        assert torch.equal(again(ids).logits, model(ids).logits)
