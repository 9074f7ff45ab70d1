"""alpha-entmax attention (ASEntmax, arXiv 2506.16640) of an exported decoder. Sizes in the comments are those of
attention_nsa.py.

Weights are p = [(alpha - 1) z - tau]_+^(1 / (alpha - 1)) in the place of a softmax: most keys get exactly 0.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from .attention_nsa import DenseAttention, RotaryTables, all_before, query_chunks
from .cache_nsa import NSACache, Step, extend
from .configuration_nsa import NSAConfig


class Entmax(torch.autograd.Function):
    """p of scores z (..., S), of which -inf are masked. A row without keys gets 0."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, alpha: float) -> Tensor:
        top = z.amax(-1, keepdim=True)
        w, e = (z - top.masked_fill(top == -torch.inf, 0)) * (alpha - 1), 1 / (alpha - 1)
        t = torch.zeros_like(top)  # p = [1 + w - t]_+^e

        def power(exponent: float) -> Tensor:
            y = (w - t).clamp(min=-1)
            return (y > -1).to(w.dtype) if exponent == 0 else (y.log1p() * exponent).exp()

        for _ in range(100):  # Newton's method on the e-norm, which is convex in t: it takes 3 to 10 steps
            total, slope = power(e).sum(-1, keepdim=True), power(e - 1).sum(-1, keepdim=True)
            step = ((total - total ** (1 - 1 / e)) / slope.clamp(min=torch.finfo(w.dtype).tiny)).clamp(min=0)
            t = t + step
            if not (step > 4 * torch.finfo(w.dtype).eps).any():
                break
        u = power(e - 1)  # p^(2 - alpha)
        ctx.save_for_backward(u)
        return power(e)

    @staticmethod
    def backward(ctx: Any, dp: Tensor) -> tuple[Tensor, None]:
        (u,) = ctx.saved_tensors
        total = u.sum(-1, keepdim=True)
        return u * (dp - (u * dp).sum(-1, keepdim=True) / total.masked_fill(total == 0, 1)), None


class EntmaxAttention(DenseAttention):
    """Causal grouped-query attention; of the heads, the last ``entmax_nope_heads`` know no positions."""

    def __init__(self, config: NSAConfig, number: int):
        super().__init__(config, number)
        heads = config.num_attention_heads
        if config.entmax_scaling == "asentmax":
            self.beta = nn.Linear(config.hidden_size, heads, bias=False)
            self.gamma = nn.Linear(config.hidden_size, heads, bias=False)
        elif config.entmax_scaling == "ssmax":
            self.log_scale = nn.Linear(1, heads, bias=False)

    def forward(self, x: Tensor, rotary: RotaryTables, step: Step, cache: NSACache | None) -> Tensor:
        spans, c = None if cache is None else cache.layers[self.number], self.config
        heads, groups = c.num_attention_heads, c.num_key_value_heads
        placed = heads - c.entmax_nope_heads  # heads with positions
        q = self.query_norm(self.query(x).unflatten(-1, (heads, -1)))
        k = self.key_norm(self.key(x).unflatten(-1, (groups, -1)))
        if c.entmax_position == "rotary":
            q, k = (
                torch.cat((rotary.rotate(part[:, :, :first]), part[:, :, first:]), 2)
                for part, first in ((q, placed), (k, placed * groups // heads))
            )
        full = extend(spans, "full", k, self.value(x).unflatten(-1, (groups, -1)), step)
        if spans is not None:
            spans["full"] = full
        dtype = torch.promote_types(x.dtype, torch.float32)
        number = torch.arange(heads, device=x.device)
        factor = self.score_factor(x, step.slots, dtype)
        if c.entmax_nope_heads:  # it is of these heads alone
            factor = torch.where(number < placed, 1, factor)
        slopes = torch.where(number < placed, 1 / (number + 1), 0).to(dtype)
        masks, out = all_before(step), []
        with torch.autocast(x.device.type, enabled=False):
            q = (q.to(dtype) * factor[..., None] * c.head_dim**-0.5).unflatten(2, (groups, -1))
            for rows, _, stop in query_chunks(heads, step):
                seen = full.between(0, stop)
                z = torch.einsum("bcghd,bsgd->bghcs", q[:, rows], seen.keys.to(dtype))
                if c.entmax_position == "alibi":
                    distance = step.slots[:, rows, None] - torch.arange(stop, device=x.device)  # (B, c, S)
                    z = z - slopes.unflatten(0, (groups, -1))[None, :, :, None, None] * distance[:, None, None]
                p = Entmax.apply(z.masked_fill(~masks(rows, stop)[:, :, None], -torch.inf), c.entmax_alpha)
                out.append(torch.einsum("bghcs,bsge->bcghe", p, seen.values.to(dtype)).to(x.dtype))
        return self.output(torch.cat(out, 1).flatten(2))

    def score_factor(self, x: Tensor, slots: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, T, H) factors of the scores; slots count from 0 in each document."""
        log_n = (slots + 2).to(dtype).log()[..., None]
        if self.config.entmax_scaling == "asentmax":
            beta, gamma = softplus(self.beta(x).to(dtype)), 2 * self.gamma(x).to(dtype).tanh()
            return 1 + beta * (gamma * log_n.log()).exp()
        if self.config.entmax_scaling == "ssmax":
            return log_n * (1 + self.log_scale.weight.to(dtype)[:, 0])
        return torch.ones_like(log_n)
