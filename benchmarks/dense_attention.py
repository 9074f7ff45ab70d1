"""Times causal attention with document boundaries, by all installed implementations, relative to cuDNN without them.

    python benchmarks/dense_attention.py [--tokens 8192 32768] [--out FILE]

bf16, batch 1, in CUDA graphs if the call can be captured; the median of repeats with the L2 cache flushed. `one`: one
document fills the sample, and the host knows it; `packed`: documents of random length, 1024 tokens on average.
`repeats`: whether two backward passes are bitwise identical. `over_cudnn`: cuDNN's time without boundaries over the
row's, both passes. nsa/ops/dense/fastest.json was written from these results.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import dense
from benchmarks.measure import Call, agreement, ceilings, environment, forward_backward, need_gpu
from nsa import ops
from nsa.ops.dense import libraries
from nsa.ops.geometry import KnownLengths, tell_lengths

SHAPES = {f"{h} / {g}, {width}": (h, g, width) for width in (64, 128) for h, g in ((16, 1), (32, 2))}


def borders(packing: str, tokens: int) -> torch.Tensor:
    """(N+1,) int32 on the host."""
    ends = [0, tokens]
    if packing == "packed":
        generator = torch.Generator().manual_seed(tokens)
        ends[1:1] = sorted((torch.randperm(tokens - 1, generator=generator)[: tokens // 1024 - 1] + 1).tolist())
    return torch.tensor(ends, dtype=torch.int32)


def rows_of(name: str, heads: int, groups: int, width: int, tokens: int) -> list[dict]:
    torch.manual_seed(0)
    inputs = tuple(
        torch.randn(1, tokens, n, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for n in (heads, groups, groups)
    )
    rows, common = [], {"shape": name, "tokens": tokens}
    plain = Call(lambda: dense.cudnn(*inputs), inputs)
    baseline = forward_backward(plain)
    whole = baseline.forward + baseline.backward
    rows.append({**common, "packing": "none", "implementation": "cudnn", **_times(baseline), "over_cudnn": 1.0})
    for packing in ("one", "packed"):
        host = borders(packing, tokens)
        cu_seqlens = host.cuda()
        tell_lengths(cu_seqlens, KnownLengths.of(host))
        exact = Call(lambda b=cu_seqlens: ops.dense_attention(*inputs, cu_seqlens=b, backend="triton"), inputs)
        for implementation in ("triton", *libraries.NAMES):
            row: dict = {**common, "packing": packing, "implementation": implementation}
            if libraries.not_here(implementation) and implementation != "triton":
                continue
            if packing == "packed" and implementation == "cudnn":
                continue
            call = Call(
                lambda b=cu_seqlens, i=implementation: ops.dense_attention(*inputs, cu_seqlens=b, backend=i), inputs
            )
            try:
                row |= {"distance": agreement(call, exact), "repeats": repeats(call)}
                times = forward_backward(call)
                row |= _times(times)
                if packing == "one":
                    row["over_cudnn"] = round(whole / (times.forward + times.backward), 3)
            except Exception as error:  # the library does not support it: report, and go on with the next
                row["refused"] = f"{type(error).__name__}: {str(error).splitlines()[0][:150]}"
            rows.append(row)
    return rows


def repeats(call: Call) -> bool:
    """Whether two backward passes are bitwise identical."""
    out = call.run()
    d_out = torch.randn_like(out)
    first, second = (torch.autograd.grad(out, call.inputs, d_out, retain_graph=True) for _ in range(2))
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def _times(times) -> dict:
    return {"forward_ms": round(times.forward, 3), "backward_ms": round(times.backward, 3), "recorded": times.recorded}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=int, default=[8192, 32768])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    need_gpu(parser)
    report: dict = {**environment(), **ceilings(), "implementations": dense.versions()}
    report["command"] = "python benchmarks/dense_attention.py " + " ".join(sys.argv[1:])
    rows = report["dense_attention"] = []
    for name, shape in SHAPES.items():
        for tokens in options.tokens:
            for row in rows_of(name, *shape, tokens):
                rows.append(row)
                print(row, flush=True)
            torch.cuda.empty_cache()
            if options.out:
                options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
