"""Adds many small tensors to parts of a large one, in one launch.

A launch for each tensor would take longer than the additions. Concatenating the tensors first would double the time.
So the kernel gets a table with the address of each piece and the part that it is added to.
"""

from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.ops.kernels.hardware import vector_of

PIECE = 16384  # elements of one program
BLOCK = 2048  # elements that it adds at a time
ALIGNMENT = 16  # bytes: the widest load


@triton.jit
def accumulate_kernel(Table, Total, Like, VECTOR: tl.constexpr, PIECE: tl.constexpr, BLOCK: tl.constexpr):
    """Total (n,) with the pieces added, one piece a program.

    Table (programs, 3) int64 holds each piece's address, its first element in Total and its length, both divided by
    VECTOR. Like is a tensor of the pieces' dtype, which is not read.
    """
    entry = Table + tl.program_id(0) * 3
    piece = tl.load(entry).to(tl.pointer_type(Like.dtype.element_ty))
    total = Total + tl.load(entry + 1) * VECTOR
    count = tl.load(entry + 2).to(tl.int32) * VECTOR
    # Lets the compiler load and store VECTOR elements at a time.
    piece, total = tl.multiple_of(piece, VECTOR * 2), tl.multiple_of(total, VECTOR * 2)
    for start in tl.range(0, PIECE, BLOCK):
        at = start + tl.arange(0, BLOCK)  # [BLOCK]
        x = tl.load(piece + at, mask=at < count, other=0.0).to(tl.float32)  # [BLOCK]
        so_far = tl.load(total + at, mask=at < count, other=0.0).to(tl.float32)  # [BLOCK]
        tl.store(total + at, (so_far + x).to(Total.dtype.element_ty), mask=at < count)


class Accumulator:
    """Adds tensors of given sizes to parts of ``total`` (n,), any number of times.

    `add` may be captured in a CUDA graph. The graph uses the table in every replay, so the table is allocated here,
    before the capture. Allocated in the capture, it would reuse memory of freed tensors, which every replay writes to.

    Args:
        sizes: elements of each tensor. offsets: first element of each in ``total``.
    """

    def __init__(self, total: Tensor, sizes: list[int], offsets: list[int]) -> None:
        self.total, self.sizes, self.offsets = total, sizes, offsets
        self.vector = vector_of(*sizes, *offsets) if total.data_ptr() % ALIGNMENT == 0 else 1
        programs = sum(triton.cdiv(n, PIECE) for n in sizes)
        self.table = torch.zeros(programs, 3, dtype=torch.int64, device=total.device)

    def add(self, parts: list[Tensor]) -> Callable[[], None]:
        """Add ``parts``, contiguous and of one dtype.

        Returns:
            A function that writes the table. If `add` was captured, call it after the capture. Keep it as long as the
            graph, because it holds ``parts``.
        """
        assert [x.numel() for x in parts] == self.sizes
        parts = [x.clone() if x.data_ptr() % ALIGNMENT else x for x in parts]  # a view may be unaligned
        write = partial(self._write_table, parts)
        if not torch.cuda.is_available() or not torch.cuda.is_current_stream_capturing():
            write()
        if len(self.table):
            accumulate_kernel[(len(self.table),)](
                self.table, self.total, parts[0], VECTOR=self.vector, PIECE=PIECE, BLOCK=BLOCK, num_warps=8
            )
        return write

    def _write_table(self, parts: list[Tensor]) -> None:
        rows = [
            (x.data_ptr() + i * x.element_size(), (offset + i) // self.vector, min(PIECE, n - i) // self.vector)
            for x, offset, n in zip(parts, self.offsets, self.sizes, strict=True)
            for i in range(0, n, PIECE)
        ]
        self.table.copy_(torch.tensor(rows, dtype=torch.int64).reshape(-1, 3))
