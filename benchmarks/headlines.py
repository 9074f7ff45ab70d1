"""docs/performance.md: one page of what users ask first, each figure beside the baseline that it is compared with."""

from collections.abc import Iterator

OPERATOR, DENSE, MODELS = "performance-h100-632d5fe", "dense-h200-2026-11-28", "models-h200-2026-11-28"
STEADY, GROUPS = "steady-h200-2026-11-29", "performance-groups-h100-632d5fe"
MISSED = """## What is not reached

- NSA, 125m at 1 x 8K: 25.2 % MFU, the aim is 27 %. Over half of its step is attention, whose kernels have few programs
  at that length.
- Whole steps of 1b, NSA over the fastest dense: the aims are 1.0 at 8K, 1.35 at 16K, 1.9 at 32K and 3 at 64K.
- The operator, one H100 at 632d5fe, over cuDNN: 32K both passes 3.7 (aim 4), 64K forward 4.3 (5), backward 6.15 (6.3).
- Two GPUs: not measured since the gradients of tensor-parallel ranks travel in one message.
- The trainer beside the bare model on the same documents: not measured yet. On packed text it reaches 312,100 tokens/s
  (125m, 4 micro batches of 8 x 4096, ZeRO 1), the bare model on samples of one document each 301,600. The packed
  documents are shorter, which flatters the trainer.

What was tried and why it stops there: `docs/log.md`.
"""


def table(header: list[str], rows: list[list[object]]) -> Iterator[str]:
    yield "| " + " | ".join(header) + " |"
    yield "|" + "|".join(["---"] + ["--:"] * (len(header) - 1)) + "|"
    for row in rows:
        yield "| " + " | ".join("-" if cell is None else str(cell) for cell in row) + " |"
    yield ""


