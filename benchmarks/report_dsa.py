"""The tables of benchmarks/dsa.py, for benchmarks/report.py."""

from collections.abc import Iterator

from benchmarks.headlines import ms, table


def dsa(result: dict | None) -> Iterator[str]:
    """The result of benchmarks/dsa.py."""
    if not result:
        return
    yield "### DSA: top-k of the indexer\n"
    cells = [[r["heads"], r["tokens"], ms(r["ms"]), r["tflops"], r["extra_mib"]] for r in result["topk"]]
    yield from table(["index heads", "tokens", "ms", "TFLOP/s", "extra MiB"], cells)
    yield "### DSA: attention to the selected tokens, against causal attention by cuDNN\n"
    cells = []
    for row in result["attention"]:
        for name in ("ours", "cudnn"):
            ratios = row["dense_over_ours"] if name == "ours" else [1, 1, 1]
            cells.append([row["tokens"], name, *map(ms, row[name].values()), *ratios])
    yield from table(["tokens", "", "forward ms", "backward ms", "cuDNN over it: forward", "backward", "both"], cells)
    yield "### DSA: the indexer's loss with its gradients\n"
    columns = ["phase", "index_heads", "tokens", "kl_ms", "forward_ms", "over_dense", "extra_mib"]
    names = ["phase", "index heads", "tokens", "loss ms", "dense forward ms", "over cuDNN's both passes", "extra MiB"]
    yield from table(names, [[row[c] for c in columns] for row in result["training"]])
    yield "### DSA: a layer's operators in the sparse phase, 16 index heads\n"
    columns = ["topk", "forward_ms", "backward_ms", "kl"]
    cells = [
        [r["tokens"], *(ms(r["parts_ms"][c]) for c in columns), r["dense_over_ours"], r["kl_share"]]
        for r in result["layer"]
    ]
    yield from table(
        ["tokens", "top-k ms", "forward ms", "backward ms", "loss ms", "cuDNN over all", "loss, share"], cells
    )
