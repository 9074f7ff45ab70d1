"""Entmax attention as a layer: positions, scaling, decoding, packing, and its figures."""

from typing import Any

import pytest
import torch
from torch import Tensor

from nsa import ops
from nsa.layers import EntmaxAttention
from nsa.layers.entmax.figures import measure
from nsa.layers.figure import values
from nsa.layers.rotary import Rotary
from nsa.models import AttentionConfig, Decoder, ModelConfig
from tests.ops.cases import cumulative

VARIANTS: list[dict[str, Any]] = [
    {},
    {"scaling": "none"},
    {"scaling": "ssmax", "alpha": 2.0},
    {"nope_heads": 2},
    {"nope_heads": 3, "position": "alibi", "alpha": 1.3},
    {"nope_heads": 4},
]
each_variant = pytest.mark.parametrize("changes", VARIANTS, ids=lambda changes: "-".join(map(str, changes.values())))


def layer_of(**changes: Any) -> EntmaxAttention:
    torch.manual_seed(0)
    return EntmaxAttention(16, 4, 2, 6, 4, **changes).double()


def some_input(tokens: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, tokens, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(tokens))


@each_variant
def test_decoding_on_a_cache_equals_the_whole(changes: dict[str, Any]) -> None:
    layer, x = layer_of(**changes), some_input(30, batch=2)
    whole, cache = layer(x), layer.new_cache()
    pieces = torch.cat([layer(piece, cache=cache) for piece in x.split([20, 1, 1, 8], 1)], 1)
    torch.testing.assert_close(pieces, whole)


@each_variant
def test_packed_documents_are_as_each_alone(changes: dict[str, Any]) -> None:
    documents = [9, 1, 20]
    layer, x = layer_of(**changes), some_input(30)
    alone = torch.cat([layer(piece) for piece in x.split(documents, 1)], 1)
    torch.testing.assert_close(layer(x, cu_seqlens=cumulative(documents)), alone)


@each_variant
def test_all_parameters_get_a_gradient(changes: dict[str, Any]) -> None:
    layer = layer_of(**changes)
    layer(some_input(40)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_the_layer_is_its_equation() -> None:
    """ASEntmax on two heads without positions, beside two rotary ones that are not scaled; written out."""
    layer, x, tokens = layer_of(nope_heads=2), some_input(11), torch.arange(11)
    cos, sin = Rotary(1e4).tables(tokens, 6)
    q, k, v = (linear(x).unflatten(-1, (-1, n)) for linear, n in ((layer.query, 6), (layer.key, 6), (layer.value, 4)))
    q = torch.cat((ops.apply_rotary(q[:, :, :2], cos, sin), q[:, :, 2:]), 2)
    k = torch.cat((ops.apply_rotary(k[:, :, :1], cos, sin), k[:, :, 1:]), 2)
    beta = torch.log1p((x @ layer.beta.weight.T).exp())
    gamma = 2 * torch.tanh(x @ layer.gamma.weight.T)
    factor = 1 + beta * torch.log(tokens + 2.0).double()[:, None] ** gamma
    factor[:, :, :2] = 1
    out = ops.entmax_attention(q, k, v, logit_scale=factor, backend="naive")
    torch.testing.assert_close(layer(x), layer.output(out.flatten(2)))


def test_alibi_heads_lose_a_score_by_distance() -> None:
    layer, x = layer_of(nope_heads=1, position="alibi", scaling="none"), some_input(11)
    q, k, v = (linear(x).unflatten(-1, (-1, n)) for linear, n in ((layer.query, 6), (layer.key, 6), (layer.value, 4)))
    out = ops.entmax_attention(q, k, v, slopes=torch.tensor([1, 1 / 2, 1 / 3, 0]), backend="naive")
    torch.testing.assert_close(layer(x), layer.output(out.flatten(2)), rtol=1e-6, atol=1e-7)  # slopes are fp32


def test_heads_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"multiple of the query heads of a KV head \(2\)"):
        layer_of(nope_heads=1)
    with pytest.raises(ValueError, match="from 0 to the query heads"):
        layer_of(nope_heads=5, position="alibi")


def test_figures_count_the_support() -> None:
    """Of equal scores with slope 1: the support is the nearest keys, the same for all queries that see so many."""
    layer = layer_of(nope_heads=0, position="alibi", scaling="none")
    torch.nn.init.zeros_(layer.query.weight)
    seen: list[dict[str, float]] = []
    layer.attend.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(values(measure(module, *args, **kwargs))), with_kwargs=True
    )
    layer(some_input(300))
    z = -torch.arange(300.0)
    keys = [int((ops.entmax(z / h) > 0).sum()) for h in range(1, 5)]
    assert seen[0]["support"] == pytest.approx(sum(keys) / 4, rel=0.05)
    assert 0.9 < seen[0]["zeros"] < 1 and 0 < seen[0]["entropy"] < 2 and seen[0]["logit_scale"] == 1


@pytest.mark.parametrize("changes", VARIANTS[:5:2], ids=str)
def test_a_decoder_learns(changes: dict[str, Any]) -> None:
    """To repeat a token of the same document, in a few steps."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
    config = ModelConfig(vocab_size=12, intermediate_size=48, max_position=64, **sizes)
    decoder = Decoder(config, AttentionConfig(kind="entmax", entmax=changes))
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=0.01)
    ids = torch.randint(12, (1, 24)).repeat(1, 2)
    losses = []
    for _ in range(12):
        loss = decoder(ids[:, :-1], targets=ids[:, 1:]).mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.6 * losses[0]
