"""Many small tensors added to one large one, in one launch.

A launch for each tensor takes longer than the sum, and to join the tensors first takes as long again. So the kernel
gets a table of where each piece lies and where it belongs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

PIECE = 16384  # elements of one program


@triton.jit
def accumulate_kernel(Table, Total, Like, VECTOR: tl.constexpr, PIECE: tl.constexpr, BLOCK: tl.constexpr):
    """Table (programs, 3) int64: address, first element in Total, VECTORs of elements. Like: a tensor of the pieces'
    dtype, not read."""
    entry = Table + tl.program_id(0) * 3
    piece = tl.load(entry).to(tl.pointer_type(Like.dtype.element_ty))
    total = Total + tl.load(entry + 1) * VECTOR
    count = tl.load(entry + 2).to(tl.int32) * VECTOR
    piece, total = tl.multiple_of(piece, VECTOR * 2), tl.multiple_of(total, VECTOR * 2)
    for start in tl.range(0, PIECE, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(piece + at, mask=at < count, other=0.0).to(tl.float32)
        so_far = tl.load(total + at, mask=at < count, other=0.0).to(tl.float32)
        tl.store(total + at, (so_far + x).to(Total.dtype.element_ty), mask=at < count)


class Accumulator:
    """Adds tensors to parts of ``total`` (n,): what is recorded here is the addresses, so the tensors must stay.

    Args:
        parts: contiguous, of one dtype, on ``total``'s device. offsets: of each part's first element in ``total``.
    """

    def __init__(self, total: Tensor, parts: list[Tensor], offsets: list[int]) -> None:
        self.total, self.parts = total, parts
        aligned = all(x.data_ptr() % 16 == 0 and x.numel() % 8 == 0 for x in parts)
        aligned = aligned and total.data_ptr() % 16 == 0 and all(offset % 8 == 0 for offset in offsets)
        self.vector = vector = 8 if aligned else 1
        rows = [
            (
                x.data_ptr() + start * x.element_size(),
                (offset + start) // vector,
                min(PIECE, x.numel() - start) // vector,
            )
            for x, offset in zip(parts, offsets, strict=True)
            for start in range(0, x.numel(), PIECE)
        ]
        self.rows = torch.tensor(rows, dtype=torch.int64).reshape(-1, 3)
        self.table = torch.empty_like(self.rows, device=total.device)

    def fill(self) -> None:
        """Write the table: before the first `run`; after a recording in which `run` was called."""
        self.table.copy_(self.rows)

    def run(self) -> None:
        """Add; can be recorded."""
        if len(self.rows):
            accumulate_kernel[(len(self.rows),)](
                self.table, self.total, self.parts[0], VECTOR=self.vector, PIECE=PIECE, BLOCK=2048, num_warps=8
            )
