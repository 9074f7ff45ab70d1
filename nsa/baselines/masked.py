"""Attention of a prompt to a plan of any shape, by torch's scaled_dot_product_attention with a mask.

The portable path computes the scores of all pairs in fp32 and passes over them some twenty times. Here scores and
weights have the precision of the library: on a GPU sums in fp32 of products in the dtype of the model.
"""

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from nsa.baselines.attention import kept, moved
from nsa.baselines.plan import Plan, View, row_blocks

BACKENDS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]  # the others take no mask, or not everywhere
PAIRS = 2**28  # of a mask of all query heads: that many bytes, twice in the dtype of the model


def can_mask(view: View, plan: Plan | None) -> bool:
    """Whether `attend_masked` computes this: a softmax over keys alone, which have one position for all queries."""
    if not view.prompt or not view.q.dtype == view.k.dtype == view.v.dtype:
        return False
    if plan is None:
        return True
    if plan.terms is not None or plan.blend is not None:
        return False
    elsewhere = any(p.query_at is not None or p.key_at is not None for p in plan.parts)
    return not any(p.log_weight is not None for p in plan.parts) and (not elsewhere or len(plan.parts) == 1)


def attend_masked(view: View, plan: Plan | None) -> Tensor:
    """The output of `nsa.baselines.attention.attend`, where `can_mask`: (B, T, H, Dv) in q's dtype."""
    q, k = (view.q, view.k) if plan is None else moved(view, plan.parts[0])
    keys, values = (view.per_head(x.transpose(1, 2)) for x in (k, view.v))  # (B, H, S, D), (B, H, S, Dv)
    outs = []
    for rows in row_blocks(view, PAIRS):
        mask = view.per_head(kept(view, plan, rows))  # (B, H, T, S)
        nothing = ~mask.any(-1, keepdim=True)  # such as padding: a softmax over nothing is NaN in some versions
        with sdpa_kernel(BACKENDS):
            out = scaled_dot_product_attention(
                q[:, rows].transpose(1, 2), keys, values, attn_mask=mask | nothing, scale=view.scale
            )
        outs.append(out.masked_fill_(nothing, 0).transpose(1, 2))
    return torch.cat(outs, 1).to(view.q.dtype)  # autocast may have another
