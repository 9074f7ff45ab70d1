"""Entmax attention of the PyTorch fallback: a tile of queries at a time, in memory linear in the tokens."""

from typing import Any

import torch
from torch import Tensor

from nsa.ops.dispatch import differentiable_once
from nsa.ops.entmax.threshold import newton_threshold, power
from nsa.ops.geometry import Documents
from nsa.ops.tiles import Runs, Tile, add, grouped, keys_first, masked_scores, rows_by_keys, take


class TiledEntmax(torch.autograd.Function):
    """q (B, T, H, D), k (B, S, G, D), v (B, S, G, Dv) -> (B, T, H, Dv), all in the accumulation dtype.

    The forward pass keeps two numbers of each query and head: its largest score and its threshold. From these the
    backward pass computes the weights again.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, pattern: Runs, documents: Documents,
        scale: float, alpha: float,
    ) -> Tensor:  # fmt: skip
        ctx.pattern, ctx.documents, ctx.factor, ctx.alpha = pattern, documents, scale * (alpha - 1), alpha
        q_, k_, v_ = grouped(q, k.shape[2]) * ctx.factor, keys_first(k), keys_first(v)
        tops = q_.new_zeros(*q_.shape[:4], 1)
        thresholds, out = torch.zeros_like(tops), q_.new_zeros(*q_.shape[:4], v.shape[3])
        for tile in pattern.tiles(q.shape[1], k.shape[1], q.shape[0] * q.shape[2]):
            if not tile.mask.shape[-1]:
                continue
            rows = slice(tile.start, tile.stop)
            w = _scores(q_, k_, slopes, tile, documents, alpha)
            top = w.amax(-1, keepdim=True)
            tops[:, :, :, rows] = top.masked_fill_(top == -torch.inf, 0)  # of a query that sees no key
            thresholds[:, :, :, rows] = t = newton_threshold(w.sub_(top), alpha)
            out[:, :, :, rows] = rows_by_keys(power(w, t, 1 / (alpha - 1)), take(v_, tile.keys))
        ctx.save_for_backward(q, k, v, slopes, tops, thresholds)
        return out.permute(0, 3, 1, 2, 4).flatten(2, 3)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, d_result: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, slopes, tops, thresholds = ctx.saved_tensors
        e = 1 / (ctx.alpha - 1)
        q_, k_, v_ = grouped(q, k.shape[2]) * ctx.factor, keys_first(k), keys_first(v)
        d_out = grouped(d_result, k.shape[2])
        dq, dk, dv = torch.zeros_like(q_), torch.zeros_like(k_), torch.zeros_like(v_)
        for tile in ctx.pattern.tiles(q.shape[1], k.shape[1], q.shape[0] * q.shape[2]):
            if not tile.mask.shape[-1]:
                continue
            rows = slice(tile.start, tile.stop)
            q_tile, d_tile = q_[:, :, :, rows], d_out[:, :, :, rows]
            k_tile, v_tile = take(k_, tile.keys), take(v_, tile.keys)
            w = _scores(q_, k_, slopes, tile, ctx.documents, ctx.alpha).sub_(tops[:, :, :, rows])
            t = thresholds[:, :, :, rows]
            add(dv, tile.keys, power(w, t, e).flatten(2, 3).mT @ d_tile.flatten(2, 3))
            # dz = u (dp - <u, dp> / sum u), with u = p^(2 - alpha).
            u = power(w, t, e - 1)
            dp = rows_by_keys(d_tile, v_tile.mT)
            total = u.sum(-1, keepdim=True)
            mean = (u * dp).sum(-1, keepdim=True) / total.masked_fill_(total == 0, 1)
            d_scores = dp.sub_(mean).mul_(u)
            dq[:, :, :, rows] = rows_by_keys(d_scores, k_tile)
            add(dk, tile.keys, d_scores.flatten(2, 3).mT @ q_tile.flatten(2, 3))
        unscaled = ctx.factor / (ctx.alpha - 1)
        dq = (dq * unscaled).permute(0, 3, 1, 2, 4).flatten(2, 3)
        dk = (dk / (ctx.alpha - 1)).transpose(1, 2)
        return dq, dk, dv.transpose(1, 2), None, None, None, None, None


def _scores(q: Tensor, k: Tensor, slopes: Tensor | None, tile: Tile, documents: Documents, alpha: float) -> Tensor:
    """(B, G, h, t, U): (alpha - 1) times the scores of a tile; -inf where the query does not see the key."""
    assert isinstance(tile.keys, slice)
    rows = slice(tile.start, tile.stop)
    scores = masked_scores(q[:, :, :, rows], take(k, tile.keys), tile.mask)
    if slopes is not None:
        key = torch.arange(tile.keys.start, tile.keys.stop, device=q.device)
        distance = (documents.query_position[rows, None] - key).to(q.dtype)
        scores.addcmul_(slopes.unflatten(0, (k.shape[1], -1))[..., None, None], distance, value=1 - alpha)
    return scores
