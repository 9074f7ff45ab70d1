"""Many small tensors added to one large one, in one launch.

A launch for each tensor takes longer than the sum, and to join the tensors first takes as long again. So the kernel
gets a table of where each piece lies and where it belongs.
"""

from collections.abc import Callable
from functools import partial

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
    """Adds tensors of given sizes to parts of ``total`` (n,), again and again.

    What a recording of `add` keeps is the table, so it is made here, outside of the recording: within, its memory would
    be that of tensors which are gone by then, and every replay would write them anew.

    Args:
        sizes: elements of each tensor. offsets: of its first element in ``total``.
    """

    def __init__(self, total: Tensor, sizes: list[int], offsets: list[int]) -> None:
        self.total, self.sizes, self.offsets = total, sizes, offsets
        self.vector = 1 if any(n % 8 for n in (*sizes, *offsets)) or total.data_ptr() % 16 else 8
        programs = sum(triton.cdiv(n, PIECE) for n in sizes)
        self.table = torch.zeros(programs, 3, dtype=torch.int64, device=total.device)

    def add(self, parts: list[Tensor]) -> Callable[[], None]:
        """Add ``parts``, contiguous and of one dtype.

        Returns:
            What writes the table. If this was recorded, call it once the recording has ended, and keep it as long as
            the recording: it holds the parts.
        """
        assert [x.numel() for x in parts] == self.sizes
        parts = [x.clone() if x.data_ptr() % 16 else x for x in parts]  # parts of others may begin anywhere
        place = partial(self._place, parts)
        if not torch.cuda.is_available() or not torch.cuda.is_current_stream_capturing():
            place()
        if len(self.table):
            accumulate_kernel[(len(self.table),)](
                self.table, self.total, parts[0], VECTOR=self.vector, PIECE=PIECE, BLOCK=2048, num_warps=8
            )
        return place

    def _place(self, parts: list[Tensor]) -> None:
        rows = [
            (x.data_ptr() + i * x.element_size(), (offset + i) // self.vector, min(PIECE, n - i) // self.vector)
            for x, offset, n in zip(parts, self.offsets, self.sizes, strict=True)
            for i in range(0, n, PIECE)
        ]
        self.table.copy_(torch.tensor(rows, dtype=torch.int64).reshape(-1, 3))
