"""Cross-entropy over rows of logits: one kernel forward, and one that replaces the logits by their gradients.

Both read and write the model's dtype, and compute in fp32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.ops.kernels.hardware import INTEGERS, vector_of

BLOCK = 4096  # logits that a program holds at a time


@triton.jit(do_not_specialize=[*INTEGERS, "first"])
def statistics_kernel(Logits, Targets, Lse, Wanted, num_vectors, first, VECTOR: tl.constexpr,
                      BLOCK: tl.constexpr):  # fmt: skip
    """Lse, Wanted (N,) fp32: the LSE of each row of Logits (N, V), and the logit of its target. One row a program.

    Column 0 of the logits is class ``first``. Wanted is 0 where Targets (N,) is a class of other columns.
    """
    row = tl.program_id(0).to(tl.int64)
    num_columns = num_vectors * VECTOR
    logits = Logits + row * num_columns
    at = tl.arange(0, BLOCK)  # [BLOCK]
    # Online softmax in which every element keeps its own maximum and sum, so that one reduction at the end is enough.
    largest = tl.full([BLOCK], -float("inf"), tl.float32)  # [BLOCK]
    total = tl.zeros([BLOCK], tl.float32)  # [BLOCK]
    for start in tl.range(0, num_columns, BLOCK):
        # [BLOCK]
        x = tl.load(logits + start + at, mask=start + at < num_columns, other=-float("inf")).to(tl.float32)
        above = tl.maximum(largest, x)  # [BLOCK]
        finite = tl.where(above == -float("inf"), 0.0, above)  # [BLOCK], -inf - -inf would be NaN
        total = total * tl.exp(largest - finite) + tl.exp(x - finite)
        largest = above
    top = tl.max(largest, 0)
    base = tl.where(top == -float("inf"), 0.0, top)
    lse = base + tl.log(tl.sum(total * tl.exp(largest - base), 0))
    column = tl.load(Targets + row) - first
    here = (column >= 0) & (column < num_columns)
    wanted = tl.load(logits + tl.where(here, column, 0), mask=here, other=0.0).to(tl.float32)
    tl.store(Lse + row, lse)
    tl.store(Wanted + row, wanted)


@triton.jit(do_not_specialize=[*INTEGERS, "first"])
def logit_gradients_kernel(Logits, Targets, Lse, DLosses, num_vectors, first, VECTOR: tl.constexpr,
                           BLOCK: tl.constexpr):  # fmt: skip
    """Logits (N, V) become their gradients, from Targets, Lse and DLosses (N,). BLOCK columns of a row a program.

    A row whose DLosses is 0 gets 0, even where its logits are not finite.
    """
    row = tl.program_id(0).to(tl.int64)
    num_columns = num_vectors * VECTOR
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    ok = at < num_columns  # [BLOCK]
    logits = Logits + row * num_columns + at  # [BLOCK]
    lse, d_loss = tl.load(Lse + row), tl.load(DLosses + row).to(tl.float32)
    column = tl.load(Targets + row) - first
    p = tl.exp(tl.load(logits, mask=ok, other=0.0).to(tl.float32) - lse)  # [BLOCK]
    d_logits = tl.where(d_loss == 0, 0.0, (p - tl.where(at == column, 1.0, 0.0)) * d_loss)  # [BLOCK]
    tl.store(logits, d_logits.to(Logits.dtype.element_ty), mask=ok)


@torch.library.custom_op("nsa::token_statistics", mutates_args=())
def _token_statistics(logits: Tensor, targets: Tensor, first: int) -> tuple[Tensor, Tensor]:
    lse, wanted = (logits.new_empty(len(logits), dtype=torch.float32) for _ in range(2))
    vector = vector_of(logits.shape[1])
    if len(logits):
        statistics_kernel[(len(logits),)](
            logits, targets, lse, wanted, logits.shape[1] // vector, first, VECTOR=vector, BLOCK=BLOCK, num_warps=8
        )
    return lse, wanted


@_token_statistics.register_fake
def _token_statistics_fake(logits, targets, first):
    return tuple(logits.new_empty(len(logits), dtype=torch.float32) for _ in range(2))


@torch.library.custom_op("nsa::logit_gradients", mutates_args=("logits",))
def _logit_gradients(logits: Tensor, targets: Tensor, lse: Tensor, d_losses: Tensor, first: int) -> None:
    vector = vector_of(logits.shape[1])
    if len(logits):
        logit_gradients_kernel[(len(logits), triton.cdiv(logits.shape[1], BLOCK))](
            logits, targets, lse, d_losses, logits.shape[1] // vector, first, VECTOR=vector, BLOCK=BLOCK, num_warps=8
        )


@_logit_gradients.register_fake
def _logit_gradients_fake(logits, targets, lse, d_losses, first):
    return None


def statistics(logits: Tensor, targets: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """As `nsa.ops.cross_entropy.statistics`."""
    return _token_statistics(logits.contiguous(), targets.contiguous(), first)


def logit_gradients(logits: Tensor, targets: Tensor, lse: Tensor, d_losses: Tensor, first: int) -> Tensor:
    """As `nsa.ops.cross_entropy.logit_gradients`, in place."""
    logits = logits.contiguous()
    _logit_gradients(logits, targets.contiguous(), lse.contiguous(), d_losses.contiguous(), first)
    return logits
