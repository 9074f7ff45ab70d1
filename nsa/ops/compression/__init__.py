"""NSA's learned compression: maps each block of keys or values to one vector (arXiv 2502.11089, Eq. 7)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from nsa.ops.decode import append_rows
from nsa.ops.dispatch import accumulation_dtype, autocasts, check_compression, check_packing, resolve_backend
from nsa.ops.geometry import Documents, compression_layout, num_compressed
from nsa.ops.rotary import apply_rotary


@autocasts("x", "inner", "position", "outer")
def compress_blocks(
    x: Tensor,
    inner: Tensor,
    position: Tensor,
    outer: Tensor,
    *,
    length: int,
    stride: int,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """phi(block) = outer silu(inner flatten(block + position)), of every block of every head.

    Args:
        x: (B, T, G, D).
        inner: (hidden, length * D), for the concatenated tokens of a block. position: (length, D), added to every
            block. outer: (Dv, hidden). All are cast to x's dtype.
        length: tokens of a block (l), a multiple of ``stride`` (d), the tokens between two blocks.
        cu_seqlens: (N+1,) int32 boundaries of packed documents, with B = 1; blocks do not cross them.
        backend: auto, triton, torch or naive.

    Returns:
        (B, M, G, Dv) in x's dtype, M = (T - l) // d + 1 (0 if T < l). With ``cu_seqlens`` the blocks of each document,
        concatenated in order. There may be fewer than M; the remaining rows are 0.

    Raises:
        ValueError: inconsistent shapes, unknown backend.
    """
    check_compression(length, stride)
    check_packing(x, cu_seqlens, x.shape[1])
    if x.dim() != 4 or inner.shape[1] != length * x.shape[3] or position.shape != (length, x.shape[3]):
        raise ValueError(
            f"x (B, T, G, D) {tuple(x.shape)} goes with inner (hidden, {length} * D) and position ({length}, D); got "
            f"{tuple(inner.shape)} and {tuple(position.shape)}"
        )
    if outer.shape[1] != inner.shape[0]:
        raise ValueError(f"inner {tuple(inner.shape)} and outer {tuple(outer.shape)} must share the hidden width")
    if not num_compressed(x.shape[1], length, stride):
        # There is no block, and yet every weight has a gradient (0): DistributedDataParallel waits for them.
        none = x.new_zeros(x.shape[0], 0, x.shape[2], *position.shape) + position.to(x.dtype)
        return linear(silu(linear(none.flatten(3), inner.to(x.dtype))), outer.to(x.dtype))
    inner, position, outer = (w.to(x.dtype) for w in (inner, position, outer))
    implementation = resolve_backend(backend, x, outer)
    documents = Documents.of(x.shape[1], 0, cu_seqlens, x.device)
    if implementation == "naive":
        return _naive(x, inner, position, outer, documents, length, stride)
    if implementation == "triton":
        from nsa.ops.kernels import operators

        return operators.compress_blocks(x, inner, position, outer, documents, length, stride)
    return _portable(x, inner, position, outer, documents, length, stride)


class Weights(NamedTuple):
    """Of a compression: inner (hidden, l * D), position (l, D) and outer (Dv, hidden), as for `compress_blocks`."""

    inner: Tensor
    position: Tensor
    outer: Tensor


class Pooling(NamedTuple):
    """Of a compression: gate (D, D), position (l, D) and outer (Dv, D), as for `pool_blocks`."""

    gate: Tensor
    position: Tensor
    outer: Tensor


@autocasts("x", "gate", "position", "outer")
def pool_blocks(
    x: Tensor,
    gate: Tensor,
    position: Tensor,
    outer: Tensor,
    *,
    length: int,
    stride: int,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """A weighted mean of the tokens of every block of every head, with weights of its own in each channel.

    outer sum_i softmax_i(gate x_i + position_i) x_i, over the tokens i of a block. DeepSeek-V4 compresses like this
    (arXiv 2606.19348, section 2.3), without ``outer`` and with gates of the hidden state. Beside `compress_blocks` it
    can leave single tokens out, or take one alone. There is no kernel: it is PyTorch on every device.

    Args:
        x, length, stride, cu_seqlens: as for `compress_blocks`.
        gate: (D, D). position: (length, D). outer: (Dv, D). All are cast to x's dtype.

    Returns:
        As `compress_blocks`. The softmax and the mean are fp32 (float64 for float64).

    Raises:
        ValueError: inconsistent shapes.
    """
    check_compression(length, stride)
    check_packing(x, cu_seqlens, x.shape[1])
    width = x.shape[-1]
    if x.dim() != 4 or gate.shape != (width, width) or position.shape != (length, width) or outer.shape[1] != width:
        raise ValueError(
            f"x (B, T, G, D) {tuple(x.shape)} goes with gate (D, D), position ({length}, D) and outer (Dv, D); got "
            f"{tuple(gate.shape)}, {tuple(position.shape)} and {tuple(outer.shape)}"
        )
    start = compression_layout(Documents.of(x.shape[1], 0, cu_seqlens, x.device), length, stride).start
    token = start.clamp(min=0)[:, None] + torch.arange(length, device=x.device)  # (M, l)
    gates = linear(x, gate.to(x.dtype))
    pooled = _pooled(gates[:, token], x[:, token], position)
    return linear(pooled, outer.to(x.dtype)) * (start >= 0)[:, None, None]


def _pooled(gates: Tensor, x: Tensor, position: Tensor) -> Tensor:
    """(..., l, G, D) both -> (..., G, D) in x's dtype."""
    wide = accumulation_dtype(x)
    weights = (gates.to(wide) + position.to(x.dtype).to(wide)[:, None]).softmax(-3)
    return (weights * x.to(wide)).sum(-3).to(x.dtype)


