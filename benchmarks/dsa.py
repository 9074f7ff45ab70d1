"""Times DSA's operators: the top-k of the indexer, and attention to the selected tokens against dense cuDNN.

    python benchmarks/dsa.py [--tokens 32768 65536] [--latents] [--out FILE]

bf16, batch 1, top-k 2048, one document; the median of eager calls with the L2 cache flushed. `extra_mib`: memory beyond
the result, and beyond the gradients of a loss. `tflops`: of the scores that are computed. `fp8_ms`: with index queries
and keys in fp8, rounding them included. `fp8_recall`, on each of LISTS: the share of the tokens that bf16 selects which
fp8 selects, too, of queries that see more than k. The attention is that of `--heads` with four KV heads of width 128.
Its time depends on how much the lists of neighbouring queries share, so it is timed on the three kinds of LISTS.
`union_over_topk`: how many tokens eight neighbouring queries list together, on average, over 2048: 1 if they list the
same tokens, 8 if none twice. `dense_over_ours`: time of causal attention by cuDNN over the attention's, for the forward
pass, the backward pass and both; the indexer is not in it. `with_loss_ms`: the backward pass in which the indexer, of
16 heads, learns from the attention. `training` is the indexer's loss apart, with all its gradients, over lists of slow
queries; `over_dense`: its time and, in the warm-up, that of the dense forward pass, over cuDNN's forward and backward
pass. `layer`: top-k with 16 heads, and attention on each kind of list; `kl` is what the loss adds to its backward pass.

With `--latents` only the attention over latents of 512 columns and 64 rotated ones is timed, with 128 heads, and the
layer with 64 index heads (DeepSeek-V3.2): `tflops` are of the products with listed tokens, two forward and five
backward. FlashMLA's forward kernel is timed on the same lists, where it is installed.
"""

import argparse
import importlib.util
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.measure import called_ms, environment, need_gpu
from nsa import ops

