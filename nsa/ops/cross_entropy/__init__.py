"""The loss of each token from hidden states: a linear layer over the vocabulary and its cross-entropy, together."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from nsa.ops.dispatch import accumulation_dtype, resolve_backend

IGNORED = -100
KEPT_LOGITS = 2**30  # logits that are kept for the backward pass: 2 GiB in 16 bits; more are computed again
CHUNK_LOGITS = 2**28  # logits of one chunk, where they are computed again


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, ignored: int = IGNORED, backend: str = "auto"
) -> Tensor:
    """Negative log-likelihood of each target under softmax(weight @ hidden).

    The logits are in hidden's dtype, and never in fp32 in memory; sums and the loss are fp32. Up to KEPT_LOGITS of them
    are kept between the passes, and become their own gradients in the backward pass. Of more, a chunk at a time exists,
    and the backward pass computes it again.

    Args:
        hidden: (N, C). weight: (V, C), in hidden's dtype. targets: (N,) int64; ``ignored`` is not counted.
        backend: auto, triton, torch or naive.

    Returns:
        (N,) fp32 (float64 for float64), in nats; 0 where ignored; NaN for a target outside of the vocabulary.

    Raises:
        ValueError: shapes that do not belong together, unknown backend.
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
        return _naive(hidden, weight, targets, ignored)
    return _Losses.apply(hidden, weight, targets, ignored, implementation)


def chunk_rows(tokens: int, columns: int) -> int:
    """Tokens whose logits exist at a time: all, or as many as CHUNK_LOGITS allows where they are computed again."""
    return max(1, tokens if tokens * columns <= KEPT_LOGITS else CHUNK_LOGITS // columns)


def _naive(hidden: Tensor, weight: Tensor, targets: Tensor, ignored: int) -> Tensor:
    """-log softmax(weight @ hidden)[target]."""
    logits = linear(hidden, weight).to(accumulation_dtype(hidden))
    there = (targets >= 0) & (targets < len(weight))
    wanted = logits.log_softmax(-1).gather(1, targets.clamp(0, len(weight) - 1)[:, None])[:, 0]
    return (-wanted).masked_fill(~there, float("nan")).masked_fill(targets == ignored, 0)


def statistics(logits: Tensor, targets: Tensor, first: int = 0, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """What a cross-entropy needs of logits, whose columns may be a part of the vocabulary.

    Args:
        logits: (N, V). targets: (N,) int64. first: the vocabulary's number of column 0.

    Returns:
        lse (N,): log of the sum of exponentials. wanted (N,): the target's logit, 0 where it is no column of these.
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
    """(softmax(logits) - onehot(target)) * d_losses, with the sum of exponentials that ``lse`` (N,) stands for.

    ``logits`` (N, V) are lost: the result (N, V) of their dtype may lie in their memory.
    """
    if resolve_backend(backend, logits, heads=False) == "triton":
        from nsa.ops.kernels import cross_entropy as kernels

        return kernels.logit_gradients(logits, targets, lse, d_losses, first)
    column, here = _columns(targets, first, logits.shape[1])
    p = logits.to(accumulation_dtype(logits)).sub_(lse[:, None]).exp_()
    p.scatter_add_(1, column[:, None], -here.to(p.dtype)[:, None])
    return p.mul_(d_losses[:, None]).to(logits.dtype)


def _columns(targets: Tensor, first: int, number: int) -> tuple[Tensor, Tensor]:
    """The column of each target, and whether it is there (else the column is 0)."""
    column = targets - first
    here = (column >= 0) & (column < number)
    return column.masked_fill(~here, 0), here


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, ignored: int, backend: str
    ) -> Tensor:  # (N, C), (V, C), (N,) -> (N,)
        rows = chunk_rows(len(hidden), len(weight))
        losses, lses, ctx.logits = [], [], None
        for x, target in zip(hidden.split(rows), targets.split(rows), strict=True):
            logits = linear(x, weight)
            lse, wanted = statistics(logits, target, backend=backend)
            there = (target >= 0) & (target < len(weight))
            losses.append((lse - wanted).masked_fill(~there, float("nan")).masked_fill(target == ignored, 0))
            lses.append(lse)
        ctx.save_for_backward(hidden, weight, targets, torch.cat(lses))
        ctx.ignored, ctx.backend, ctx.rows = ignored, backend, rows
        if rows >= len(hidden) and (ctx.needs_input_grad[0] or ctx.needs_input_grad[1]):
            ctx.logits = logits
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, d_losses: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, lses = ctx.saved_tensors
        kept, ctx.logits = ctx.logits, None  # lost here; a second backward pass computes them again

        def gradients(x: Tensor, target: Tensor, lse: Tensor, scale: Tensor) -> Tensor:
            logits = linear(x, weight) if kept is None else kept
            return logit_gradients(logits, target, lse, scale, backend=ctx.backend)

        parts = hidden, targets, lses, d_losses.masked_fill(targets == ctx.ignored, 0)
        d_hidden, d_weight = add_up_gradients(gradients, weight, parts, ctx.rows)
        return d_hidden, d_weight, None, None, None


def add_up_gradients(gradients: Any, weight: Tensor, parts: tuple[Tensor, ...], rows: int) -> tuple[Tensor, Tensor]:
    """Of hidden and weight, from the gradients of the logits of ``rows`` tokens at a time.

    Args:
        gradients: makes them (rows, V) from a piece of each of ``parts``, of which the first is hidden (N, C).
    """
    hidden = parts[0]
    if rows >= len(hidden):
        d_logits = gradients(*parts)
        return d_logits @ weight, d_logits.mT @ hidden
    d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=accumulation_dtype(weight))
    for d_x, *pieces in zip(d_hidden.split(rows), *(part.split(rows) for part in parts), strict=True):
        d_logits = gradients(*pieces)
        torch.mm(d_logits, weight, out=d_x)
        d_weight += d_logits.mT @ pieces[0]
    return d_hidden, d_weight.to(weight.dtype)
