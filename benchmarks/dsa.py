"""Times DSA's operators: the top-k of the indexer, and attention to the selected tokens against dense cuDNN.

    python benchmarks/dsa.py [--tokens 32768 65536] [--out FILE]

bf16, batch 1, top-k 2048, one document; the median of eager calls with the L2 cache flushed. `extra_mib`: memory beyond
the result. `tflops`: of the scores that are computed. The index queries are running means, so neighbouring queries
select much the same tokens, and the attention is that of `--heads` with four KV heads of width 128. `dense_over_ours`:
time of causal attention by cuDNN over the attention's, for the forward pass, the backward pass and both; the indexer is
not in it. `training` is the indexer's loss with all its gradients; `over_dense`: its time and, in the warm-up, that
of the dense forward pass, over cuDNN's forward and backward pass. `layer`: top-k with 16 heads, attention and loss.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.measure import called_ms, environment, need_gpu
from nsa import ops

TOPK, WIDTH, KV_HEADS = 2048, 128, 4


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def row_of_topk(heads: int, tokens: int) -> dict[str, object]:
    inputs = normal(1, tokens, heads, WIDTH), normal(1, tokens, WIDTH), torch.rand(1, tokens, heads, device="cuda")
    ops.index_topk(*inputs, topk=TOPK)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = ops.index_topk(*inputs, topk=TOPK)
    extra = torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in found)
    del found
    ms = called_ms(lambda: ops.index_topk(*inputs, topk=TOPK))
    flops = 2 * heads * WIDTH * tokens * (tokens + 1) / 2
    return {"heads": heads, "tokens": tokens, "ms": ms, "tflops": flops / ms / 1e9, "extra_mib": extra / 2**20}


def row_of_attention(heads: int, tokens: int) -> dict[str, Any]:
    q, k, v = normal(1, tokens, heads, WIDTH), normal(1, tokens, KV_HEADS, WIDTH), normal(1, tokens, KV_HEADS, WIDTH)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    queries = normal(1, tokens, 4, 64).float().cumsum(1)
    queries /= torch.arange(1, tokens + 1, device="cuda")[:, None, None] ** 0.5
    index = queries.bfloat16(), normal(1, tokens, 64), torch.ones(1, tokens, 4, device="cuda")
    lists, _ = ops.index_topk(*index, topk=TOPK)
    calls = {
        "ours": lambda: ops.token_sparse_attention(*inputs, lists),
        "cudnn": lambda: ops.dense_attention(*inputs, backend="cudnn"),
    }
    row: dict[str, Any] = {"heads": heads, "kv_heads": KV_HEADS, "tokens": tokens}
    times = {}
    for name, call in calls.items():
        out = call()
        gradient = torch.randn_like(out)

        def backward(out: Tensor = out, gradient: Tensor = gradient) -> object:
            return torch.autograd.grad(out, inputs, gradient, retain_graph=True)

        with torch.no_grad():
            forward_ms = called_ms(call)
        times[name] = forward_ms, called_ms(backward)
        row[name] = {"forward_ms": times[name][0], "backward_ms": times[name][1]}
        if name == "ours":
            row["repeats"] = all(torch.equal(a, b) for a, b in zip(backward(), backward(), strict=True))
    ratios = [dense / ours for dense, ours in zip(times["cudnn"], times["ours"], strict=True)]
    row["dense_over_ours"] = [*ratios, sum(times["cudnn"]) / sum(times["ours"])]
    return row


def rows_of_training(heads: int, index_heads: int, tokens: int, dense: float) -> list[dict[str, object]]:
    """What training the indexer costs: in the sparse phase, over the lists; in the warm-up, over all tokens.

    Args:
        dense: ms of dense attention by cuDNN, forward and backward.
    """
    q, k = normal(1, tokens, heads, WIDTH), normal(1, tokens, KV_HEADS, WIDTH)
    queries = normal(1, tokens, index_heads, WIDTH).float().cumsum(1)
    queries /= torch.arange(1, tokens + 1, device="cuda")[:, None, None] ** 0.5
    weights = torch.rand(1, tokens, index_heads, device="cuda") * (index_heads * WIDTH) ** -0.5
    index = queries.bfloat16().requires_grad_(), normal(1, tokens, WIDTH).requires_grad_(), weights.requires_grad_()
    rows: list[dict[str, object]] = []
    for phase in ("sparse", "warm-up"):
        if phase == "sparse":
            lists, _ = ops.index_topk(*(x.detach() for x in index), topk=TOPK)
            _, lse = ops.token_sparse_attention(q, k, k, lists, return_lse=True)
            forward_ms = 0.0
        else:
            lists = None
            _, lse = ops.dense_attention(q, k, k, return_lse=True)
            forward_ms = called_ms(lambda: ops.dense_attention(q, k, k, return_lse=True))

        def loss(lists: Tensor | None = lists, lse: Tensor = lse) -> Tensor:
            return ops.indexer_kl(*index, q, k, lse, token_indices=lists)

        loss()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss()
        extra = torch.cuda.max_memory_allocated() - before
        ms = called_ms(loss)
        row = {"phase": phase, "heads": heads, "index_heads": index_heads, "tokens": tokens, "kl_ms": ms}
        row |= {"forward_ms": forward_ms, "over_dense": (forward_ms + ms) / dense, "extra_mib": extra / 2**20}
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768, 65536])
    parser.add_argument("--heads", type=int, default=64, help="query heads of the attention")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    need_gpu(parser)
    torch.manual_seed(0)
    result: dict[str, list[Any]] = {"topk": [], "attention": [], "training": [], "layer": []}
    for tokens in options.tokens:
        for heads in (16, 64):
            result["topk"].append(row_of_topk(heads, tokens))
            print(result["topk"][-1], flush=True)
        attention = row_of_attention(options.heads, tokens)
        print(attention, flush=True)
        result["attention"].append(attention)
        dense = sum(attention["cudnn"].values())
        for index_heads in (16, 64):
            for row in rows_of_training(options.heads, index_heads, tokens, dense):
                result["training"].append(row)
                print(row, flush=True)
        topk = next(row["ms"] for row in result["topk"] if (row["heads"], row["tokens"]) == (16, tokens))
        kl = next(row for row in result["training"] if row["tokens"] == tokens and row["index_heads"] == 16)["kl_ms"]
        parts = {"topk": topk, **attention["ours"], "kl": kl}
        whole = {"tokens": tokens, "parts_ms": parts, "dense_over_ours": dense / sum(parts.values())}
        result["layer"].append(whole | {"kl_share": kl / sum(parts.values())})
        print(result["layer"][-1], flush=True)
    if options.out:
        report = environment() | {"command": shlex.join(["python", *sys.argv]), "dsa": result}
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
