"""x W^T for a few rows of x, as in decoding. The time is that of reading W.

A program takes R rows of W (of two matrices for SwiGLU) over all their columns. Its tile holds up to 16,384 columns, so
that a program mostly has a single one. A thread loads all its weights of a tile, 16 bytes at a time, before it waits
for the first: at most LOADS vectors, 16 KB for four warps. Then it loads x, which all programs read, and multiplies.
The sums stay apart for each vector of a tile until the end of the program.

Before it waits for the launch before, a program asks the L2 cache for its weights: see `device_functions.begin_launch`.

The order of a sum depends on the number of columns alone. So a row has the same bits whichever rows are beside it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.ops.kernels.device_functions import begin_launch
from nsa.ops.kernels.hardware import early

VECTOR_BYTES = 16
LOADS = 8  # vectors of weights that a thread loads from one tile
PROGRAMS = 1024  # of a launch at least, if W has so many rows: nearly eight for each multiprocessor of an H100
FIRST = tl.constexpr(1056)  # programs that begin together, about: eight for each. The others wait for no launch


@triton.jit
def load_tile(X, at, tile, K: tl.constexpr, C: tl.constexpr, V: tl.constexpr, policy: tl.constexpr):
    """Tile number ``tile`` [A, B, C, V] of the rows that begin at X + at [A, B, 1, V]. Beyond K columns it is 0."""
    vector = tile * C + tl.arange(0, C)[None, None, :, None]  # [1, 1, C, 1]
    if K % (C * V) == 0:
        return tl.load(X + at + vector * V, eviction_policy=policy)
    return tl.load(X + at + vector * V, mask=vector < K // V, other=0.0, eviction_policy=policy)


@triton.jit
def prefetch_rows(W, first, count, K: tl.constexpr):
    """Ask the L2 cache for ``count`` rows of W (.., K) from ``first`` on: whole vectors. One thread does."""
    size = (count * (K * W.dtype.element_ty.primitive_bitwidth // 8)).to(tl.int32)  # bytes
    tl.inline_asm_elementwise(
        """{
        .reg .pred one;
        .reg .u32 thread;
        mov.u32 thread, %tid.x;
        setp.eq.u32 one, thread, 0;
        @one cp.async.bulk.prefetch.L2.global [$1], $2;
        mov.u32 $0, 0;
        }""",
        "=r,l,r", [(W + first.to(tl.int64) * K).to(tl.int64, bitcast=True), size], dtype=tl.int32, is_pure=False,
        pack=1,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_outputs"])
def few_rows_kernel(X, W, Up, Bias, Y, num_outputs, K: tl.constexpr, ROWS: tl.constexpr, M: tl.constexpr,
                    R: tl.constexpr, C: tl.constexpr, V: tl.constexpr, EARLY: tl.constexpr):  # fmt: skip
    """Y (ROWS, N) from X (ROWS, K) and W (N, K): X W^T + Bias (N,), or silu(X W^T) * (X Up^T) with Up (N, K).

    N is num_outputs, and M is ROWS up to a power of two. A tile has C vectors of V elements.
    """
    if EARLY:
        first = tl.program_id(0) * R
        if tl.program_id(0) < FIRST:
            prefetch_rows(W, first, tl.minimum(R, num_outputs - first), K)
            if Up is not None:
                prefetch_rows(Up, first, tl.minimum(R, num_outputs - first), K)
    begin_launch(EARLY)
    row = tl.arange(0, M)  # [M]
    output = tl.program_id(0) * R + tl.arange(0, R)  # [R]
    element = tl.arange(0, V)[None, None, None, :]  # [1, 1, 1, V]
    # Rows beyond the last are the last one again, and not stored: so no load has a mask for them.
    w_at = tl.minimum(output, num_outputs - 1).to(tl.int64)[None, :, None, None] * K + element  # [1, R, 1, V]
    x_at = tl.minimum(row, ROWS - 1)[:, None, None, None] * K + element  # [M, 1, 1, V]
    total, up_total = tl.zeros([M, R, C], tl.float32), tl.zeros([M, R, C], tl.float32)  # [M, R, C]
    for tile in tl.range(tl.cdiv(K, C * V)):
        w = load_tile(W, w_at, tile, K, C, V, "evict_first")  # [1, R, C, V]
        if Up is not None:
            up = load_tile(Up, w_at, tile, K, C, V, "evict_first")  # [1, R, C, V]
        tl.debug_barrier()  # else ptxas moves loads behind products, which wait for the loads before
        x = load_tile(X, x_at, tile, K, C, V, "").to(tl.float32)  # [M, 1, C, V]
        total += tl.sum(w.to(tl.float32) * x, 3)
        if Up is not None:
            up_total += tl.sum(up.to(tl.float32) * x, 3)
    y = tl.sum(total, 2)  # [M, R]
    if Bias is not None:
        y += tl.load(Bias + output, mask=output < num_outputs, other=0.0).to(tl.float32)[None, :]
    y = y.to(Y.dtype.element_ty)
    if Up is not None:
        gate, rounded = y.to(tl.float32), tl.sum(up_total, 2).to(Y.dtype.element_ty)  # [M, R]
        y = (gate * tl.sigmoid(gate) * rounded.to(tl.float32)).to(Y.dtype.element_ty)
    at = row[:, None] * num_outputs + output[None, :]  # [M, R]
    tl.store(Y + at, y, mask=(row < ROWS)[:, None] & (output < num_outputs)[None, :])


def tile_of(num_outputs: int, vectors: int, matrices: int) -> dict[str, int]:
    """R, C and warps of a launch for weights of (num_outputs, vectors) each.

    C and warps decide the order of a sum, so they depend on ``vectors`` and ``matrices`` alone.
    """
    columns, loads = min(max(256, triton.next_power_of_2(vectors)), 2048 // matrices), LOADS
    num_warps = min(max(4, columns * matrices // 128), 16)
    if vectors > columns:  # sums take registers beside the loads of the next tile
        columns, loads = columns // 2, loads // 2
    rows = max(1, loads * 32 * num_warps // (columns * matrices))
    while rows > 1 and triton.cdiv(num_outputs, rows) < PROGRAMS:
        rows //= 2
    return {"R": rows, "C": columns, "num_warps": num_warps}


def _launch(x: Tensor, weight: Tensor, up: Tensor | None, bias: Tensor | None) -> Tensor:
    num_outputs, width = weight.shape
    y = x.new_empty(*x.shape[:-1], num_outputs)
    if not y.numel():
        return y
    rows, vector = y.numel() // num_outputs, VECTOR_BYTES // x.element_size()
    tile = tile_of(num_outputs, width // vector, 1 if up is None else 2)
    few_rows_kernel[(triton.cdiv(num_outputs, tile["R"]),)](
        x, weight, up, bias, y, num_outputs, K=width, ROWS=rows, M=triton.next_power_of_2(rows), V=vector, **tile,
        **early(),
    )  # fmt: skip
    return y


@torch.library.custom_op("nsa::few_rows_linear", mutates_args=())
def _few_rows_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _launch(x, weight, None, bias)


@_few_rows_linear.register_fake
def _few_rows_linear_fake(x, weight, bias):
    return x.new_empty(*x.shape[:-1], len(weight))


@torch.library.custom_op("nsa::few_rows_swiglu", mutates_args=())
def _few_rows_swiglu(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    return _launch(x, gate, up, None)


@_few_rows_swiglu.register_fake
def _few_rows_swiglu_fake(x, gate, up):
    return x.new_empty(*x.shape[:-1], len(gate))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As `nsa.ops.few_rows_linear`."""
    return _few_rows_linear(x.contiguous(), weight, None if bias is None else bias.contiguous())


def swiglu(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """As `nsa.ops.few_rows_swiglu`."""
    return _few_rows_swiglu(x.contiguous(), gate, up)