TOPK, WIDTH, KV_HEADS = 2048, 128, 4
LAYER_HEADS = 16  # of the indexer of a layer
LATENT, ROTATED, LATENT_HEADS, LATENT_INDEX_HEADS = 512, 64, 128, 64  # DeepSeek-V3.2
NEIGHBOURS = 8  # queries whose lists are counted together: as many as share a tile of the kernels at most
# Index heads, their width, whether the queries change slowly, whether the heads have random weights.
LISTS = {
    "slow, 4 heads": (4, 64, True, False),
    "slow, 16 heads": (16, WIDTH, True, True),
    "independent": (16, WIDTH, False, True),
}


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def indexer(tokens: int, heads: int, width: int, slow: bool, weighted: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Index queries (1, T, Hi, Di), keys (1, T, Di), bf16, and weights (1, T, Hi), fp32.

    Slow queries are running means of normal ones, so neighbours select much the same tokens.
    """
    queries, weights = normal(1, tokens, heads, width), torch.ones(1, tokens, heads, device="cuda")
    if slow:
        means = queries.float().cumsum(1)
        means /= torch.arange(1, tokens + 1, device="cuda")[:, None, None] ** 0.5
        queries = means.bfloat16()
    if weighted:
        weights = torch.rand(1, tokens, heads, device="cuda") * (heads * width) ** -0.5
    return queries, normal(1, tokens, width), weights


def union_over_topk(lists: Tensor, tokens: int, neighbours: int = NEIGHBOURS, at_once: int = 256) -> float:
    """How many tokens ``neighbours`` neighbouring queries list together, on average, over the length of a list.

    Queries that are left over after whole groups do not count.

    Args:
        lists: (B, T, slots) int, with -1 where there is no token. tokens: more than any number in it.
        at_once: groups that are counted at a time, in ``at_once`` * ``tokens`` bytes.
    """
    batch, queries, slots = lists.shape
    groups = queries // neighbours
    listed, total = lists[:, : groups * neighbours].reshape(batch * groups, neighbours * slots), 0
    for part in listed.split(at_once):
        there = torch.zeros(len(part), tokens + 1, dtype=torch.bool, device=lists.device)
        there.scatter_(1, part.long().masked_fill(part < 0, tokens), True)
        total += int(there[:, :tokens].sum())
    return total / max(1, batch * groups * slots)


def share_found(found: Tensor, wanted: Tensor, at_once: int = 1024) -> float:
    """The share of the tokens in ``wanted`` (B, T, k), without -1, that the lists in ``found`` have; both ascending."""
    common = 0
    for ours, theirs in zip(found.split(at_once, 1), wanted.split(at_once, 1), strict=True):
        place = torch.searchsorted(ours.contiguous(), theirs.contiguous()).clamp_max(ours.shape[2] - 1)
        common += int((ours.gather(2, place) == theirs).sum())
    return common / wanted.numel()


def fp8_recall(tokens: int) -> dict[str, float]:
    """By kind of LISTS."""
    recall = {}
    for name, kind in LISTS.items():
        inputs = indexer(tokens, *kind)
        found, wanted = (ops.index_topk(*inputs, topk=TOPK, fp8=fp8)[0][:, TOPK:] for fp8 in (True, False))
        recall[name] = share_found(found, wanted)
    return recall


def row_of_topk(heads: int, tokens: int) -> dict[str, object]:
    inputs = normal(1, tokens, heads, WIDTH), normal(1, tokens, WIDTH), torch.rand(1, tokens, heads, device="cuda")
    ops.index_topk(*inputs, topk=TOPK)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = ops.index_topk(*inputs, topk=TOPK)
    extra = torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in found)
    del found
    ms, fp8_ms = (called_ms(lambda fp8=fp8: ops.index_topk(*inputs, topk=TOPK, fp8=fp8)) for fp8 in (False, True))
    flops = 2 * heads * WIDTH * tokens * (tokens + 1) / 2
    row = {"heads": heads, "tokens": tokens, "ms": ms, "tflops": flops / ms / 1e9, "extra_mib": extra / 2**20}
    return row | {"fp8_ms": fp8_ms, "fp8_tflops": flops / fp8_ms / 1e9, "fp8_recall": fp8_recall(tokens)}


def rows_of_attention(heads: int, tokens: int) -> list[dict[str, Any]]:
    """A row for each kind of LISTS. cuDNN is timed once."""
    q, k, v = normal(1, tokens, heads, WIDTH), normal(1, tokens, KV_HEADS, WIDTH), normal(1, tokens, KV_HEADS, WIDTH)
    for x in (q, k, v):
        x.requires_grad_()

    def times(call: Callable[[], Tensor]) -> tuple[dict[str, float], bool]:
        """ms of both passes, and whether the gradients have the same bits twice."""
        out = call()
        gradient = torch.randn_like(out)

        def backward() -> tuple[Tensor, ...]:
            return torch.autograd.grad(out, (q, k, v), gradient, retain_graph=True)

        with torch.no_grad():
            found = {"forward_ms": called_ms(call)}
        found["backward_ms"] = called_ms(backward)
        return found, all(torch.equal(a, b) for a, b in zip(backward(), backward(), strict=True))

    cudnn, _ = times(lambda: ops.dense_attention(q, k, v, backend="cudnn"))
    rows = []
    for name, kind in LISTS.items():
        lists, _ = ops.index_topk(*indexer(tokens, *kind), topk=TOPK)
        row: dict[str, Any] = {"heads": heads, "kv_heads": KV_HEADS, "tokens": tokens, "lists": name}
        row["union_over_topk"] = union_over_topk(lists, tokens)

        def attention(lists: Tensor = lists) -> Tensor:
            return ops.token_sparse_attention(q, k, v, lists)

        ours, row["repeats"] = times(attention)
        row |= {"ours": ours, "cudnn": cudnn, "with_loss_ms": backward_with_loss(q, k, v, lists)}
        ratios = [cudnn[x] / ours[x] for x in ours]
        row["dense_over_ours"] = [*ratios, sum(cudnn.values()) / sum(ours.values())]
        rows.append(row)
    return rows


def backward_with_loss(q: Tensor, k: Tensor, v: Tensor, lists: Tensor) -> float:
    """ms of the backward pass of the attention with the indexer's loss attached."""
    index = indexer(q.shape[1], LAYER_HEADS, WIDTH, True, True)
    inputs = [q, k, v, *(x.requires_grad_() for x in index), torch.ones((), device="cuda", requires_grad=True)]
    out = ops.token_sparse_attention_kl(q, k, v, lists, *inputs[3:])
    gradient = torch.randn_like(out)
    return called_ms(lambda: torch.autograd.grad(out, inputs, gradient, retain_graph=True))


def rows_of_training(heads: int, index_heads: int, tokens: int, dense: float) -> list[dict[str, object]]:
    """What training the indexer costs: in the sparse phase, over the lists; in the warm-up, over all tokens.

    Args:
        dense: ms of dense attention by cuDNN, forward and backward.
    """
    q, k = normal(1, tokens, heads, WIDTH), normal(1, tokens, KV_HEADS, WIDTH)
    index = indexer(tokens, index_heads, WIDTH, True, True)
    for x in index:
        x.requires_grad_()
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
        extra = torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in index)  # as large as the gradients
        ms = called_ms(loss)
        row: dict[str, object] = {
            "phase": phase,
            "heads": heads,
            "index_heads": index_heads,
            "tokens": tokens,
            "kl_ms": ms,
        }
        row |= {"forward_ms": forward_ms, "over_dense": (forward_ms + ms) / dense, "extra_mib": extra / 2**20}
        rows.append(row)
    return rows


