"""Multi-head latent attention: its two forms, and dense and sparse layers against those of `transformers`."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV32Config, GlmMoeDsaConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding
from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32Attention
from transformers.models.glm_moe_dsa.modeling_glm_moe_dsa import GlmMoeDsaAttention

from nsa import ops
from nsa.layers import DeepSeekSparseAttention, DenseAttention
from nsa.layers.dsa.config import DsaConfig
from nsa.layers.dsa.figures import measure
from nsa.layers.figure import values
from nsa.layers.projections.config import MlaConfig
from nsa.layers.projections.mla import Latent
from nsa.layers.rotary import Rotary
from nsa.layers.rotary_scaling import RopeScaling
from nsa.models import AttentionConfig, Decoder, ModelConfig
from nsa.ops.geometry import RotaryLayout
from tests.conftest import ROOT
from tests.layers.test_projections import TOKENS, causal_mask, randomised, tables_twice
from tests.ops.cases import cumulative

WIDTHS = {"q_lora_rank": 10, "kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
HEADS, HIDDEN, TOPK = 3, 16, 4
# Names in a DeepSeek checkpoint.
NAMES = {
    "query": "q_proj",
    "query_down": "q_a_proj",
    "query_norm": "q_a_layernorm",
    "query_up": "q_b_proj",
    "key_value_down": "kv_a_proj_with_mqa",
    "key_value_norm": "kv_a_layernorm",
    "key_value_up": "kv_b_proj",
    "output": "o_proj",
    "indexer.query": "indexer.wq_b",
    "indexer.key": "indexer.wk",
    "indexer.key_norm": "indexer.k_norm",
    "indexer.head_weight": "indexer.weights_proj",
}
INDEX: dict[str, Any] = {"topk": TOPK, "index_heads": 3, "index_head_dim": 8, "index_rotary": RotaryLayout(4)}


def projection_of(**changes: Any) -> Latent:
    return Latent(HIDDEN, HEADS, MlaConfig(**{**WIDTHS, **changes}))


def dense_layer(**changes: Any) -> DenseAttention:
    return randomised(DenseAttention(HIDDEN, HEADS, HEADS, 10, 5, projection=projection_of(**changes)))


def sparse_layer(widths: dict[str, Any] | None = None, **changes: Any) -> DeepSeekSparseAttention:
    projection = projection_of(**widths or {})
    layer = DeepSeekSparseAttention(HIDDEN, HEADS, HEADS, 10, 5, projection=projection, **{**INDEX, **changes})
    return randomised(layer)


def some_input(tokens: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, tokens, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(tokens))


def load(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    """Every weight of the one layer is one of the other."""
    weights = theirs.state_dict()
    own = {name: f"{NAMES[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}" for name in ours.state_dict()}
    assert sorted(own.values()) == sorted(weights)
    ours.load_state_dict({name: weights[other] for name, other in own.items()})


def their_shape(**changes: Any) -> dict[str, Any]:
    shape = {"hidden_size": HIDDEN, "num_attention_heads": HEADS, "num_key_value_heads": HEADS}
    return {**shape, **WIDTHS, "attn_implementation": "eager", **changes}


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None}, {"rope_interleave": False}], ids=str)
def test_dense_attention_is_that_of_deepseek_v3(changes: dict[str, Any]) -> None:
    theirs = randomised(DeepseekV3Attention(DeepseekV3Config(**their_shape(**changes)), 0))
    ours, rotary, x = dense_layer(**changes), Rotary(100.0), torch.randn(2, TOKENS, HIDDEN)
    load(ours, theirs)
    expected, _ = theirs(x, tables_twice(rotary, 4), causal_mask(TOKENS))
    torch.testing.assert_close(ours(x, rotary.at(torch.arange(TOKENS))), expected, rtol=1e-5, atol=1e-5)


def test_yarn_sharpens_the_scores_of_all_dims_as_in_deepseek_v3() -> None:
    """There the factor is in the softmax, here half of it comes with the tables."""
    rope = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 8.0, "mscale": 1.0, "mscale_all_dim": 1.0}
    rope["original_max_position_embeddings"] = 64
    theirs = randomised(DeepseekV3Attention(DeepseekV3Config(**their_shape(), rope_parameters=rope), 0))
    ours, x, rotary = dense_layer(), torch.randn(1, TOKENS, HIDDEN), Rotary(100.0, 64, 8.0)
    load(ours, theirs)
    assert theirs.scaling > 1.3 * 10**-0.5 and rotary.temperature > 1.1
    cos, sin = (table / rotary.temperature for table in tables_twice(rotary, 4))
    expected, _ = theirs(x, (cos, sin), causal_mask(TOKENS))
    torch.testing.assert_close(ours(x, rotary.at(torch.arange(TOKENS))), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mscale", [None, 1.0, 0.5])
def test_scaled_frequencies_sharpen_the_scores_as_in_deepseek_v3(mscale: float | None) -> None:
    """Tables and softmax are those of `transformers`. With other values of mscale the tables have a factor, too."""
    rope = {"rope_type": "yarn", "factor": 8.0, "mscale": mscale, "mscale_all_dim": mscale and 1.0}
    rope["original_max_position_embeddings"] = 64
    shape = DeepseekV3Config(**their_shape(), rope_parameters={**rope, "rope_theta": 100.0})
    theirs, ours, x = randomised(DeepseekV3Attention(shape, 0)), dense_layer(), torch.randn(1, TOKENS, HIDDEN)
    load(ours, theirs)
    tables = DeepseekV3RotaryEmbedding(shape)(x, torch.arange(TOKENS)[None])
    expected, _ = theirs(x, tables, causal_mask(TOKENS))
    rotary = Rotary(100.0, scaling=RopeScaling(**rope))
    torch.testing.assert_close(ours(x, rotary.at(torch.arange(TOKENS))), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("attention", "config", "pairs"),
    [
        (DeepseekV32Attention, DeepseekV32Config, "half-split"),
        (GlmMoeDsaAttention, GlmMoeDsaConfig, "interleaved"),
    ],
)
def test_sparse_attention_is_that_of_deepseek_v32_and_glm(attention: type, config: type, pairs: str) -> None:
    """With many more tokens than a query selects: outputs, and which tokens these are.

    With so many index heads no two scores are 0, a tie that torch.topk would break in its own way.
    """
    tokens, heads = 30, 16
    shape = config(**their_shape(), index_n_heads=heads, index_head_dim=8, index_topk=TOPK)
    theirs = randomised(attention(shape, 0))
    ours = sparse_layer(index_heads=heads, index_rotary=RotaryLayout(4, "first", pairs))  # type: ignore[arg-type]
    load(ours, theirs)
    chosen: list[Tensor] = []
    ours.attend.choose.register_forward_hook(lambda module, inputs, lists: chosen.append(lists))
    theirs.indexer.register_forward_hook(lambda module, inputs, lists: chosen.append(lists))
    x, rotary = torch.randn(2, tokens, HIDDEN), Rotary(100.0)
    cos, sin = (torch.cat((table, table), -1)[None] for table in rotary.tables(torch.arange(tokens), 4))
    expected = theirs(x, (cos, sin), causal_mask(tokens).expand(2, -1, -1, -1))[0]
    torch.testing.assert_close(ours(x, rotary.at(torch.arange(tokens))), expected, rtol=1e-5, atol=1e-5)
    wanted, found = chosen
    assert torch.equal(found[:, TOPK:], wanted[:, TOPK:].sort(-1).values)


def test_the_guide_has_the_widths_and_indexers_of_the_released_models(tmp_path: Path) -> None:
    """Its YAML is valid, and its table has the defaults of `transformers`."""
    guide = (ROOT / "docs/dsa.md").read_text()
    (block,) = (text for text in re.findall(r"```yaml\n(.*?)```", guide, re.DOTALL) if "mla" in text)
    rest = {"vocab_size": 99, "hidden_size": 8, "num_layers": 1, "intermediate_size": 8, "max_position": 8}
    tree = yaml.safe_load(block)
    model, index = ModelConfig(**tree["model"], **rest), AttentionConfig(**tree["attention"]).dsa
    theirs = DeepseekV32Config()
    assert (model.num_heads, model.mla) == (
        theirs.num_attention_heads,
        MlaConfig(**{n: getattr(theirs, n) for n in WIDTHS}),
    )
    assert index == DsaConfig()
    for name, config in (("DeepSeek-V3.2", theirs), ("GLM-5", GlmMoeDsaConfig())):
        row = [config.index_n_heads, config.index_head_dim, config.index_topk, config.qk_rope_head_dim]
        assert f"| {name} | {' | '.join(map(str, row))} | first |" in guide


@pytest.mark.parametrize("q_lora_rank", [10, None])
def test_both_forms_give_equal_results_and_gradients(q_lora_rank: int | None) -> None:
    layer, x = dense_layer(q_lora_rank=q_lora_rank).double(), some_input(20, batch=2)
    found = []
    for absorbed in (False, True):
        leaf = x.clone().requires_grad_()
        q, rows, _ = layer.projection(leaf, Rotary().at(torch.arange(20)))
        q, (k, v) = layer.projection.form(q, rows, absorbed)
        assert (q.shape[3], k.shape[2:], v.shape[2:]) == ((16, (1, 16), (1, 12)) if absorbed else (10, (3, 10), (3, 5)))
        out = layer.projection.values(layer.attend(q, (k, v)), absorbed)
        weights = [p for name, p in layer.named_parameters() if not name.startswith("output")]
        found.append((out, *torch.autograd.grad(out.square().sum(), [leaf, *weights])))
    for expanded, absorbed in zip(*found, strict=True):
        torch.testing.assert_close(absorbed, expanded)
        assert expanded.ne(0).any()


def test_with_as_many_tokens_as_it_may_select_it_is_dense_attention() -> None:
    dense, x, rotary = dense_layer().double(), some_input(30), Rotary().at(torch.arange(30))
    for options in ({"topk": 30}, {"topk": 2, "phase": "warm-up"}):
        layer = sparse_layer(**options).double()
        dense.load_state_dict({k: v for k, v in layer.state_dict().items() if not k.startswith("indexer")})
        torch.testing.assert_close(layer(x), dense(x, rotary))


@pytest.mark.parametrize("steps", [[1] * 30, [20, 1, 1, 8], [3, 27]])
@pytest.mark.parametrize("phase", ["sparse", "warm-up", None])
def test_decoding_on_a_cache_equals_the_whole(steps: list[int], phase: str | None) -> None:
    """What is kept of a token is its latent and its rotated key. Selected are the same tokens."""
    layer = (sparse_layer(phase=phase) if phase else dense_layer()).double()
    x, cache, chosen = some_input(30, batch=2), layer.new_cache(), []
    if phase:
        layer.attend.choose.register_forward_hook(lambda module, inputs, lists: chosen.append(lists))
    pieces, start = [], 0
    for piece in x.split(steps, 1):
        pieces.append(layer(piece, Rotary().at(torch.arange(start, start + piece.shape[1])), cache=cache))
        start += piece.shape[1]
    whole = layer(x, Rotary().at(torch.arange(30)))
    torch.testing.assert_close(torch.cat(pieces, 1), whole)
    assert [row.shape for row in cache.rows.kept] == [(2, 30, 1, 12 + 4)]
    if phase == "sparse":
        assert torch.equal(torch.cat(chosen[:-1], 1), chosen[-1])


def test_packed_documents_are_as_each_alone() -> None:
    documents, x = [9, 1, 20], some_input(30)
    for phase in ("sparse", "warm-up"):
        layer = sparse_layer(phase=phase).double()
        alone = torch.cat([layer(piece) for piece in x.split(documents, 1)], 1)
        torch.testing.assert_close(layer(x, cu_seqlens=cumulative(documents)), alone)


@pytest.mark.parametrize("phase", ["sparse", "warm-up"])
def test_the_indexer_learns_from_its_loss_alone_and_nothing_else_does(phase: str) -> None:
    """Neither through the hidden state nor through the latent of the queries."""
    x = some_input(20).requires_grad_()

    def gradients(kl_weight: float) -> dict[str, Tensor]:
        layer = sparse_layer(phase=phase, kl_weight=kl_weight).double()
        layer(x).square().sum().backward()
        found = {name: p.grad for name, p in layer.named_parameters()} | {"x": x.grad}
        x.grad = None
        return found

    none, much = gradients(0.0), gradients(1000.0)
    for name, gradient in none.items():
        if name.startswith("indexer"):
            assert gradient.eq(0).all() and much[name].ne(0).any(), name
        else:
            assert gradient.ne(0).any() and torch.equal(gradient, much[name]), name


@pytest.mark.parametrize("phase", ["sparse", "warm-up"])
def test_the_loss_is_that_of_the_expanded_attention(phase: str) -> None:
    """Its definition, on queries and keys of each head; and the figures are those of the same attention."""
    layer, x, rotary = sparse_layer(phase=phase).double(), some_input(20), Rotary().at(torch.arange(20))
    seen: list[tuple] = []
    layer.attend.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    layer(x, rotary).sum().backward()
    index = seen[0][2], seen[0][3][0], seen[0][4]
    q, (k, v) = layer.projection.form(*layer.projection(x, rotary)[:2], absorbed=False)
    lists, _ = ops.index_topk(*index, topk=TOPK)
    _, dense = ops.dense_attention(q, k, v, return_lse=True)
    _, lse = ops.token_sparse_attention(q, k, v, lists, return_lse=True)
    target = {"token_indices": lists} if phase == "sparse" else {}
    loss = ops.indexer_kl(*index, q, k, lse if target else dense, **target, backend="naive")
    assert layer.attend.loss.tally[0].item() == pytest.approx(loss.item())
    recall = (lse - dense).exp()[..., TOPK:].mean().item()
    assert values(measure(layer.attend, *seen[0]))["recall"] == pytest.approx(recall)


def test_a_decoder_of_latent_attention_decodes_as_the_whole() -> None:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=24, hidden_size=HIDDEN, num_layers=2, num_heads=HEADS, num_kv_heads=HEADS, head_dim=10, v_head_dim=5,
        intermediate_size=16, max_position=64, init_std=0.3, projection="mla", mla=MlaConfig(**WIDTHS),
    )  # fmt: skip
    sizes = {"topk": TOPK, "index_heads": 2, "index_head_dim": 8, "index_rotary_dims": 4}
    decoder = Decoder(config, AttentionConfig(kind=["dense", "dsa"], dsa=sizes)).double()
    ids, caches = torch.randint(24, (2, 30)), decoder.new_caches()
    pieces = torch.cat([decoder(piece, caches=caches) for piece in ids.split([12, 1, 1, 16], 1)], 1)
    torch.testing.assert_close(pieces, decoder(ids))
    with pytest.raises(ValueError, match=r"model\.mla does not go with attention\.kind nsa: only dense, dsa"):
        Decoder(config, AttentionConfig(kind=["dense", "nsa"]))
