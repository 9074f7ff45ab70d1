"""Attention to what a plan says, in portable torch: the meaning of a plan, which kernels are compared with."""

import torch
from torch import Tensor

from nsa.baselines.plan import Part, Plan, View, of_one_head, row_blocks, score


def attend(view: View, plan: Plan | None) -> tuple[Tensor, Tensor]:
    """The attention of the queries to what ``plan`` keeps; None: to all they see.

    Returns:
        out (B, T, H, Dv) in q's dtype; lse (B, H, T) fp32, of the scores that were attended to. A query that sees
        nothing, such as padding, gives 0 and -inf.
    """
    outs, sums = zip(*(_rows(view, plan, rows) for rows in row_blocks(view)), strict=True)
    return torch.cat(outs, 1).to(view.q.dtype), torch.cat(sums, 2)


def kept(view: View, plan: Plan | None, rows: Tensor) -> Tensor:
    """(B, N, len(rows), S) bool: the keys that the queries ``rows`` attend to; N is G or H."""
    visible = view.visible_to(rows)
    if plan is None:
        return visible
    found: Tensor | None = None
    for part in plan.parts:
        mask = part.mask(rows, view.k.shape[1])
        mask = mask & (visible if mask.shape[1] == visible.shape[1] else view.per_head(visible))
        if found is not None and found.shape[1] != mask.shape[1]:
            found, mask = view.per_head(found), view.per_head(mask)
        found = mask if found is None else found | mask
    assert found is not None
    return found


def is_dense(view: View, plan: Plan | None) -> bool:
    """Whether each query attends to all tokens up to its own, whose weights are theirs: nothing was evicted, either.

    A plan that leaves out padding is none.
    """
    if plan is not None:
        plain = all(p.query_at is None and p.key_at is None and p.log_weight is None for p in plan.parts)
        if len(plan.parts) != 1 or not plain or plan.terms is not None or plan.blend is not None:
            return False
        keep = of_one_head(plan.parts[0].keep)
        if not keep[:, :, -1:].all() or not keep.all():  # the last row tells of most plans, without a pass over all
            return False
    return bool(((view.positions >= 0).sum(1) == view.seen[:, None]).all())


def plan_scores(view: View, plan: Plan, rows: Tensor) -> Tensor:
    """(B, H, len(rows), S) fp32: scores of the keys that the queries ``rows`` attend to, -inf for the others."""
    shape = len(view.q), view.q.shape[2], len(rows), view.k.shape[1]
    scores = torch.full(shape, -torch.inf, device=view.q.device)
    for part in plan.parts:
        mask = view.per_head(part.mask(rows, view.k.shape[1])) & view.per_head(view.visible_to(rows))
        scores = torch.where(mask, _scores_of(view, part, rows), scores)
    return scores


def _rows(view: View, plan: Plan | None, rows: Tensor) -> tuple[Tensor, Tensor]:
    scores = view.scores(rows) if plan is None else plan_scores(view, plan, rows)
    values = view.v
    terms = None if plan is None else plan.terms
    if terms is not None:
        scores = torch.cat([scores, terms.scores[:, :, rows]], -1)
        values = torch.cat([values, terms.values.transpose(1, 2).to(values.dtype)], 1)
    lse = scores.logsumexp(-1)
    weights = torch.nan_to_num((scores - lse[..., None]).exp(), nan=0.0)  # -inf - -inf: sees nothing
    out = torch.einsum("bgjts,bsgd->btgjd", view.per_group(weights), values.float()).flatten(2, 3)
    if plan is not None and plan.blend is not None:
        share, value = plan.blend
        share = share[:, :, rows].transpose(1, 2)[..., None]
        value = value[:, None] if value.dim() == 3 else value[:, rows]
        out = share * out + (1 - share) * view.per_head(value.float().transpose(1, 2)).transpose(1, 2)
    return out, lse


def moved(view: View, part: Part, rows: Tensor | slice = slice(None)) -> tuple[Tensor, Tensor]:
    """The queries ``rows`` and all keys, rotated to the positions that ``part`` gives them.

    Raises:
        ValueError: it gives them some, and the model cannot be turned.
    """
    q, k = view.q[:, rows], view.k
    if part.query_at is not None or part.key_at is not None:
        if view.turn is None:
            raise ValueError("this method moves keys to other positions: the model must have a rotary embedding")
        if part.query_at is not None:
            q = view.turn(q, (part.query_at - view.query_positions)[:, rows])
        if part.key_at is not None:
            k = view.turn(k, part.key_at - view.positions)
    return q, k


def _scores_of(view: View, part: Part, rows: Tensor) -> Tensor:
    scores = score(*moved(view, part, rows), view.scale)
    if part.log_weight is not None:
        weight = part.log_weight[:, :, rows] if part.log_weight.shape[2] > 1 else part.log_weight
        scores = scores + (view.per_head(weight) if weight.shape[1] > 1 else weight)
    return scores
