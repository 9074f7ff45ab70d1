"""Attention of a decoded token to what a plan says, by the kernels of decoding."""

import torch
from torch import Tensor

from nsa import ops
from nsa.baselines.attention import kept
from nsa.baselines.plan import Part, Plan, View


def can_list(view: View, plan: Plan | None) -> bool:
    """Whether `attend_listed` computes this: one query per sequence, at the positions of the model."""
    parts = () if plan is None else plan.parts
    return view.q.shape[1] == 1 and all(part.query_at is None and part.key_at is None for part in parts)


def lists_of(keep: Tensor) -> tuple[Tensor, Tensor]:
    """The slots that are kept, of a mask (B, N, S), as lists (B, N, L); L is the length of the longest.

    Returns:
        order: int64; behind the end of a list other slots. pages: int32, -1 there: as `nsa.ops.decode_attention` takes
        them. The host waits for L.
    """
    order = keep.byte().argsort(dim=-1, descending=True, stable=True)[..., : int(keep.sum(-1).max())]
    return order, order.masked_fill(~keep.gather(-1, order), -1).int()


def attend_listed(view: View, plan: Plan | None, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """As `nsa.baselines.attention.attend`. It reads the keys of the lists alone; the host waits for their lengths."""
    row = torch.zeros(1, dtype=torch.int64, device=view.q.device)
    keep = kept(view, plan, row)[:, :, 0]  # (B, N, S)
    lengths = torch.full((len(keep),), keep.shape[2], dtype=torch.int32, device=keep.device)
    order, pages = lists_of(keep)
    weights = None if plan is None else _log_weights(view, plan.parts, keep)
    if weights is not None:
        weights = weights.gather(-1, order)
    out, lse = ops.decode_attention(
        view.q[:, 0], view.k, view.v, lengths, pages=pages, log_weights=weights, scale=view.scale, backend=backend
    )
    out = out.float()
    if plan is not None and plan.terms is not None:
        out, lse = _with_terms(view, plan, out, lse)
    if plan is not None and plan.blend is not None:
        share, value = plan.blend
        value = value if value.dim() == 3 else value[:, 0]
        out = share * out + (1 - share) * view.per_head(value.float())
    return out[:, None].to(view.q.dtype), lse[..., None]


def _log_weights(view: View, parts: tuple[Part, ...], keep: Tensor) -> Tensor | None:
    """(B, N, S) of the keys that are kept; None: all are 0."""
    if all(part.log_weight is None for part in parts):
        return None
    row = torch.zeros(1, dtype=torch.int64, device=keep.device)
    total = torch.zeros(keep.shape, device=keep.device)
    for part in parts:
        if part.log_weight is not None:
            mask = part.mask(row, keep.shape[2])[:, :, 0]
            weight = part.log_weight[:, :, 0].expand(-1, mask.shape[1], keep.shape[2])
            if keep.shape[1] != view.k.shape[2]:  # a list for each query head
                weight, mask = view.per_head(weight), view.per_head(mask)
            total = torch.where(mask, weight, total)
    return total


def _with_terms(view: View, plan: Plan, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Output (B, H, Dv) and LSE (B, H) of the tokens and the terms together."""
    assert plan.terms is not None
    scores = plan.terms.scores[:, :, 0]  # (B, H, N)
    whole = torch.logaddexp(lse, scores.logsumexp(-1))
    base = whole.masked_fill(whole == -torch.inf, 0)  # sees nothing
    terms = torch.einsum(
        "bgjn,bgnd->bgjd", view.per_group((scores - base[..., None]).exp()), plan.terms.values.float()
    ).flatten(1, 2)
    return out * (lse - base).exp()[..., None] + terms, whole
