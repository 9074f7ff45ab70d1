"""Runs the operator forward and backward on small shapes, for compute-sanitizer:

compute-sanitizer --tool memcheck python tests/ops/sanitizer_run.py
compute-sanitizer --tool racecheck python tests/ops/sanitizer_run.py
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from nsa import ops
from tests.ops.cases import cumulative, few_programs

SIZES = {"length": 32, "stride": 16, "block_size": 64, "num_blocks": 8, "window": 128}


def forward_and_backward(heads: int, groups: int, width: int, documents: list[int]) -> None:
    """One forward and backward pass in bf16; values 128 wide."""
    tokens = sum(documents)
    starts = cumulative(documents).cuda() if len(documents) > 1 else None
    blocks = sum(max(0, (n - 32) // 16 + 1) for n in documents)

    def normal(tokens: int, heads: int, width: int = 128) -> torch.Tensor:
        return torch.randn(1, tokens, heads, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    q, gates = normal(tokens, heads, width), torch.rand(1, tokens, heads, 3, device="cuda", dtype=torch.bfloat16)
    pairs = [(normal(n, groups, width), normal(n, groups)) for n in (blocks, tokens, tokens)]
    out = ops.native_sparse_attention(q, *pairs, gates, **SIZES, cu_seqlens=starts, backend="triton")
    gradients = torch.autograd.grad(out, [q, *(x for pair in pairs for x in pair)], torch.randn_like(out))
    assert all(x.isfinite().all() for x in (out, *gradients))


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("sanitizer_run.py needs an NVIDIA GPU, and a torch that is built for it")
    for heads, groups, width in ((16, 1, 128), (8, 2, 128), (2, 1, 128), (6, 2, 128), (16, 1, 192), (2, 1, 192)):
        for documents in ([700], [300, 1, 40, 259]):
            with few_programs():
                forward_and_backward(heads, groups, width, documents)
            print(f"{heads} heads, {groups} groups, width {width}, documents of {documents} tokens: done", flush=True)
