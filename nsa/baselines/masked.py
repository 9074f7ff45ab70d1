"""Attention of a prompt to a plan of any shape, by `nsa.ops.masked_attention`.

The portable path computes the scores of all pairs in fp32 and passes over them some twenty times. Here scores and
weights have the precision of the operator: on a GPU sums in fp32 of products in the dtype of the model.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from nsa import ops
from nsa.baselines.attention import kept, moved
from nsa.baselines.plan import Plan, View, of_few_heads, of_one_head, row_blocks

PAIRS = 2**28  # of a mask of all query heads: that many bytes


def can_mask(view: View, plan: Plan | None) -> bool:
    """Whether `attend_masked` computes this: a softmax over keys alone, all of weight 1."""
    if not view.prompt or not view.q.dtype == view.k.dtype == view.v.dtype:
        return False
    if plan is None:
        return True
    return plan.terms is None and plan.blend is None and all(part.log_weight is None for part in plan.parts)


def attend_masked(view: View, plan: Plan | None) -> Tensor:
    """The output of `nsa.baselines.attention.attend`, where `can_mask`: (B, T, H, Dv) in q's dtype."""
    if plan is None and view.whole:
        return ops.dense_attention(view.q, view.k, view.v, scale=view.scale).to(view.q.dtype)
    mask = _mask_of(view, plan)
    seeing, plan = of_few_heads(view, plan)
    pieces = [plan] if plan is None else _pieces(plan)
    placed = [(view.q, view.k) if piece is None else moved(view, piece.parts[0]) for piece in pieces]
    outs, begin, before = [], 0, view.k.shape[1] - view.q.shape[1]
    for rows in row_blocks(view, PAIRS):
        end = begin + len(rows)
        seen = slice(before + end)  # slots are in the order of positions: those after it come after these queries
        masks = [mask[:, :, begin:end]] if mask is not None else _disjoint(seeing, pieces, rows)
        outs.append(
            _softmax_over(
                [
                    (q[:, begin:end], k[:, seen], view.v[:, seen], here[..., seen])
                    for (q, k), here in zip(placed, masks, strict=True)
                ],
                view.scale,
            )
        )
        begin = end
    return torch.cat(outs, 1).to(view.q.dtype)  # autocast may have another


def _pieces(plan: Plan) -> list[Plan]:
    """The parts at the positions of the model together, each other one alone."""
    plain = [part.query_at is None and part.key_at is None for part in plan.parts]
    together = tuple(part for part, here in zip(plan.parts, plain, strict=True) if here)
    alone = [Plan((part,)) for part, here in zip(plan.parts, plain, strict=True) if not here]
    return [Plan(together), *alone] if together else alone


def _disjoint(view: View, pieces: Sequence[Plan | None], rows: Tensor) -> list[Tensor]:
    """What the queries ``rows`` attend to in each piece, as `kept`, without the keys of the pieces before it."""
    masks: list[Tensor] = []
    for piece in pieces:
        mask = kept(view, piece, rows)
        for other in masks:
            if other.shape[1] != mask.shape[1]:
                mask, other = view.per_head(mask), view.per_head(other)
            mask = mask & ~other
        masks.append(mask)
    return masks


def _softmax_over(given: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]], scale: float) -> Tensor:
    """(B, T, H, Dv): one softmax over disjoint sets of keys; q, k, v and mask of each, as `ops.masked_attention`."""
    if len(given) == 1:
        return ops.masked_attention(*given[0], scale=scale)
    found = [ops.masked_attention(*one, scale=scale, return_lse=True) for one in given]
    lse = torch.stack([one for _, one in found])  # (pieces, B, H, T)
    weights = lse.softmax(0).nan_to_num(0)  # NaN: sees nothing
    return torch.stack([w.transpose(1, 2)[..., None] * out for w, (out, _) in zip(weights, found, strict=True)]).sum(0)


def _mask_of(view: View, plan: Plan | None) -> Tensor | None:
    """(B, N, T, S) bool, without a look at which keys are visible: a plan that says it for each query of a prompt."""
    if plan is None or len(plan.parts) > 1 or not view.whole:
        return None
    keep = plan.parts[0].keep
    if keep.shape[2:] != (view.q.shape[1], view.k.shape[1]):
        return None
    return of_one_head(keep)
