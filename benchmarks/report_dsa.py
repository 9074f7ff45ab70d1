"""The tables of benchmarks/dsa.py, for benchmarks/report.py."""

from collections.abc import Iterator

from benchmarks.headlines import ms, table


def dsa(result: dict | None) -> Iterator[str]:
    """The result of benchmarks/dsa.py."""
    if not result:
        return
    yield "### DSA: top-k of the indexer\n"
    cells = [
        [r["heads"], r["tokens"], ms(r["ms"]), round(r["tflops"], 1), round(r["extra_mib"], 1)] for r in result["topk"]
    ]
    yield from table(["index heads", "tokens", "ms", "TFLOP/s", "extra MiB"], cells)
    yield "### DSA: attention to the selected tokens, against causal attention by cuDNN\n"
    cells, seen = [], set()
    kinds = any("lists" in row for row in result["attention"])
    if kinds:
        yield "`union`: how many tokens eight neighbouring queries list together, on average, over k.\n"
    for row in result["attention"]:
        sharing = [row["lists"], row["union_over_topk"]] if kinds else []
        cells.append([row["tokens"], "ours", *sharing, *map(ms, row["ours"].values()), *row["dense_over_ours"]])
        if row["tokens"] not in seen:  # does not depend on the lists
            cells.append([row["tokens"], "cudnn", *[None] * len(sharing), *map(ms, row["cudnn"].values()), 1, 1, 1])
        seen.add(row["tokens"])
    names = ["lists", "union"] if kinds else []
    yield from table(
        ["tokens", "", *names, "forward ms", "backward ms", "cuDNN over it: forward", "backward", "both"], cells
    )
    yield "### DSA: the indexer's loss with its gradients\n"
    columns = ["phase", "index_heads", "tokens", "kl_ms", "forward_ms", "over_dense", "extra_mib"]
    names = ["phase", "index heads", "tokens", "loss ms", "dense forward ms", "over cuDNN's both passes", "extra MiB"]
    yield from table(names, [[row[c] for c in columns] for row in result["training"]])
    yield "### DSA: a layer's operators in the sparse phase, 16 index heads\n"
    columns = ["topk", "forward_ms", "backward_ms", "kl"]
    cells = [
        [
            r["tokens"],
            *[r["lists"]] * kinds,
            *(ms(r["parts_ms"][c]) for c in columns),
            r["dense_over_ours"],
            r["kl_share"],
        ]
        for r in result["layer"]
    ]
    header = ["tokens", *["lists"] * kinds, "top-k ms", "forward ms", "backward ms", "loss ms", "cuDNN over all"]
    yield from table([*header, "loss, share"], cells)
