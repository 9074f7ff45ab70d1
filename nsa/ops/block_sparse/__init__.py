"""Attention of a prompt to lists of blocks, one list for each tile of queries, and to single columns beside them."""

from typing import Literal, overload

import torch
from torch import Tensor

from nsa.ops.dispatch import autocasts, check_attention, check_positions, resolve_backend, softmax_scale
from nsa.ops.naive import masked_attention


@overload
def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, counts: Tensor, *, tile_size: int, block_size: int,
    columns: Tensor | None = None, scale: float | None = None, return_lse: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...  # fmt: skip


@overload
def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, counts: Tensor, *, tile_size: int, block_size: int,
    columns: Tensor | None = None, scale: float | None = None, return_lse: Literal[True], backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@torch.no_grad()
@autocasts("q", "k", "v")
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    counts: Tensor,
    *,
    tile_size: int,
    block_size: int,
    columns: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Each tile of queries attends to the tokens of its listed blocks and to the columns, at or before each query.

    This is what MInference (arXiv 2407.02490) computes of a prompt: its block-sparse pattern is lists of blocks, its
    vertical-slash pattern is the blocks that chosen diagonals cross, and columns. The softmax is one over both; a key
    in a listed block and in a column counts once. For inference: not differentiable, and no value is read by the host.

    Args:
        q: (B, T, H, D). k: (B, S, G, D). v: (B, S, G, Dv); G divides H. With S > T the queries are the last T of the S
            positions.
        blocks: (B, N, R, L) int32, with R = ceil(T / tile_size). The first ``counts`` numbers of a row are the blocks
            of queries ``tile_size * r .. tile_size * (r + 1) - 1``, ascending, each once, none after the block of the
            last of them; what follows is not read. Block j has keys ``block_size * j .. block_size * (j + 1) - 1``. N
            is G (all heads of a KV head share the lists) or H.
        counts: (B, N, R) int32.
        tile_size, block_size: queries, keys.
        columns: (B, N, C) int32 positions of keys, ascending, each once; -1 fills the end. All queries at or after
            such a key attend to it. None: no columns.
        scale: factor of the scores; None: D ** -0.5.
        return_lse: also return the log-sum-exp of the scores.
        backend: auto, triton, torch or naive.

    Returns:
        out (B, T, H, Dv) in q's dtype; with return_lse also lse (B, H, T) fp32 (float64 for float64). A query that sees
        nothing gives 0 and -inf.

    Raises:
        ValueError: inconsistent shapes or dtypes, unknown backend.
    """
    check_attention(q, k, v, None)
    offset = check_positions(q, k)
    if tile_size < 1 or block_size < 1:
        raise ValueError(f"tile_size and block_size must be positive, got {tile_size} and {block_size}")
    _check_lists(q, k, blocks, counts, columns, -(-q.shape[1] // tile_size))
    scale = softmax_scale(scale, q.shape[3])
    implementation = resolve_backend(backend, q, k, v)
    if implementation == "triton":
        from nsa.ops.kernels import inference_operators as operators

        out, lse = operators.block_sparse_attention(q, k, v, blocks, counts, columns, tile_size, block_size, scale)
    elif implementation == "naive":
        rows = torch.arange(q.shape[1], device=q.device)
        mask = _mask(k.shape[1], offset, rows, blocks, counts, columns, tile_size, block_size)
        if mask.shape[1] != k.shape[2]:  # each query head has its own
            k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
        out, lse = masked_attention(q, k, v, mask, scale)
    else:
        out, lse = _by_tiles(q, k, v, offset, blocks, counts, columns, tile_size, block_size, scale)
    return (out, lse) if return_lse else out


def _check_lists(q: Tensor, k: Tensor, blocks: Tensor, counts: Tensor, columns: Tensor | None, rows: int) -> None:
    if blocks.dim() != 4 or len(blocks) != len(q) or blocks.shape[1] not in (k.shape[2], q.shape[2]):
        raise ValueError(
            f"blocks must be ({len(q)}, {k.shape[2]} or {q.shape[2]}, {rows}, number), got {tuple(blocks.shape)}"
        )
    if blocks.shape[2] != rows:
        raise ValueError(f"blocks must have {rows} rows, one for each tile of queries, got {blocks.shape[2]}")
    if counts.shape != blocks.shape[:3]:
        raise ValueError(f"counts must be {tuple(blocks.shape[:3])}, got {tuple(counts.shape)}")
    if columns is not None and (columns.dim() != 3 or columns.shape[:2] != blocks.shape[:2]):
        raise ValueError(f"columns must be {(*blocks.shape[:2], 'number')}, got {tuple(columns.shape)}")
    for name, x in (("blocks", blocks), ("counts", counts), ("columns", columns)):
        if x is not None and x.dtype != torch.int32:
            raise ValueError(f"{name} must be int32, got {x.dtype}")


def _mask(
    num_keys: int,
    offset: int,
    rows: Tensor,
    blocks: Tensor,
    counts: Tensor,
    columns: Tensor | None,
    tile_size: int,
    block_size: int,
) -> Tensor:
    """(B, N, len(rows), S) bool: the keys that queries ``rows`` (int64 numbers in the call) attend to."""
    here = blocks[:, :, rows // tile_size]  # (B, N, len(rows), L)
    listed = torch.arange(blocks.shape[3], device=rows.device) < counts[:, :, rows // tile_size][..., None]
    number = -(-num_keys // block_size)
    keep = torch.zeros(*here.shape[:3], number + 1, dtype=torch.bool, device=rows.device)
    keep.scatter_(3, torch.where(listed, here, number).long(), True)
    mask = keep[..., :number].repeat_interleave(block_size, 3)[..., :num_keys]
    if columns is not None:
        on = torch.zeros(*columns.shape[:2], num_keys + 1, dtype=torch.bool, device=rows.device)
        on.scatter_(2, columns.masked_fill((columns < 0) | (columns > num_keys), num_keys).long(), True)
        mask = mask | on[:, :, None, :num_keys]
    return mask & (torch.arange(num_keys, device=rows.device) <= (offset + rows)[:, None])


def _by_tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offset: int,
    blocks: Tensor,
    counts: Tensor,
    columns: Tensor | None,
    tile_size: int,
    block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """One tile of queries after the other, with the keys that it may see: memory is linear in the tokens."""
    outs, sums = [q.new_empty(len(q), 0, q.shape[2], v.shape[3])], []
    for rows in torch.arange(q.shape[1], device=q.device).split(tile_size):
        seen = min(k.shape[1], offset + int(rows[-1]) + 1)
        mask = _mask(seen, offset, rows, blocks, counts, columns, tile_size, block_size)
        keys, values = k[:, :seen], v[:, :seen]
        if mask.shape[1] != k.shape[2]:
            keys, values = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (keys, values))
        out, lse = masked_attention(q[:, rows], keys, values, mask, scale)
        outs.append(out)
        sums.append(lse)
    empty = q.new_empty(len(q), q.shape[2], 0, dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    return torch.cat(outs, 1), torch.cat([empty, *sums], 2)
