"""The loss of each token from hidden states: a linear layer over the vocabulary, fused with the cross-entropy."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from nsa.ops.dispatch import accumulation_dtype, autocasts, differentiable_once, resolve_backend

IGNORED = -100
KEPT_LOGITS = 2**30  # up to so many logits are kept for the backward pass (2 GiB in bf16); more are recomputed
CHUNK_LOGITS = 2**28  # logits of one chunk if they are recomputed


@autocasts("hidden", "weight")
def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, backend: str = "auto") -> Tensor:
    """Negative log-likelihood of each target under softmax(weight @ hidden).

    The logits are stored in hidden's dtype; sums and the loss are fp32. Up to KEPT_LOGITS logits are kept for the
    backward pass, which overwrites them with their gradients. If there are more, only one chunk exists at a time, and
    the backward pass recomputes it.

    Args:
        hidden: (N, C). weight: (V, C), in hidden's dtype. targets: (N,) int64; -100 is not counted.
        backend: auto, triton, torch or naive.

    Returns:
        (N,) fp32 (float64 for float64), in nats; 0 where not counted; NaN for a target outside of the vocabulary.

    Raises:
        ValueError: inconsistent shapes, unknown backend.
    """
    if (
        hidden.dim() != 2
        or weight.dim() != 2
        or hidden.shape[1] != weight.shape[1]
        or targets.shape != hidden.shape[:1]
    ):
        raise ValueError(
            f"hidden (N, C), weight (V, C) and targets (N,) do not belong together: "
            f"{tuple(hidden.shape)}, {tuple(weight.shape)}, {tuple(targets.shape)}"
        )
    implementation = resolve_backend(backend, hidden, weight, heads=False)
    if implementation == "naive":
        return _naive(hidden, weight, targets)
    return _Losses.apply(
        hidden, weight, targets, Rows(0, len(weight), lambda lse, wanted: (lse, wanted)), implementation
    )


class Rows(NamedTuple):
    """The part of the vocabulary whose weight is here.

    Attributes:
        first: token id of row 0. total: rows of the whole vocabulary.
        combine: (lse, wanted) of these rows (`statistics`) -> those of all rows.
    """

    first: int
    total: int
    combine: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def sharded_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, rows: Rows) -> Tensor:
    """`linear_cross_entropy` with a part of the weight, combined by ``rows``. The gradient of hidden is of this part
    alone."""
    return _Losses.apply(hidden, weight, targets, rows, resolve_backend("auto", hidden, weight, heads=False))


def chunk_rows(tokens: int, columns: int) -> int:
    """Number of tokens whose logits exist at a time: all, or as CHUNK_LOGITS allows if they are recomputed."""
    return max(1, tokens if tokens * columns <= KEPT_LOGITS else CHUNK_LOGITS // columns)


def _naive(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(weight @ hidden)[target]."""
    logits = linear(hidden, weight).to(accumulation_dtype(hidden))
    there = (targets >= 0) & (targets < len(weight))
    wanted = logits.log_softmax(-1).gather(1, targets.clamp(0, len(weight) - 1)[:, None])[:, 0]
    return (-wanted).masked_fill(~there, float("nan")).masked_fill(targets == IGNORED, 0)


def statistics(logits: Tensor, targets: Tensor, first: int = 0, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """What the cross-entropy needs of logits, whose columns may be a part of the vocabulary.

    Args:
        logits: (N, V). targets: (N,) int64. first: token id of column 0.

    Returns:
        lse (N,): log of the sum of exponentials. wanted (N,): the target's logit, 0 if its column is not here.
        Both fp32 (float64 for float64).
    """
    if resolve_backend(backend, logits, heads=False) == "triton":
        from nsa.ops.kernels import cross_entropy as kernels

        return kernels.statistics(logits, targets, first)
    column, here = _columns(targets, first, logits.shape[1])
    wide = logits.to(accumulation_dtype(logits))
    return wide.logsumexp(-1), wide.gather(1, column[:, None])[:, 0].masked_fill(~here, 0)


def logit_gradients(
    logits: Tensor, targets: Tensor, lse: Tensor, d_losses: Tensor, first: int = 0, *, backend: str = "auto"
) -> Tensor:
    """(softmax(logits) - onehot(target)) * d_losses, where ``lse`` (N,) normalises the softmax.

    ``logits`` (N, V) may be overwritten: the result (N, V), of their dtype, may use their memory.
    """
    if resolve_backend(backend, logits, heads=False) == "triton":
        from nsa.ops.kernels import cross_entropy as kernels

        return kernels.logit_gradients(logits, targets, lse, d_losses, first)
    column, here = _columns(targets, first, logits.shape[1])
    p = logits.to(accumulation_dtype(logits)).sub_(lse[:, None]).exp_()
    p.scatter_add_(1, column[:, None], -here.to(p.dtype)[:, None])
    return p.mul_(d_losses[:, None]).to(logits.dtype)


def _columns(targets: Tensor, first: int, number: int) -> tuple[Tensor, Tensor]:
    """The column of each target, and whether it is here (else the column is 0)."""
    column = targets - first
    here = (column >= 0) & (column < number)
    return column.masked_fill(~here, 0), here


class _Losses(torch.autograd.Function):
    """hidden (N, C), weight (V, C), targets (N,) -> (N,)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, rows: Rows, backend: str) -> Tensor:
        ctx.first, ctx.backend, ctx.chunk = rows.first, backend, chunk_rows(len(hidden), len(weight))
        losses, lses, ctx.logits = [], [], None
        for x, target in zip(hidden.split(ctx.chunk), targets.split(ctx.chunk), strict=True):
            logits = linear(x, weight)
            lse, wanted = rows.combine(*statistics(logits, target, rows.first, backend=backend))
            there = (target >= 0) & (target < rows.total)
            losses.append((lse - wanted).masked_fill(~there, float("nan")).masked_fill(target == IGNORED, 0))
            lses.append(lse)
        ctx.save_for_backward(hidden, weight, targets, torch.cat(lses))
        if ctx.chunk >= len(hidden) and any(ctx.needs_input_grad[:2]):
            ctx.logits = logits
        return torch.cat(losses)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, d_losses: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, lses = ctx.saved_tensors
        kept, ctx.logits = ctx.logits, None  # overwritten below; a second backward pass recomputes them
        d_losses = d_losses.masked_fill(targets == IGNORED, 0)

        def d_logits(x: Tensor, target: Tensor, lse: Tensor, d_loss: Tensor) -> Tensor:
            logits = linear(x, weight) if kept is None else kept
            return logit_gradients(logits, target, lse, d_loss, ctx.first, backend=ctx.backend)

        if ctx.chunk >= len(hidden):
            d = d_logits(hidden, targets, lses, d_losses)
            return d @ weight, d.mT @ hidden, None, None, None
        d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=accumulation_dtype(weight))
        parts = (t.split(ctx.chunk) for t in (d_hidden, hidden, targets, lses, d_losses))
        for d_x, x, *of_rows in zip(*parts, strict=True):
            d = d_logits(x, *of_rows)
            torch.mm(d, weight, out=d_x)
            d_weight += d.mT @ x
        return d_hidden, d_weight.to(weight.dtype), None, None, None
