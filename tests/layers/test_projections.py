"""Projections: against the layers of `transformers` that have them, and between their forms."""

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen3Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from nsa.layers import DenseAttention
from nsa.layers.linear import joint_linear
from nsa.layers.projections.gqa import GroupedQuery
from nsa.layers.rotary import Rotary

TOKENS = 9


def randomised(layer: nn.Module) -> nn.Module:
    """With random values, norms and biases too."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.3)
    return layer


def causal_mask(tokens: int) -> Tensor:
    return torch.full((1, 1, tokens, tokens), -torch.inf).triu(1)


def tables_twice(rotary: Rotary, width: int) -> tuple[Tensor, Tensor]:
    """cos and sin as `transformers` has them: (1, T, width), both halves equal."""
    cos, sin = rotary.tables(torch.arange(TOKENS), width)
    return torch.cat((cos, cos), -1)[None], torch.cat((sin, sin), -1)[None]


@pytest.mark.parametrize(("bias", "norm_eps"), [(True, None), (False, 1e-2)])
def test_biases_are_those_of_qwen2_and_norms_those_of_qwen3(bias: bool, norm_eps: float | None) -> None:
    shape = {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}
    shape |= {"attn_implementation": "eager"}
    if bias:
        theirs = Qwen2Attention(Qwen2Config(**shape), 0)
    else:
        theirs = Qwen3Attention(Qwen3Config(**shape, rms_norm_eps=norm_eps), 0)
    randomised(theirs)
    projection = GroupedQuery(16, 4, 2, 6, bias=bias, norm_eps=norm_eps)
    ours = DenseAttention(16, 4, 2, 6, projection=projection)
    names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
    names |= {"query_norm": "q_norm", "key_norm": "k_norm"}
    weights = theirs.state_dict()
    ours.load_state_dict(
        {n: weights[names[n.partition(".")[0]] + "." + n.partition(".")[2]] for n in ours.state_dict()}
    )
    assert len(ours.state_dict()) == len(weights)
    x, rotary = torch.randn(1, TOKENS, 16), Rotary(100.0)
    expected, _ = theirs(x, tables_twice(rotary, 6), causal_mask(TOKENS))
    torch.testing.assert_close(ours(x, rotary.at(torch.arange(TOKENS))), expected, rtol=1e-5, atol=1e-5)


def test_the_projection_is_no_module_of_the_layer() -> None:
    """Else all its parameters would have a second name, and checkpoints of before would not fit."""
    layer = DenseAttention(16, 4, 2, 6)
    names = [name for name, _ in layer.named_parameters()]
    assert names == ["query.weight", "key.weight", "value.weight", "output.weight"]
    assert layer.projection.query is layer.query


def test_a_joint_bias_has_its_gradient() -> None:
    torch.manual_seed(0)
    x, bias = (torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in ((2, 5, 6), (5,)))
    weights = [torch.randn(n, 6, dtype=torch.float64, requires_grad=True) for n in (4, 1)]
    assert torch.autograd.gradcheck(lambda x, bias, *w: joint_linear(x, w, bias), (x, bias, *weights))
    torch.testing.assert_close(joint_linear(x, weights, bias), torch.cat([x @ w.T for w in weights], -1) + bias)