def length(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else f"{tokens:,}"


def ms(value: float | None) -> str | None:
    if not value:
        return None
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def page(results: dict[str, dict]) -> str:
    """From all results, by the stem of their file."""
    lines = [
        "# Performance",
        "",
        "Written by `python benchmarks/report.py`; bf16, causal, one GPU. Each figure names what it",
    ]
    lines += ["is compared with. All tables are in `benchmarks/results/*.md`, beside the JSON that they come from.", ""]
    lines += operator(results[OPERATOR], results[GROUPS])
    lines += dense(results[DENSE])
    lines += steps(results[MODELS])
    lines += pace(results[STEADY])
    return "\n".join([*lines, MISSED])


def source(name: str, result: dict) -> str:
    versions = f"torch {result['torch']}, Triton {result['triton']}"
    return f"{result['device']}, {versions}, commit {result['commit'][:7]}: `{name}`."


def operator(result: dict, groups: dict) -> Iterator[str]:
    yield "## How fast is NSA's operator?\n"
    yield f"![time of forward and backward, and times faster than cuDNN](images/{OPERATOR}.png)\n"
    yield "Times of cuDNN's dense attention, forward / backward / both, on indices like a trained model's; and of"
    yield "FlashAttention-2's, both. The two are torch's. Their gradients differ in the last bits from run to run; ours"
    yield "repeat.\n"
    rows = []
    for run in result["runs"]:
        against = run["total"]["trained" if "trained" in run["total"] else next(iter(run["total"]))]["vs"]
        cudnn = " / ".join(f"{against['cudnn'][d]:.1f}" for d in ("forward", "backward", "both"))
        rows.append([f"{run['shape']} {length(run['tokens'])}", cudnn, against.get("flash", {}).get("both")])
    yield from table(["shape, tokens", "over cuDNN", "over FlashAttention-2"], rows)
    yield "A: 64 query heads on 4 KV heads of 128; B: 32 / 8, 128; E: 32 / 16, 128; A192: keys of 192, values of 128."
    peers = [
        stages["total"]["ratio"]["both"]
        for run in groups["runs"]
        for peer in run["peers"].values()
        if "total" in (stages := peer.get("stages", {}))
    ]
    slower = f"{min(peers):.2f} to {max(peers):.2f} times"
    yield f"The other public kernels that ran there take {slower} as long as ours (1 to 32 query heads on a KV head,"
    yield "32K tokens, each on what it selects itself).\n"
    yield source(f"{OPERATOR}.json", result) + "\n"


def dense(result: dict) -> Iterator[str]:
    yield "## How fast is dense attention with document borders?\n"
    yield "Forward + backward, cuDNN's time without borders over each; one document fills the sample."
    yield "`engine.dense_attention` names them; `auto` takes the first of FlashAttention-4, cuDNN and our kernel that"
    yield "is here and can.\n"
    rows = [row for row in result["dense_attention"] if row["packing"] == "one"]
    names = {"flash-attn-4": "FlashAttention-4 4.0.0b36", "cudnn": "cuDNN", "triton": "ours (Triton)"}
    names |= {"flash": "FlashAttention-2 (torch)"}
    by = {(row["shape"], row["tokens"], row["implementation"]): row.get("over_cudnn") for row in rows}
    cases = dict.fromkeys((row["shape"], row["tokens"]) for row in rows)
    lines: list[list[object]] = [[f"{s}; {length(t)}", *(by.get((s, t, name)) for name in names)] for s, t in cases]
    repeats = {row["implementation"]: "yes" if row["repeats"] else "no" for row in rows}
    yield from table(
        ["query / KV heads, width; tokens", *names.values()],
        [*lines, ["the same bits in two runs", *(repeats.get(name) for name in names)]],
    )
    yield "Packed documents of different length: cuDNN is not used; ours is 1.3 to 1.5 times as fast as"
    yield "FlashAttention-2, and FlashAttention-4 1.1 to 1.4 times as fast as ours.\n"
    yield source(f"{DENSE}.json", result) + "\n"


def steps(result: dict) -> Iterator[str]:
    yield "## How fast are whole training steps?\n"
    yield "Forward, backward and AdamW by CUDA graphs, nothing recomputed, one document a sample. MFU counts what the"
    yield "attention needs, of 989.5 TFLOP/s. NSA beside dense attention by FlashAttention-4 4.0.0b36, and by cuDNN:\n"
    rows = [row for row in result["models"] if "accumulate" not in row]
    found: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        name = row.get("dense_attention", row["attention"])
        found.setdefault((row["config"], row["samples"], row["tokens"]), {})[name] = row
    lines: list[list[object]] = []
    for (config, samples, tokens), by in found.items():
        nsa, best, cudnn = (by.get(name) for name in ("nsa", "flash-attn-4", "cudnn"))
        assert nsa
        cells = [f"{row['ms']:.0f} ({row['mfu']:.1%})" if row else None for row in (nsa, best, cudnn)]
        ratios = [f"{row['ms'] / nsa['ms']:.2f}" if row else None for row in (best, cudnn)]
        lines.append([f"{config}, {samples} x {length(tokens)}", *cells, *ratios])
    header = ["", "NSA ms (MFU)", "FlashAttention-4", "cuDNN", "NSA faster than FA-4 by", "than cuDNN"]
    yield from table(header, lines)
    yield source(f"{MODELS}.json", result) + "\n"


def pace(result: dict) -> Iterator[str]:
    steady = result["steady"]
    yield "## Does the trainer keep its pace?\n"
    run = f"{steady['config']} ({steady['attention']}), {steady['tokens_per_step']:,} tokens a step"
    yield f"{run}, DeepSpeed with ZeRO 1: {steady['first']:,} tokens/s in steps 100 to 600,"
    yield f"{steady['last']:,} in steps 1,900 to 2,400, which is {steady['ratio']:.3f} of it. The run ended there, by a"
    yield "time limit. Before c81e5c6 the pace fell from 522,000 to 421,000 within 700 steps.\n"
    yield source(f"{STEADY}.json", result) + "\n"
