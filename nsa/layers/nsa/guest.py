"""Other methods in the place of NSA's selection of blocks. The compressed and the window branch stay."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nsa import ops
from nsa.layers.dense import guest as dense
from nsa.layers.kind import Guest, Pair, Spent, newest, seen_keys


def attention(
    attend: Any,
    method: Callable[..., Tensor],
    q: Tensor,
    kv_cmp: Pair,
    kv_slc: Pair,
    kv_win: Pair,
    gates: Tensor,
    *,
    offset: int = 0,
) -> Tensor:
    options: dict[str, Any] = {"scale": attend.scale, "backend": attend.backend}
    sizes: dict[str, Any] = {name: attend.sizes[name] for name in ("length", "stride")}
    compressed, _ = ops.compressed_attention(q, kv_cmp[0], kv_cmp[1], **sizes, offset=offset, **options)
    near = ops.dense_attention(q, *kv_win, window=attend.window, **options)
    chosen = method(q, *newest(kv_slc, q.shape[1]), attend.scale)
    by_branch = torch.stack((compressed, chosen, near), -1)
    return (by_branch * gates[..., None, :]).sum(-1)


def beside(
    attend: Any, q: Tensor, kv_cmp: Pair, kv_slc: Pair, kv_win: Pair, gates: Tensor, *, offset: int = 0
) -> Spent:
    """Complete compressed blocks and the window: each branch has keys and values of its own.

    The scores of the compressed blocks serve attention as well as selection.
    """
    seen = seen_keys(q, offset)
    blocks = ((seen - attend.sizes["length"]) // attend.sizes["stride"] + 1).clamp(min=0).sum()
    near = seen.clamp(max=attend.window).sum()
    groups = kv_slc[0].shape[2]
    return _spent(torch.ones(groups, dtype=torch.float64) * float((blocks + near) * len(q)), q, kv_slc)


def spent(attend: Any, q: Tensor, kv_cmp: Pair, kv_slc: Pair, kv_win: Pair, gates: Tensor, *, offset: int = 0) -> Spent:
    """Those, and the tokens of the selected blocks."""
    options: dict[str, Any] = {"scale": attend.scale, "backend": attend.backend, "offset": offset}
    sizes: dict[str, Any] = {name: attend.sizes[name] for name in ("length", "stride")}
    _, lse = ops.compressed_attention(q, kv_cmp[0], kv_cmp[1], **sizes, **options)
    chosen = attend.choose(q, kv_cmp[0], lse, offset=offset).long().cpu()  # (B, T, G, n)
    size = attend.sizes["block_size"]
    last = seen_keys(q, offset).long()[None, :, None, None]
    tokens = torch.where(chosen >= 0, (last - chosen * size).clamp(max=size), 0).double().sum((0, 1, 3))
    others = beside(attend, q, kv_cmp, kv_slc, kv_win, gates, offset=offset)
    return Spent(*(one + other for one, other in zip(_spent(tokens, q, kv_slc), others, strict=True)))


def _spent(keys: Tensor, q: Tensor, kv: Pair) -> Spent:
    """Of (G,) keys attended to by all query heads of their KV head."""
    k, v = kv
    return Spent(keys * (q.shape[2] // k.shape[2]), torch.zeros_like(keys), keys * (k.shape[3] + v.shape[3]))


def attention_warm_up(
    attend: Any,
    method: Callable[..., Tensor],
    q: Tensor,
    kv_cmp: Pair,
    kv_slc: Pair,
    kv_win: Pair,
    gates: Tensor,
    *,
    offset: int = 0,
) -> Tensor:
    return dense.attention(attend, method, q, kv_slc, offset=offset)


def spent_warm_up(
    attend: Any, q: Tensor, kv_cmp: Pair, kv_slc: Pair, kv_win: Pair, gates: Tensor, *, offset: int = 0
) -> Spent:
    """All keys of the selected branch."""
    return dense.spent(attend, q, kv_slc, offset=offset)


GUEST = Guest(attention, spent, beside, cached=True)
GUEST_WARM_UP = Guest(attention_warm_up, spent_warm_up, beside=None, cached=False)  # it is still a dense layer
