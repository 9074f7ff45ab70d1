"""The gated sum of the three branches (NSA, arXiv 2502.11089, Eq. 5), and its gradient.

The sum is y = sum_c g_c o_c, over branches c. Branch c has the gradient d_out_c = g_c dy, and delta_c = d_out_c . o_c.
Neither is written to memory. What a branch's backward kernels need is dS = g_c p (dy v^T - dg_c), with dg_c = dy . o_c.
They compute it from dy itself if they get dg_c as delta, and an LSE that is lowered by log(g_c): the gate is then part
of the probabilities, because g exp(s - lse) = exp(s - (lse - log g)).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.ops.kernels.device_functions import LSE_TO_NATURAL, load_rows, store_rows
from nsa.ops.kernels.hardware import INTEGERS, tile_width

BRANCHES = tl.constexpr(3)  # compressed, selected, window
ELEMENTS = 4096  # of one program


@triton.jit
def _load_gate(Gates, branch, row, ok):
    """(BM,) fp32 gates of one branch."""
    return tl.load(Gates + row * BRANCHES + branch, mask=ok, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=INTEGERS)
def combine_kernel(Gates, Out0, Out1, Out2, Out, num_rows, DV: tl.constexpr, DV1: tl.constexpr,
                   BM: tl.constexpr):  # fmt: skip
    """Out (rows, Dv): the sum of Out0, Out1, Out2 (rows, Dv), weighted by Gates (rows, 3)."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)  # [BM]
    ok, column = row < num_rows, tl.arange(0, DV1)  # [BM], [DV1]
    # total: [BM, DV1]
    total = _load_gate(Gates, 0, row, ok)[:, None] * load_rows(Out0, row, ok, column, DV).to(tl.float32)
    total += _load_gate(Gates, 1, row, ok)[:, None] * load_rows(Out1, row, ok, column, DV).to(tl.float32)
    total += _load_gate(Gates, 2, row, ok)[:, None] * load_rows(Out2, row, ok, column, DV).to(tl.float32)
    store_rows(Out, row, ok, column, DV, total)


@triton.jit
def _branch_backward(Gates, Out, Lse, GatedLse, Delta, DGates, branch: tl.constexpr, row, ok, column, d_out, num_rows,
                     DV: tl.constexpr):  # fmt: skip
    """One branch of `combine_backward_kernel`."""
    d_gate = tl.sum(d_out * load_rows(Out, row, ok, column, DV).to(tl.float32), 1)  # [BM]
    tl.store(Delta + branch * num_rows + row, d_gate, mask=ok)
    tl.store(DGates + row * BRANCHES + branch, d_gate.to(DGates.dtype.element_ty), mask=ok)
    gate, lse = _load_gate(Gates, branch, row, ok), tl.load(Lse + row, mask=ok, other=0.0)  # [BM], [BM]
    # A row that sees nothing has an LSE of -inf, and so has one whose gate is 0: all its probabilities are 0.
    gated = tl.where(gate > 0, lse - tl.log2(gate) * LSE_TO_NATURAL, float("-inf"))  # [BM]
    tl.store(GatedLse + branch * num_rows + row, gated, mask=ok)


@triton.jit(do_not_specialize=INTEGERS)
def combine_backward_kernel(Gates, DOut, Out0, Out1, Out2, Lse0, Lse1, Lse2, GatedLse, Delta, DGates,
                            num_rows, DV: tl.constexpr, DV1: tl.constexpr, BM: tl.constexpr):  # fmt: skip
    """GatedLse, Delta (3, rows) fp32 and DGates (rows, 3).

    Gates (rows, 3); DOut, Out0, Out1, Out2 (rows, Dv); Lse0, Lse1, Lse2 (rows,) fp32.
    """
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)  # [BM]
    ok, column = row < num_rows, tl.arange(0, DV1)  # [BM], [DV1]
    num_rows = num_rows.to(tl.int64)  # 2 num_rows may pass 2^31
    d_out = load_rows(DOut, row, ok, column, DV).to(tl.float32)  # [BM, DV1]
    _branch_backward(Gates, Out0, Lse0, GatedLse, Delta, DGates, 0, row, ok, column, d_out, num_rows, DV)
    _branch_backward(Gates, Out1, Lse1, GatedLse, Delta, DGates, 1, row, ok, column, d_out, num_rows, DV)
    _branch_backward(Gates, Out2, Lse2, GatedLse, Delta, DGates, 2, row, ok, column, d_out, num_rows, DV)


def _grid(out: Tensor) -> tuple[tuple[int], dict[str, int]]:
    """Grid and constants of both kernels."""
    rows, width = out.shape[:3].numel(), tile_width(out.shape[3])
    block = max(1, ELEMENTS // width)
    return (triton.cdiv(rows, block),), {"DV": out.shape[3], "DV1": width, "BM": block, "num_warps": 4}


def combine(gates: Tensor, outs: list[Tensor]) -> Tensor:
    """(B, T, H, Dv): the sum of outs (three of (B, T, H, Dv)) weighted by gates (B, T, H, 3), all contiguous."""
    out = torch.empty_like(outs[0])
    if out.numel():
        grid, constants = _grid(out)
        combine_kernel[grid](gates, *outs, out, out.shape[:3].numel(), **constants)
    return out


def combine_backward(
    gates: Tensor, d_out: Tensor, outs: list[Tensor], lses: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """The LSEs and the deltas that the branches' backward kernels take with ``d_out``, and the gates' gradients.

    Args:
        gates: (B, T, H, 3). d_out: (B, T, H, Dv). outs: three of (B, T, H, Dv). lses: three of (B, T, H) fp32.

    Returns:
        LSEs and deltas, (3, B, T, H) fp32 each; the gates' gradients (B, T, H, 3) in their dtype, equal to the deltas.
    """
    lse, delta = (gates.new_empty(3, *gates.shape[:3], dtype=torch.float32) for _ in range(2))
    d_gates = torch.empty_like(gates)
    if d_out.numel():
        grid, constants = _grid(d_out)
        rows = d_out.shape[:3].numel()
        combine_backward_kernel[grid](gates, d_out, *outs, *lses, lse, delta, d_gates, rows, **constants)
    return lse, delta, d_gates
