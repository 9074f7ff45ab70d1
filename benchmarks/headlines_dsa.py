"""What docs/performance.md says of DSA's operators."""

from collections.abc import Iterator

from benchmarks.markdown import length, ms, source, table, words

DSA = "dsa-h200-2026-11-30"
DSA_LATENTS = "dsa-latents-h200-2026-11-30"
LAYER_AIMS, LOSS_AIM = {65536: 1.5, 131072: 3.0}, 0.15  # of a DSA layer: dense over it, and the share of its loss
LATENTS_AIM = 350.0  # TFLOP/s of the forward pass


def sparse_tokens(results: dict[str, dict]) -> Iterator[str]:
    """DSA's operators, and what was aimed at."""
    result, latents = results[DSA]["dsa"], results[DSA_LATENTS]["dsa"]["latents"]
    yield "## DSA's operators\n"
    yield words(
        "The table times a DSA layer, forward and backward: 64 query heads on 4 KV heads of 128; 16 index heads of 128",
        "choose 2,048 tokens per query; the backward pass of the attention also computes the indexer's loss. The",
        "baseline is dense attention by cuDNN, forward and backward. The *union* is the number of different tokens",
        "that eight neighbouring queries list together, over the number that one query lists. The larger the union,",
        "the slower is the attention. The tokens that a small trained model attends to most have a union of two to",
        "three ([log](log/2026-11.md)).\n",
    )
    union = {(row["tokens"], row["lists"]): row["union_over_topk"] for row in result["attention"]}
    rows: list[list[object]] = []
    for row in result["layer"]:
        times = [ms(row["parts_ms"][name]) for name in ("topk", "forward_ms", "backward_ms", "kl")]
        name = f"{length(row['tokens'])}, {union[row['tokens'], row['lists']]:.1f}"
        over = f"{row['dense_over_ours']:.2f}"
        rows.append([name, *times, over, LAYER_AIMS.get(row["tokens"]), f"{row['kl_share']:.0%}", f"{LOSS_AIM:.0%}"])
    header = ["tokens, union", "top-k ms", "forward", "backward", "loss", "dense over all", "its target", "loss, share"]
    yield from table([*header, "its target"], rows)
    topk = {(row["heads"], row["tokens"]): row for row in result["topk"]}
    warm = {(row["index_heads"], row["tokens"]): row for row in result["training"] if row["phase"] == "warm-up"}
    rows = [
        ["top-k, 16 index heads, 64K", f"{topk[16, 65536]['ms']:.1f} ms", "35"],
        ["top-k, 64 index heads, 32K", f"{latents[0]['topk_ms']:.1f} ms", "26"],
        [
            "memory of the top-k beyond its result, at most",
            f"{max(r['extra_mib'] for r in topk.values()):.0f} MiB",
            "256",
        ],
        *(
            [f"warm-up with {heads} index heads, 64K, over dense", f"{warm[heads, 65536]['over_dense']:.2f}", aim]
            for heads, aim in ((16, "1.0"), (64, "1.4"))
        ),
        ["memory of the warm-up beyond the gradients", f"{warm[64, 65536]['extra_mib']:.0f} MiB", "1 GB"],
    ]
    yield from table(["", "measured", "target"], rows)
    yield words(
        "The next table is for latents, without atomic additions (DeepSeek-V3.2: 128 heads on one key of 576 columns,",
        "2,048 of 32K tokens, 64 index heads):\n",
    )
    rows = [
        [
            f"{row['union_over_topk']:.1f}",
            *(f"{row['tflops'][x]:.0f}" for x in ("forward", "backward")),
            ms(row["layer_ms"]),
        ]
        for row in latents
    ]
    header = [
        "union",
        "forward TFLOP/s (target 350)",
        "backward (target 200)",
        "layer with top-k and loss, ms (target 290)",
    ]
    yield from table(header, rows)
    yield source(results, DSA, DSA_LATENTS)


def missed_by_dsa(results: dict[str, dict]) -> Iterator[str]:
    """Targets that are missed, a sentence a kind."""
    result, latents = results[DSA]["dsa"], results[DSA_LATENTS]["dsa"]["latents"]
    union = {(row["tokens"], row["lists"]): f"{row['union_over_topk']:.1f}" for row in result["attention"]}
    slow, shares = [], []
    for row in result["layer"]:
        aim, where = (
            LAYER_AIMS.get(row["tokens"], 0.0),
            f"{length(row['tokens'])} union {union[row['tokens'], row['lists']]}",
        )
        if row["dense_over_ours"] < aim:
            slow.append(f"{row['dense_over_ours']:.2f} at {where} (target {aim:g})")
        if row["kl_share"] > LOSS_AIM:
            shares.append(f"{row['kl_share']:.0%} at {where}")
    if slow:
        yield f"A DSA layer over dense attention by cuDNN: {', '.join(slow)}."
    if shares:
        yield f"The share of the indexer's loss in a DSA layer: {', '.join(shares)} (target {LOSS_AIM:.0%})."
    low = [row for row in latents if row["tflops"]["forward"] < LATENTS_AIM]
    rates = [f"{row['tflops']['forward']:.0f} TFLOP/s at union {row['union_over_topk']:.1f}" for row in low]
    if rates:
        yield f"DSA's forward pass over latents: {', '.join(rates)} (target {LATENTS_AIM:g})."
