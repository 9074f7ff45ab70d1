"""What TensorBoard shows of a layer's attention, of packed documents and of each branch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nsa.layers import CompressedSparseAttention, DeepSeekSparseAttention, EntmaxAttention, NativeSparseAttention
from nsa.layers.csa import figures as csa
from nsa.layers.dsa import figures as dsa
from nsa.layers.entmax import figures as entmax
from nsa.layers.figure import Figure, values
from nsa.layers.nsa import figures as nsa
from nsa.ops.geometry import RotaryLayout
from tests.ops.cases import cumulative

SIZES = {"compress_length": 4, "compress_stride": 2, "block_size": 4, "num_blocks": 3, "num_local": 1, "window": 5}
INDEX = {"index_heads": 3, "index_head_dim": 8}
LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[..., dict[str, Figure]]]] = {
    "nsa": (lambda: NativeSparseAttention(16, 4, 2, 6, **SIZES), nsa.measure),
    "dsa": (
        lambda: DeepSeekSparseAttention(16, 4, 2, 6, topk=5, **INDEX, index_rotary=RotaryLayout(4)),
        dsa.measure,
    ),
    "csa": (
        lambda: CompressedSparseAttention(16, 4, 6, ratio=2, topk=3, window=4, **INDEX, index_rotary_dims=4),
        csa.measure,
    ),
    "entmax": (lambda: EntmaxAttention(16, 4, 2, 6), entmax.measure),
}
# No mean over queries: a share of sums of norms, and an entropy of all documents' blocks.
NO_MEAN = {"mass_compressed", "mass_selected", "mass_window", "block_entropy"}


def layer_of(kind: str) -> nn.Module:
    """In float64, with attention that is not flat."""
    torch.manual_seed(0)
    layer = LAYERS[kind][0]().double()
    for name, parameter in layer.named_parameters():
        if name.endswith(("query.weight", "key.weight", "gate.weight", "key_value.weight")):
            nn.init.normal_(parameter)
    return layer


def figures_of(kind: str, layer: Any, x: Tensor, borders: Tensor | None = None) -> dict[str, float]:
    seen: list[Any] = []
    hook = layer.attend.register_forward_pre_hook(lambda module, inputs, options: seen.append(inputs), with_kwargs=True)
    layer(x, cu_seqlens=borders)
    hook.remove()
    return values(LAYERS[kind][1](layer.attend, *seen[0], cu_seqlens=borders))


@pytest.mark.parametrize("kind", LAYERS)
def test_figures_of_packed_documents_are_those_of_each_alone(kind: str) -> None:
    """Two documents of one length: means over all queries, or over those that see more than they select.

    Notices figures that take positions in the batch for positions in the document: then the second document's first
    queries count as if they saw all of the first.
    """
    layer, tokens = layer_of(kind), 30
    documents = [torch.randn(1, n, 16, dtype=torch.float64) for n in (tokens, tokens)]
    packed = figures_of(kind, layer, torch.cat(documents, 1), cumulative([tokens, tokens]))
    alone = [figures_of(kind, layer, x) for x in documents]
    assert packed.keys() == alone[0].keys()
    for name in packed.keys() - NO_MEAN:
        assert packed[name] == pytest.approx((alone[0][name] + alone[1][name]) / 2, rel=1e-5), name
        assert alone[0][name] != alone[1][name] or name in ("first_block_share", "token_overlap"), name


def test_a_branch_whose_gate_is_shut_has_no_share() -> None:
    layer, x = layer_of("nsa"), torch.randn(1, 40, 16, dtype=torch.float64)
    for number, branch in enumerate(("compressed", "selected", "window")):
        nn.init.zeros_(layer.gate.weight)
        nn.init.zeros_(layer.gate.bias)
        layer.gate.bias.data.view(-1, 3)[:, number] = -40
        found = figures_of("nsa", layer, x)
        shares = [found.pop(f"mass_{name}") for name in ("compressed", "selected", "window")]
        assert shares[number] < 1e-9 and sum(shares) == pytest.approx(1)
        assert sum(share > 0.1 for share in shares) == 2 and found[f"gate_{branch}"] < 1e-9


def test_the_first_block_counts_where_it_is_not_forced() -> None:
    """Its share is that of a layer that forces none of its blocks, though this one always selects it."""
    layer, x = layer_of("nsa"), torch.randn(1, 60, 16, dtype=torch.float64)
    chosen: list[Tensor] = []
    layer.attend.choose.register_forward_hook(lambda module, inputs, out: chosen.append(out))
    found = figures_of("nsa", layer, x)["first_block_share"]
    assert (chosen[0][..., 0] == 0).all()
    layer.attend.choose.sizes["num_initial"] = 0
    chosen.clear()
    layer(x)
    free = chosen[0][:, 12:]  # that see more blocks than they select
    assert found == pytest.approx((free == 0).any(-1).double().mean().item()) and 0 < found < 1