def rows_of_latents(tokens: int) -> list[dict[str, Any]]:
    """Attention over latents on each kind of LISTS, with the loss and without, and the layer."""
    width = LATENT + ROTATED
    q, row = normal(1, tokens, LATENT_HEADS, width).requires_grad_(), normal(1, tokens, 1, width).requires_grad_()
    index = indexer(tokens, LATENT_INDEX_HEADS, WIDTH, True, True)
    topk_ms = called_ms(lambda: ops.index_topk(*index, topk=TOPK))
    trained = [*(x.requires_grad_() for x in index), torch.ones((), device="cuda", requires_grad=True)]
    rows = []
    for name, kind in LISTS.items():
        lists, _ = ops.index_topk(*indexer(tokens, *kind), topk=TOPK)
        products = 2 * LATENT_HEADS * int((lists >= 0).sum()) * width

        def attention(lists: Tensor = lists) -> Tensor:
            return ops.token_sparse_attention(q, row, row[..., :LATENT], lists)

        with torch.no_grad():
            ms = {"forward": called_ms(attention)}
        out = attention()
        gradient = torch.randn_like(out)

        def backward(out: Tensor = out, gradient: Tensor = gradient) -> tuple[Tensor, ...]:
            return torch.autograd.grad(out, (q, row), gradient, retain_graph=True)

        ms["backward"] = called_ms(backward)
        repeats = all(torch.equal(a, b) for a, b in zip(backward(), backward(), strict=True))
        out = ops.token_sparse_attention_kl(q, row, row[..., :LATENT], lists, *trained)
        ms["with_loss"] = called_ms(
            lambda out=out, gradient=gradient: torch.autograd.grad(out, (q, row, *trained), gradient, retain_graph=True)
        )
        del out, backward, attention
        values = LATENT / width  # of a product with values, as a share of one with keys
        flops = {"forward": products * (1 + values), "backward": products * (3 + 2 * values)}
        found: dict[str, Any] = {"heads": LATENT_HEADS, "tokens": tokens, "lists": name, "repeats": repeats, "ms": ms}
        found["union_over_topk"] = union_over_topk(lists, tokens)
        found["tflops"] = {key: flops[key] / ms[key] / 1e9 for key in flops}
        found["layer_ms"] = topk_ms + ms["forward"] + ms["with_loss"]
        rows.append(found | {"topk_ms": topk_ms, "peers": peers(q.detach(), row.detach(), lists)})
    return rows


def peers(q: Tensor, row: Tensor, lists: Tensor) -> dict[str, float | str]:
    """ms of other implementations of the forward pass, or why there are none."""
    found: dict[str, float | str] = {
        "tilelang": "has no operator: its DSA kernels are examples, outside of the package"
    }
    if importlib.util.find_spec("flash_mla") is None:
        return found | {"flash_mla": "not installed"}
    try:
        from flash_mla import flash_mla_sparse_fwd

        inputs = q[0], row[0], lists[0][:, None]
        return found | {"flash_mla": called_ms(lambda: flash_mla_sparse_fwd(*inputs, q.shape[3] ** -0.5))}
    except Exception as error:  # another version, or built for another GPU
        return found | {"flash_mla": f"{type(error).__name__}: {error}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768, 65536])
    parser.add_argument("--heads", type=int, default=64, help="query heads of the attention")
    parser.add_argument("--latents", action="store_true", help="time attention over latents, and nothing else")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    need_gpu(parser)
    torch.manual_seed(0)
    result: dict[str, list[Any]] = {"topk": [], "attention": [], "training": [], "layer": [], "latents": []}
    for tokens in options.tokens:
        if options.latents:
            result["latents"] += rows_of_latents(tokens)
            for row in result["latents"][-len(LISTS) :]:
                print(row, flush=True)
            continue
        for heads in (16, 64):
            result["topk"].append(row_of_topk(heads, tokens))
            print(result["topk"][-1], flush=True)
        attention = rows_of_attention(options.heads, tokens)
        for row in attention:
            print(row, flush=True)
        result["attention"] += attention
        dense = sum(attention[0]["cudnn"].values())
        for index_heads in (16, 64):
            for row in rows_of_training(options.heads, index_heads, tokens, dense):
                result["training"].append(row)
                print(row, flush=True)
        topk = next(row["ms"] for row in result["topk"] if (row["heads"], row["tokens"]) == (LAYER_HEADS, tokens))
        for row in attention:
            kl = row["with_loss_ms"] - row["ours"]["backward_ms"]
            parts = {"topk": topk, **row["ours"], "kl": kl}
            whole = {"tokens": tokens, "lists": row["lists"], "parts_ms": parts}
            whole["dense_over_ours"] = dense / sum(parts.values())
            result["layer"].append(whole | {"kl_share": kl / sum(parts.values())})
            print(result["layer"][-1], flush=True)
    if options.out:
        report = environment() | {"command": shlex.join(["python", *sys.argv]), "dsa": result}
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
