"""Native Sparse Attention: the gated sum of its three branches (arXiv 2502.11089, Eq. 5)."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from nsa.ops.compressed import compressed_attention, compressed_ranges
from nsa.ops.dense import check_window, dense_attention
from nsa.ops.dispatch import autocasts, check_attention, check_positions, resolve_backend, softmax_scale
from nsa.ops.geometry import Documents, clip_borders, window_ranges
from nsa.ops.selected import selected_attention
from nsa.ops.selection import check_selection, select_blocks

Choose = Callable[[Tensor, Tensor, Tensor], Tensor]


class Branches(NamedTuple):
    """Results of the branches: outputs (B, T, H, Dv) before the gates, the selected blocks (B, T, G, num_blocks), and
    ``lse`` (B, H, T) fp32 of the compressed scores."""

    compressed: Tensor
    selected: Tensor
    window: Tensor
    blocks: Tensor
    lse: Tensor


@autocasts("q", "kv_cmp", "kv_slc", "kv_win", "gates")
def native_sparse_attention(
    q: Tensor,
    kv_cmp: tuple[Tensor, Tensor],
    kv_slc: tuple[Tensor, Tensor] | Callable[[], tuple[Tensor, Tensor]],
    kv_win: tuple[Tensor, Tensor],
    gates: Tensor,
    *,
    length: int,
    stride: int,
    block_size: int,
    num_blocks: int,
    window: int,
    num_initial: int = 1,
    num_local: int = 2,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    offset: int = 0,
    choose: Choose | None = None,
    backend: str = "auto",
) -> Tensor:
    """Compressed, selected and sliding-window attention, weighted by gates and summed (NSA Eq. 5).

    Args:
        q: (B, T, H, D).
        kv_cmp: (k_cmp, v_cmp), the compressed blocks, as for `compressed_attention`.
        kv_slc, kv_win: (k (B, S, G, D), v (B, S, G, Dv)) of the selected and the window branch. The queries are the
            last T positions of each: S > T when decoding with a cache or for a chunk of a sequence. kv_win may have
            the last window + T - 1 positions only. kv_slc may be a function that returns the pair and is called after
            the selection, for keys and values that are still being gathered from other devices.
        gates: (B, T, H, 3) in [0, 1]: compressed, selected, window.
        length, stride, block_size, num_blocks, num_initial, num_local: as for `select_blocks`.
        window: number of keys that a query sees in the window branch.
        scale: factor of the scores in every branch; None: D ** -0.5.
        cu_seqlens: (N+1,) int32 boundaries of packed documents up to the last query, with B = 1; no branch attends
            across one.
        offset: position of the first query.
        choose: (q, k_cmp, lse) -> block indices (B, T, G, num_blocks) int32, called without gradient; None:
            `select_blocks` with the sizes above.
        backend: auto, triton, torch or naive.

    Returns:
        (B, T, H, Dv) in q's dtype.

    Raises:
        ValueError: inconsistent shapes or sizes, unknown backend.
    """
    if gates.shape != (*q.shape[:3], 3):
        raise ValueError(f"gates must be {(*q.shape[:3], 3)}, got {tuple(gates.shape)}")
    sizes = {"length": length, "stride": stride, "block_size": block_size, "num_blocks": num_blocks}
    sizes |= {"num_initial": num_initial, "num_local": num_local}
    if choose is None:
        options = {"scale": scale, "cu_seqlens": cu_seqlens, "offset": offset, "backend": backend}
        choose = partial(select_blocks, **sizes, **options)  # type: ignore[arg-type]
    there = () if callable(kv_slc) else kv_slc
    if resolve_backend(backend, q, *kv_cmp, *there, *kv_win) == "triton":
        scale = softmax_scale(scale, q.shape[3])
        check_selection(*sizes.values())
        return _fused(
            q, kv_cmp, kv_slc, kv_win, gates, choose, length, stride, block_size, window, cu_seqlens, offset, scale
        )
    results = branches(
        q, kv_cmp, kv_slc, kv_win, choose, length=length, stride=stride, block_size=block_size, window=window,
        scale=scale, cu_seqlens=cu_seqlens, offset=offset, backend=backend,
    )  # fmt: skip
    g = gates.to(q.dtype).unsqueeze(-1)
    return g[..., 0, :] * results.compressed + g[..., 1, :] * results.selected + g[..., 2, :] * results.window


def branches(
    q: Tensor,
    kv_cmp: tuple[Tensor, Tensor],
    kv_slc: tuple[Tensor, Tensor] | Callable[[], tuple[Tensor, Tensor]],
    kv_win: tuple[Tensor, Tensor],
    choose: Choose,
    *,
    length: int,
    stride: int,
    block_size: int,
    window: int,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    offset: int = 0,
    backend: str = "auto",
) -> Branches:
    """The branches of `native_sparse_attention`, computed by one operator each; arguments as there."""
    common = {"scale": scale, "cu_seqlens": cu_seqlens, "backend": backend}
    out_cmp, lse = compressed_attention(q, *kv_cmp, length=length, stride=stride, offset=offset, **common)  # type: ignore[arg-type]
    with torch.no_grad():
        blocks = choose(q, kv_cmp[0], lse)
    out_slc = selected_attention(q, *arrived(kv_slc), blocks, block_size=block_size, **common)  # type: ignore[arg-type]
    near = key_borders(cu_seqlens, offset + q.shape[1], kv_win[0])
    out_win = dense_attention(q, *kv_win, window=window, scale=scale, cu_seqlens=near, backend=backend)
    return Branches(out_cmp, out_slc, out_win, blocks, lse)


def arrived(kv: tuple[Tensor, Tensor] | Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The keys and values, or those that the function returns."""
    return kv() if callable(kv) else kv


def key_borders(cu_seqlens: Tensor | None, tokens: int, k: Tensor) -> Tensor | None:
    """Document boundaries among the positions of k (B, S, G, D), which are the last S of ``tokens``."""
    kept = k.shape[1]
    return cu_seqlens if cu_seqlens is None or kept >= tokens else clip_borders(cu_seqlens, tokens - kept, tokens)


def _fused(
    q: Tensor,
    kv_cmp: tuple[Tensor, Tensor],
    kv_slc: tuple[Tensor, Tensor] | Callable[[], tuple[Tensor, Tensor]],
    kv_win: tuple[Tensor, Tensor],
    gates: Tensor,
    choose: Choose,
    length: int,
    stride: int,
    block_size: int,
    window: int,
    cu_seqlens: Tensor | None,
    offset: int,
    scale: float,
) -> Tensor:
    """By kernels, with one backward pass for the three branches and without gated copies of the gradient."""
    from nsa.ops.kernels import operators

    near_borders = key_borders(cu_seqlens, offset + q.shape[1], kv_win[0])
    check_attention(q, *kv_cmp, cu_seqlens, offset)
    check_attention(q, *kv_win, near_borders)
    check_window(window)
    _, seen = compressed_ranges(q, kv_cmp[0], length, stride, cu_seqlens, offset)
    win = Documents.of(q.shape[1], check_positions(q, kv_win[0]), near_borders, q.device)
    near = window_ranges(win, window)

    def selected() -> tuple[Tensor, Tensor, Documents]:
        k, v = arrived(kv_slc)
        check_attention(q, k, v, cu_seqlens)
        return k, v, Documents.of(q.shape[1], check_positions(q, k), cu_seqlens, q.device)

    return operators.native_sparse_attention(
        q, kv_cmp, selected, kv_win, gates, choose, seen, near, block_size=block_size, scale=scale
    )
