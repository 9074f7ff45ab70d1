"""The threshold of alpha-entmax (arXiv 1905.05702): by sorting, by bisection, and by Newton's method.

With w = (alpha - 1) (z - max z) and e = 1 / (alpha - 1), the weights are p = [1 + w - t]_+^e, where t in [0, 1) is such
that they sum to 1. Since w is at most 0 and t at least 0, keys with w <= -1 never have a weight.
"""

import torch
from torch import Tensor

HALVINGS = 60  # of an interval of at most 1
STEPS = 100  # at most; Newton's method takes 3 to 10


def check_alpha(alpha: float) -> None:
    """Raise ValueError unless 1 < alpha <= 2."""
    if not 1 < alpha <= 2:
        raise ValueError(
            f"alpha must be above 1 and at most 2, got {alpha}: 1 is softmax (dense attention), and beyond 2 (which is "
            "sparsemax) the gradient has no bound"
        )


def centred(scores: Tensor, alpha: float) -> Tensor:
    """w of scores z (..., n); -inf where z is, all of a row included."""
    top = scores.amax(-1, keepdim=True) if scores.shape[-1] else scores.new_zeros(*scores.shape[:-1], 1)
    return (scores - top.masked_fill(top == -torch.inf, 0)) * (alpha - 1)


def power(w: Tensor, t: Tensor, exponent: float) -> Tensor:
    """[1 + w - t]_+^exponent; for exponent 0: 1 within the support. log1p keeps the digits if alpha is near 1."""
    y = w - t
    if exponent == 0:
        return (y > -1).to(w.dtype)
    if exponent in (1, 2):
        y = y.add_(1).clamp_(min=0)
        return y if exponent == 1 else y.square_()
    return y.clamp_(min=-1).log1p_().mul_(exponent).exp_()


def sorted_threshold(w: Tensor, alpha: float) -> Tensor:
    """t (..., 1) for alpha 1.5 or 2, exact: the k largest keys are the support of the largest k that agrees."""
    x = w.clamp(min=-2).sort(dim=-1, descending=True).values  # those below -1 have no weight anyway
    count = torch.arange(1, x.shape[-1] + 1, dtype=w.dtype, device=w.device)
    mean = x.cumsum(-1) / count
    if alpha == 2:  # sum of x - tau over the support is 1
        tau = mean - 1 / count
        size = (x > tau).sum(-1, keepdim=True)
    else:  # sum of (x - tau)^2 is 1
        spread = x.square().cumsum(-1) - count * mean.square()
        tau = mean - ((1 - spread).clamp(min=0) / count).sqrt()
        size = (x >= tau).sum(-1, keepdim=True)
    return tau.gather(-1, size.clamp(min=1) - 1) + 1


def bisected_threshold(w: Tensor, alpha: float) -> Tensor:
    """t (..., 1) for any alpha: n equal keys have t = 1 - n^(1 - alpha), and no others a larger one."""
    low = w.new_zeros(*w.shape[:-1], 1)
    high = torch.full_like(low, 1 - w.shape[-1] ** (1 - alpha))
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        more = power(w, middle, 1 / (alpha - 1)).sum(-1, keepdim=True) >= 1
        low, high = torch.where(more, middle, low), torch.where(more, high, middle)
    return low


def newton_threshold(w: Tensor, alpha: float) -> Tensor:
    """t (..., 1) by Newton's method on the e-norm of [1 + w - t]_+, which is 1 at t.

    The norm is convex in t, and at t = 0 at least 1. So the steps go up and never pass the solution. For equal keys the
    first step is the solution. A row without keys gets 0.
    """
    e = 1 / (alpha - 1)
    t = w.new_zeros(*w.shape[:-1], 1)
    least = torch.finfo(w.dtype)
    for _ in range(STEPS):
        if alpha == 1.5:
            y = power(w, t, 1)
            norm, slope = torch.linalg.vector_norm(y, dim=-1, keepdim=True), y.sum(-1, keepdim=True)
            step = (norm - 1) * norm / slope.clamp_(min=least.tiny)
        else:
            total, slope = (power(w, t, x).sum(-1, keepdim=True) for x in (e, e - 1))
            step = (total - total ** (1 - 1 / e)) / slope.clamp_(min=least.tiny)
        t += step.clamp_(min=0)  # rounding
        if step.is_meta or not (step > 4 * least.eps).any():  # the meta device has no values to look at
            break
    return t