@torch.no_grad()
def extend_compressed(
    memories: Sequence[Tensor],
    rows: Sequence[Tensor],
    weights: tuple[Weights | Pooling, Weights | Pooling],
    compressed: tuple[Tensor, Tensor],
    cos: Tensor,
    sin: Tensor,
    index: Tensor,
    *,
    stride: int,
    backend: str = "auto",
) -> None:
    """`nsa.ops.decode.append_rows`, and the compressed block that ends with the newest token, if there is one.

    The host waits for nothing.

    Args:
        memories, rows, index: as for `append_rows`. The first two memories are the rings (B, l, G, D) of keys and of
            values, not rotated, with the last l tokens.
        weights: of the compression of keys, and of values.
        compressed: (B, M, G, D) and (B, M, G, Dv), contiguous for the kernel; block i goes to slot i. If the tokens are
            no block, the slot of the next block may be written to: there must be one.
        cos, sin: (1, D / 2) fp32 at the newest token, the last one of the block; the key is rotated by them.
        stride: tokens between the starts of two blocks.
        backend: auto, triton, torch or naive.
    """
    rings = memories[:2]
    dtype = rings[0].dtype
    cast = [type(ours)(*(w.to(dtype) for w in ours)) for ours in weights]
    fused = all(isinstance(ours, Weights) for ours in cast)
    if fused and resolve_backend(backend, *rings, *compressed) == "triton":
        from nsa.ops.kernels import inference_operators as operators

        inner, position, outer = ([ours[i] for ours in cast] for i in range(3))
        lists = list(memories), list(rows), inner, position, outer, list(compressed)
        operators.extend_compressed(*lists, cos, sin, index, stride)
        return
    append_rows(memories, rows, index, backend="torch" if fused else backend)
    length = rings[0].shape[1]
    order = (index + torch.arange(1, length + 1, device=index.device)) % length
    slot = ((index + 1 - length).clamp(min=0) + stride - 1) // stride
    for i, rotate in enumerate((True, False)):
        block = _one_block(rings[i].index_select(1, order), cast[i])[:, None]  # (B, 1, G, Dv)
        compressed[i].index_copy_(1, slot, apply_rotary(block, cos, sin, backend="torch") if rotate else block)


def _one_block(x: Tensor, weights: Weights | Pooling) -> Tensor:
    """The tokens of a block (B, l, G, D) -> (B, G, Dv)."""
    if isinstance(weights, Pooling):
        return linear(_pooled(linear(x, weights.gate), x, weights.position), weights.outer)
    flat = (x + weights.position[:, None]).transpose(1, 2).flatten(2)
    return linear(silu(linear(flat, weights.inner)), weights.outer)


def _naive(
    x: Tensor, inner: Tensor, position: Tensor, outer: Tensor, documents: Documents, length: int, stride: int
) -> Tensor:
    start = compression_layout(documents, length, stride).start
    token = start.clamp(min=0)[:, None] + torch.arange(length, device=x.device)
    dtype = accumulation_dtype(x)
    blocks = x.to(dtype)[:, token] + position.to(dtype)[:, None]  # (B, M, l, G, D)
    hidden = silu(blocks.transpose(2, 3).flatten(3) @ inner.to(dtype).T)
    return ((hidden @ outer.to(dtype).T) * (start >= 0)[:, None, None]).to(x.dtype)


def _portable(
    x: Tensor, inner: Tensor, position: Tensor, outer: Tensor, documents: Documents, length: int, stride: int
) -> Tensor:
    """Computes a block's product as the sum of its segments' products, so that each token is multiplied only once."""
    layout = compression_layout(documents, length, stride)
    whole = layout.segment_token[: x.shape[1] // stride]
    # Without packing all whole segments come first, in order; with packing short ones are in between.
    if len(documents.bounds) == 2:
        segments = x[:, : len(whole) * stride].unflatten(1, (len(whole), stride))
    else:
        token = layout.segment_token[:, None] + torch.arange(stride, device=x.device)
        segments = x[:, token.clamp(max=x.shape[1] - 1)]
    per_block = length // stride
    weight = inner.unflatten(1, (per_block, -1)).transpose(0, 1)  # (r, hidden, d * D)
    products = linear(segments.transpose(2, 3).flatten(3), weight.flatten(0, 1)).unflatten(-1, weight.shape[:2])
    total = linear(position.flatten(), inner)
    first = layout.block_segment.clamp(min=0)
    for r in range(per_block):
        total = total + products[:, first + r, :, r]
    out = linear(silu(total), outer)
    return out if len(documents.bounds) == 2 else out * (layout.start >= 0)[:, None, None]
