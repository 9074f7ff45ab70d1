"""The gated sum of the three branches (NSA, arXiv 2502.11089, Eq. 5), and what its gradient hands to theirs.

With y = sum_c g_c o_c, branch c would get d_out_c = g_c dy and from it delta_c = d_out_c . o_c. Neither is written:
its kernels need g_c p (dy v^T - dg_c) with dg_c = dy . o_c, which is what they compute from dy itself, delta = dg_c and
an LSE lowered by log(g_c), since g exp(s - lse) = exp(s - (lse - log g)).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.ops.kernels.launch import INTEGERS
from nsa.ops.kernels.ranges import _load_rows, _store_rows


@triton.jit
def _load_gate(Gates, branch, row, ok):
    return tl.load(Gates + row * 3 + branch, mask=ok, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=INTEGERS)
def combine_kernel(Gates, Out0, Out1, Out2, Out, num_rows, DV: tl.constexpr, DV1: tl.constexpr,
                   BM: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    ok, column = row < num_rows, tl.arange(0, DV1)
    total = _load_gate(Gates, 0, row, ok)[:, None] * _load_rows(Out0, row, ok, column, DV).to(tl.float32)
    total += _load_gate(Gates, 1, row, ok)[:, None] * _load_rows(Out1, row, ok, column, DV).to(tl.float32)
    total += _load_gate(Gates, 2, row, ok)[:, None] * _load_rows(Out2, row, ok, column, DV).to(tl.float32)
    _store_rows(Out, row, ok, column, DV, total)


@triton.jit
def _branch(Gates, Out, Lse, GatedLse, Delta, DGates, branch: tl.constexpr, row, ok, column, d_out, num_rows,
            DV: tl.constexpr):  # fmt: skip
    d_gate = tl.sum(d_out * _load_rows(Out, row, ok, column, DV).to(tl.float32), 1)
    tl.store(Delta + branch * num_rows + row, d_gate, mask=ok)
    tl.store(DGates + row * 3 + branch, d_gate.to(DGates.dtype.element_ty), mask=ok)
    gate, lse = _load_gate(Gates, branch, row, ok), tl.load(Lse + row, mask=ok, other=0.0)
    # -inf says that the row sees nothing or that its gate is shut: probabilities 0 either way.
    gated = tl.where(gate > 0, lse - tl.log2(gate) * 0.6931471805599453, float("-inf"))
    tl.store(GatedLse + branch * num_rows + row, gated, mask=ok)


@triton.jit(do_not_specialize=INTEGERS)
def combine_backward_kernel(Gates, DOut, Out0, Out1, Out2, Lse0, Lse1, Lse2, GatedLse, Delta, DGates,
                            num_rows, DV: tl.constexpr, DV1: tl.constexpr, BM: tl.constexpr):  # fmt: skip
    """GatedLse, Delta (3, rows) fp32; DGates (rows, 3)."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)  # int64: so are the products with num_rows
    ok, column = row < num_rows, tl.arange(0, DV1)
    num_rows = num_rows.to(tl.int64)
    d_out = _load_rows(DOut, row, ok, column, DV).to(tl.float32)
    _branch(Gates, Out0, Lse0, GatedLse, Delta, DGates, 0, row, ok, column, d_out, num_rows, DV)
    _branch(Gates, Out1, Lse1, GatedLse, Delta, DGates, 1, row, ok, column, d_out, num_rows, DV)
    _branch(Gates, Out2, Lse2, GatedLse, Delta, DGates, 2, row, ok, column, d_out, num_rows, DV)


def _grid(out: Tensor) -> tuple[tuple[int], dict[str, int]]:
    rows, width = out.shape[:3].numel(), max(16, triton.next_power_of_2(out.shape[3]))
    block = max(1, 4096 // width)
    return (triton.cdiv(rows, block),), {"DV": out.shape[3], "DV1": width, "BM": block, "num_warps": 4}


def combine(gates: Tensor, outs: list[Tensor]) -> Tensor:
    """(B, T, H, Dv): the sum of outs (three of (B, T, H, Dv)) weighted by gates (B, T, H, 3), all contiguous."""
    out = torch.empty_like(outs[0])
    if out.numel():
        grid, constants = _grid(out)
        combine_kernel[grid](gates, *outs, out, gates.numel() // 3, **constants)
    return out


def combine_backward(
    gates: Tensor, d_out: Tensor, outs: list[Tensor], lses: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """What each branch's backward kernels take with ``d_out``: their LSEs and deltas, (3, B, T, H) fp32 each.

    The deltas are the gradients of the gates: third, (B, T, H, 3) in the gates' dtype.
    """
    lse, delta = (gates.new_empty(3, *gates.shape[:3], dtype=torch.float32) for _ in range(2))
    d_gates = torch.empty_like(gates)
    if d_out.numel():
        grid, constants = _grid(d_out)
        combine_backward_kernel[grid](gates, d_out, *outs, *lses, lse, delta, d_gates, gates.numel() // 3, **constants)
    return lse, delta, d_gates
