"""Native Sparse Attention of one new token per sequence, on caches of fixed memory (arXiv 2502.11089, Eq. 5)."""

import torch
from torch import Tensor

from nsa.ops.decode import check, check_contiguous, decode_attention
from nsa.ops.dispatch import accumulation_dtype, autocasts, resolve_backend, softmax_scale
from nsa.ops.geometry import num_compressed
from nsa.ops.native_sparse import native_sparse_attention
from nsa.ops.selection import check_selection, overlap_weights, pick_blocks

Pair = tuple[Tensor, Tensor]


@torch.no_grad()
@autocasts("q", "kv_cmp", "kv_slc", "kv_win", "gates")
def native_sparse_decode(
    q: Tensor,
    kv_cmp: Pair,
    kv_slc: Pair,
    kv_win: Pair,
    gates: Tensor,
    lengths: Tensor,
    *,
    length: int,
    stride: int,
    block_size: int,
    num_blocks: int,
    num_initial: int = 1,
    num_local: int = 2,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """`native_sparse_attention` of the last token of each sequence, without a wait for the host.

    Shapes alone decide what is launched, so a CUDA graph can capture the call (`backend="naive"` reads the lengths).
    Not differentiable.

    Args:
        q: (B, H, D), the new token of each sequence.
        kv_cmp: (B, M, G, D) and (B, M, G, Dv): memory of the compressed blocks, those of the new token included.
        kv_slc: (B, S, G, D) and (B, S, G, Dv): memory of the selected branch; M must suffice for S tokens.
        kv_win: (B, W, G, D) and (B, W, G, Dv): the last W tokens, token t in slot t mod W. W is the window.
        gates: (B, H, 3) in [0, 1]: compressed, selected, window.
        lengths: (B,) int32, tokens of each sequence, the new one included.
        length, stride, block_size, num_blocks, num_initial, num_local: as for `select_blocks`.
        scale: factor of the scores in every branch; None: D ** -0.5.
        backend: auto, triton, torch or naive.

    Returns:
        (B, H, Dv) in q's dtype. A sequence without tokens gives 0.

    Raises:
        ValueError: inconsistent shapes or sizes, memory that is not contiguous (for the kernels), unknown backend, the
            backend naive within a capture.
    """
    for kv in (kv_cmp, kv_slc, kv_win):
        check(q, *kv, lengths)
    if len({(kv[0].shape[2:], kv[1].shape[2:]) for kv in (kv_cmp, kv_slc, kv_win)}) > 1:
        raise ValueError("the branches must share the heads and widths of keys and values")
    if gates.shape != (*q.shape[:2], 3):
        raise ValueError(f"gates must be {(*q.shape[:2], 3)}, got {tuple(gates.shape)}")
    check_selection(length, stride, block_size, num_blocks, num_initial, num_local)
    if kv_win[0].shape[1] < 1:
        raise ValueError("the window must have at least 1 slot (the new token's own)")
    if kv_cmp[0].shape[1] < (needed := num_compressed(kv_slc[0].shape[1], length, stride)):
        raise ValueError(
            f"{kv_slc[0].shape[1]} tokens have {needed} blocks of {length} at {stride}: the compressed memory has room "
            f"for {kv_cmp[0].shape[1]}"
        )
    scale = softmax_scale(scale, q.shape[2])
    sizes = {"length": length, "stride": stride, "block_size": block_size, "num_blocks": num_blocks}
    sizes |= {"num_initial": num_initial, "num_local": num_local}
    implementation = resolve_backend(backend, q, *kv_cmp, *kv_slc, *kv_win)
    if implementation == "naive":
        return _naive(q, kv_cmp, kv_slc, kv_win, gates, lengths, sizes, scale)
    if implementation == "triton":
        from nsa.ops.kernels import inference_operators as operators

        check_contiguous(k_cmp=kv_cmp[0], v_cmp=kv_cmp[1], k_slc=kv_slc[0], v_slc=kv_slc[1], k_win=kv_win[0],
                         v_win=kv_win[1])  # fmt: skip
        return operators.native_sparse_decode(q, [*kv_cmp, *kv_slc, *kv_win], gates, lengths, *sizes.values(), scale)
    common = {"scale": scale, "backend": "torch"}
    seen = torch.where(lengths >= length, (lengths - length) // stride + 1, 0).int()
    out_cmp, lse = decode_attention(q, *kv_cmp, seen, **common)  # type: ignore[arg-type]
    blocks = _blocks(q, kv_cmp[0], lse, seen, lengths, kv_slc[0].shape[1], sizes, scale)
    out_slc, _ = decode_attention(q, *kv_slc, lengths, pages=blocks, page_size=block_size, **common)  # type: ignore[arg-type]
    out_win, _ = decode_attention(q, *kv_win, lengths.clamp(max=kv_win[0].shape[1]), **common)  # type: ignore[arg-type]
    g = gates.to(q.dtype).unsqueeze(-1)
    return g[:, :, 0] * out_cmp + g[:, :, 1] * out_slc + g[:, :, 2] * out_win


def _naive(
    q: Tensor,
    kv_cmp: Pair,
    kv_slc: Pair,
    kv_win: Pair,
    gates: Tensor,
    lengths: Tensor,
    sizes: dict[str, int],
    scale: float,
) -> Tensor:
    """`native_sparse_attention` of each sequence alone, on what is there of its memory, in order."""
    if lengths.is_cuda and torch.cuda.is_current_stream_capturing():
        raise ValueError("backend='naive' reads the lengths, which no CUDA graph can capture: use another one")
    window, found = kv_win[0].shape[1], []
    for row, tokens in enumerate(lengths.tolist()):
        if tokens == 0:
            found.append(torch.zeros_like(q[:1, :, :1].expand(-1, -1, kv_slc[1].shape[3])))
            continue
        blocks = num_compressed(tokens, sizes["length"], sizes["stride"])
        slot = torch.arange(max(0, tokens - window), tokens, device=q.device) % window
        out = native_sparse_attention(
            q[row, None, None],
            (kv_cmp[0][row, None, :blocks], kv_cmp[1][row, None, :blocks]),
            (kv_slc[0][row, None, :tokens], kv_slc[1][row, None, :tokens]),
            (kv_win[0][row, None, slot], kv_win[1][row, None, slot]),
            gates[row, None, None],
            **sizes,  # type: ignore[arg-type]
            window=window,
            scale=scale,
            offset=tokens - 1,
            backend="naive",
        )
        found.append(out[:, 0])
    return torch.cat(found)


def _blocks(
    q: Tensor, k: Tensor, lse: Tensor, seen: Tensor, lengths: Tensor, tokens: int, sizes: dict[str, int], scale: float
) -> Tensor:
    """(B, G, n) int32, as `select_blocks`; ``seen``: (B,) compressed blocks that are there."""
    dtype, (length, stride, block_size, *chosen) = accumulation_dtype(q), sizes.values()
    absent = torch.arange(k.shape[1], device=q.device) >= seen[:, None]
    keys = k.to(dtype).masked_fill(absent[..., None, None], 0).transpose(1, 2)
    scores = q.to(dtype).unflatten(1, (k.shape[2], -1)) @ keys.mT * scale  # (B, G, h, M)
    lse = lse.masked_fill(lse == -torch.inf, 0).unflatten(1, (k.shape[2], -1))[..., None]
    p = (scores - lse).exp().sum(2).masked_fill(absent[:, None], 0)
    # Selection block j sums over the compressed blocks from j * per_block - lead on.
    weights, per_block, lead = overlap_weights(length, stride, block_size, p), block_size // stride, length // stride
    have = -(-tokens // block_size)
    room = have * per_block + len(weights)
    p = torch.nn.functional.pad(p, (lead - 1, room))[..., :room]
    importance = (p.unfold(-1, len(weights), per_block)[..., :have, :] * weights).sum(-1)  # (B, G, have)
    # The sequences stand in the place of queries.
    importance = importance.transpose(0, 1)[None]
    picked = pick_blocks(importance, lengths.long() - 1, block_size, *chosen)[0]
    return picked.masked_fill((lengths == 0)[:, None, None], -1)
