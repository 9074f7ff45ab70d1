"""The tables of benchmarks/dsa.py, for benchmarks/report.py."""

from collections.abc import Iterator

from benchmarks.markdown import ms, table


def short(value: object) -> object:
    """A float with four digits."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def dsa(result: dict | None) -> Iterator[str]:
    """The result of benchmarks/dsa.py. Older ones have one kind of lists, which they do not name."""
    if not result:
        return
    if result.get("latents"):
        yield from latents(result["latents"])
    if result["topk"]:
        yield from grouped(result)


def latents(rows: list[dict]) -> Iterator[str]:
    yield "### DSA over latents of 512 and 64 rotated columns, 2,048 tokens chosen\n"
    yield "Layer: top-k of 64 index heads, forward pass, and backward pass with the indexer's loss.\n"
    cells = []
    for row in rows:
        times = [ms(row["ms"][name]) for name in ("forward", "backward", "with_loss")]
        rates = [short(row["tflops"][name]) for name in ("forward", "backward")]
        where = [row["heads"], row["tokens"], row["lists"], short(row["union_over_topk"])]
        cells.append([*where, *times, *rates, ms(row["layer_ms"]), row["repeats"]])
    names = ["heads", "tokens", "lists", "union", "forward ms", "backward ms", "backward with loss ms"]
    yield from table([*names, "TFLOP/s forward", "backward", "layer ms", "the same bits twice"], cells)


def grouped(result: dict) -> Iterator[str]:
    """Of keys and values in groups of heads."""
    yield "### DSA: top-k of the indexer\n"
    cells = [[r["heads"], r["tokens"], ms(r["ms"]), short(r["tflops"]), short(r["extra_mib"])] for r in result["topk"]]
    names = ["index heads", "tokens", "ms", "TFLOP/s", "extra MiB"]
    if all("fp8_ms" in row for row in result["topk"]):
        for cell, row in zip(cells, result["topk"], strict=True):
            cell += [ms(row["fp8_ms"]), f"{min(row['fp8_recall'].values()):.1%}"]
        names += ["in fp8 ms", "of bf16's tokens, at least"]
    yield from table(names, cells)
    yield "### DSA: attention to the selected tokens, against causal attention by cuDNN\n"
    kinds, cells, seen = any("lists" in row for row in result["attention"]), [], set()
    if kinds:
        yield "`union`: how many tokens eight neighbouring queries list together, on average, over k.\n"
    for row in result["attention"]:
        sharing = [row["lists"], short(row["union_over_topk"])] if kinds else []
        ratios = map(short, row["dense_over_ours"])
        cells.append([row["tokens"], "ours", *sharing, *map(ms, row["ours"].values()), *ratios])
        if row["tokens"] not in seen:  # cuDNN's do not depend on the lists
            cells.append([row["tokens"], "cudnn", *[None] * len(sharing), *map(ms, row["cudnn"].values()), 1, 1, 1])
        seen.add(row["tokens"])
    names = ["tokens", "", *["lists", "union"][: 2 * kinds], "forward ms", "backward ms"]
    yield from table([*names, "cuDNN over it: forward", "backward", "both"], cells)
    yield "### DSA: the indexer's loss with its gradients\n"
    columns = ["phase", "index_heads", "tokens", "kl_ms", "forward_ms", "over_dense", "extra_mib"]
    names = ["phase", "index heads", "tokens", "loss ms", "dense forward ms", "over cuDNN's both passes", "extra MiB"]
    yield from table(names, [[short(row[c]) for c in columns] for row in result["training"]])
    yield "### DSA: a layer's operators in the sparse phase, 16 index heads\n"
    cells = []
    for row in result["layer"]:
        times = [ms(row["parts_ms"][c]) for c in ("topk", "forward_ms", "backward_ms", "kl")]
        lists = [row["lists"]] if kinds else []
        cells.append([row["tokens"], *lists, *times, short(row["dense_over_ours"]), short(row["kl_share"])])
    names = ["tokens", *["lists"][:kinds], "top-k ms", "forward ms", "backward ms", "loss ms"]
    yield from table([*names, "cuDNN over all", "loss, share"], cells)
