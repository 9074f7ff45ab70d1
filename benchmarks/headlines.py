"""docs/performance.md: one page of what users ask first, each figure beside the baseline that it is compared with."""

import textwrap
from collections.abc import Iterator

OPERATOR, OPERATOR_H200 = "performance-h100-632d5fe", "performance-h200-3ff4636"
GROUPS, GROUPS_H200 = "performance-groups-h100-632d5fe", "performance-groups-h200-1d7dc91"
DENSE, MODELS, STEADY = "dense-h200-2026-11-28", "models-h200-2026-11-28", "steady-h200-2026-11-29"
BARE, TRAINER, LONG, PACKED = (
    "models-packed-h200-2026-11-29",
    "training-125m-h200-2026-11-29",
    "training-32k-h100-2026-11-26",
    "training-packed-h200-2026-11-24",
)
# Aims of the project: ratios of cuDNN's dense attention to the whole operator, with indices like a trained model's;
AIMS = {
    ("A", 65536, "forward"): 5.0,
    ("A", 65536, "backward"): 6.3,
    ("A", 131072, "forward"): 6.0,
    ("A", 32768, "both"): 4.0,
    ("A", 8192, "both"): 1.0,
    ("B", 32768, "both"): 2.3,
    ("E", 32768, "both"): 1.2,
}
# of whole steps with the fastest dense attention to those with NSA (configuration, samples, tokens); and NSA's MFU.
STEP_AIMS = {("1b", 2, 8192): 1.0, ("1b", 1, 16384): 1.35, ("1b", 1, 32768): 1.9, ("1b", 1, 65536): 3.0}
MFU_AIMS = {("125m", 1, 8192): 0.27}
SHAPES = {
    "A": "64 query heads, 4 KV heads, width 128",
    "B": "32 / 8, 128",
    "C": "16 / 1, 128",
    "D": "32 / 16, 64",
    "E": "32 / 16, 128",
    "A192": "64 / 4, keys 192, values 128",
    "long": "32 / 2, 128",
    "hN": "4 N / 4, 128: N query heads to a KV head",
}
PEERS = {
    "xunhao": "XunhaoLai/native-sparse-attention-triton",
    "sfnsa": "mdy666/Scalable-Flash-Native-Sparse-Attention",
}
NAMES = {  # of engine.dense_attention, the fastest first
    "flash-attn-4": "FlashAttention-4",
    "cudnn": "cuDNN",
    "triton": "ours (Triton)",
    "flash": "FlashAttention-2 (torch's)",
}
Case = tuple[str, int, int]  # configuration, samples, tokens


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


def words(*sentences: str, indent: str = "") -> str:
    """A paragraph, with an empty line after it where the last sentence ends in a line break."""
    text = " ".join(sentences)
    lines = textwrap.fill(text, 118, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return lines + "\n" * text.endswith("\n")


def card(result: dict) -> str:
    """Which, and the commit."""
    return f"{result['device'].split()[1]} at {result['commit'][:7]}"


def source(results: dict[str, dict], *stems: str) -> str:
    """Where the figures are from."""
    first = results[stems[0]]
    versions = f"torch {first['torch']}, Triton {first['triton']}, CUDA {first['cuda']}"
    files = (f"one {card(results[s])}, {results[s]['date']}: [{s}](../benchmarks/results/{s}.md)" for s in stems)
    return words(f"Measured with {versions} on", "; ".join(files) + ".\n")


def cudnn_version(result: dict) -> str:
    """Of torch's: 9.19.0 for `cuDNN 91900`."""
    number = int(result["implementations"]["cudnn"].split()[-1])
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def page(results: dict[str, dict]) -> str:
    """From all results, by the stem of their file."""
    aims = [*missed_by_steps(results[MODELS]), missed_by_operator(results)]
    lines = [
        "# Performance\n",
        words(
            "Written by `python benchmarks/report.py`. All of it is bf16, causal, on one GPU. A ratio is the time of",
            "the baseline over ours: above 1 ours is faster. Tables, commands and notes of each measurement are in",
            "`benchmarks/results/*.md`, beside the JSON that they come from; what the plan predicts of each step is in",
            "[trainer.md](../benchmarks/results/trainer.md).\n",
        ),
        *operator(results),
        *peers(results),
        *dense(results),
        *steps(results),
        *trainer(results),
        "## What is not reached\n",
        *(words(f"- {line}", indent="  ") for line in aims),
        "- Two GPUs: not measured at these commits. None was to be had.",
        "",
        "What was tried, and why it stops there: [the notebook](log/README.md).",
    ]
    return "\n".join(lines) + "\n"


def operator(results: dict[str, dict]) -> Iterator[str]:
    """NSA's operator over dense attention."""
    newest = [row["over_cudnn"] for row in one_document(results[DENSE]) if row["implementation"] == "flash-attn-4"]
    yield "## How fast is NSA's operator, against dense attention?\n"
    yield f"![time of forward and backward, and times faster than cuDNN](images/{OPERATOR}.png)\n"
    yield words(
        "All three branches with selection, on indices like a trained model's; one document, batch 1. The baselines",
        f"are dense attention by cuDNN {cudnn_version(results[DENSE])} and by FlashAttention-2, both as torch 2.11",
        "calls them. Their gradients differ from run to run, ours repeat their bits. FlashAttention-4 was not run",
        f"here: it is {min(newest):.1f} to {max(newest):.2f} times as fast as cuDNN (below).\n",
    )
    other = {(run["shape"], run["tokens"]): run["total"]["trained"] for run in results[OPERATOR_H200]["runs"]}
    rows: list[list[object]] = []
    for run in sorted(results[OPERATOR]["runs"], key=lambda run: (run["shape"], run["tokens"])):
        row = run["total"]["trained"]
        against = (row["vs"].get(name) for name in ("cudnn", "flash"))
        directions = ("forward", "backward", "both")
        cells = [" / ".join(f"{entry[d]:.1f}" for d in directions) if entry else None for entry in against]
        beside = f"{other[run['shape'], run['tokens']]['vs']['cudnn']['both']:.1f}"
        rows.append([f"{run['shape']} {length(run['tokens'])}", ms(row["both"]), *cells, beside])
    header = ["shape, tokens", "ours, H100, ms", "over cuDNN, H100: forward / backward / both"]
    yield from table([*header, "over FlashAttention-2, H100", "over cuDNN, H200, both"], rows)
    yield "A: 64 query heads on 4 KV heads of 128; A192: keys of 192; B: 32 on 8 of 128; E: 32 on 16 of 128.\n"
    yield source(results, OPERATOR, OPERATOR_H200)


def peers(results: dict[str, dict]) -> Iterator[str]:
    """NSA's operator over that of others."""
    yield "## And against other public NSA kernels?\n"
    yield words(
        "Their time over that of our call of the same function, both passes, asked for by the host, on what each",
        "selects itself; 4 KV heads of 128, 32K tokens. Whether their bits repeat was not tested.",
        "Flash-linear-attention was not run here.\n",
    )
    runs = sorted(results[GROUPS]["runs"], key=lambda run: int(run["shape"][1:]))
    rows: list[list[object]] = []
    for peer, name in PEERS.items():
        by = {run["shape"]: run["peers"][peer] for run in runs}
        version = next(iter(by.values()))["version"].split("@")[1]
        rows.append([f"{name} ({version})", *(f"{e['stages']['total']['ratio']['both']:.2f}" for e in by.values())])
    yield from table(["H100; query heads to a KV head:", *(run["shape"][1:] for run in runs)], rows)
    ratios = [
        entry["stages"]["total"]["ratio"]["both"]
        for run in results[GROUPS_H200]["runs"]
        for entry in run["peers"].values()
    ]
    yield words(f"On an H200 they take {min(ratios):.2f} to {max(ratios):.2f} times as long as ours.\n")
    yield source(results, GROUPS, GROUPS_H200)


def one_document(result: dict) -> list[dict]:
    return [row for row in result["dense_attention"] if row["packing"] == "one"]


def dense(results: dict[str, dict]) -> Iterator[str]:
    """Dense attention with borders by every implementation."""
    result = results[DENSE]
    yield "## How fast is dense attention with document borders?\n"
    yield words(
        f"Forward and backward. The baseline is cuDNN {cudnn_version(result)} without borders; one document fills the",
        "sample; 8K / 32K tokens. `engine.dense_attention` names the implementation; `auto` takes the first of",
        "FlashAttention-4, cuDNN and our kernel that is installed and can. Where documents differ in length, cuDNN",
        "cannot.\n",
    )
    rows = one_document(result)
    base = {
        (row["shape"], row["tokens"]): row["forward_ms"] + row["backward_ms"]
        for row in result["dense_attention"]
        if row["packing"] == "none"
    }
    ratios: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        ratio = base[row["shape"], row["tokens"]] / (row["forward_ms"] + row["backward_ms"])
        ratios.setdefault(row["shape"], {}).setdefault(row["implementation"], []).append(f"{ratio:.2f}")
    lines: list[list[object]] = [[shape, *(" / ".join(by[name]) for name in NAMES)] for shape, by in ratios.items()]
    same = ("yes" if all(r["repeats"] for r in rows if r["implementation"] == name) else "no" for name in NAMES)
    version = result["implementations"]["flash-attn-4"].removeprefix("flash-attn-4 ")
    header = [f"{name} {version}" if key == "flash-attn-4" else name for key, name in NAMES.items()]
    yield from table(["query / KV heads, width", *header], [*lines, ["the same bits in two runs", *same]])
    times: dict[str, list[float]] = {}
    for row in result["dense_attention"]:
        if row["packing"] == "packed":
            times.setdefault(row["implementation"], []).append(row["forward_ms"] + row["backward_ms"])
    older = [a / b for a, b in zip(times["flash"], times["triton"], strict=True)]
    newer = [a / b for a, b in zip(times["triton"], times["flash-attn-4"], strict=True)]
    yield words(
        "Of packed documents (1024 tokens on average) cuDNN is not used. Ours is there",
        f"{min(older):.1f} to {max(older):.1f} times as fast as FlashAttention-2, and FlashAttention-4",
        f"{min(newer):.1f} to {max(newer):.1f} times as fast as ours.\n",
    )
    yield source(results, DENSE)


def cases(result: dict) -> dict[Case, dict[str, dict]]:
    """Whole steps without accumulation: rows by `nsa` or the implementation of dense attention."""
    found: dict[Case, dict[str, dict]] = {}
    for row in result["models"]:
        if "accumulate" not in row and "ms" in row:
            name = row.get("dense_attention", row["attention"])
            found.setdefault((row["config"], row["samples"], row["tokens"]), {})[name] = row
    return found


def fastest(by: dict[str, dict]) -> dict:
    """The dense row of a case."""
    return min((row for name, row in by.items() if name != "nsa"), key=lambda row: row["ms"])


def named(case: Case) -> str:
    return f"{case[0]}, {case[1]} x {length(case[2])}"


def steps(results: dict[str, dict]) -> Iterator[str]:
    """Whole steps with NSA and with dense attention."""
    result = results[MODELS]
    found = cases(result)
    assert all(fastest(by)["dense_attention"] == "flash-attn-4" for by in found.values())
    version = result["flash_attn_4"].removeprefix("flash-attn-4 ")
    yield "## How fast are whole training steps?\n"
    yield f"![MFU of whole steps, and NSA over dense attention](images/{MODELS}.png)\n"
    yield words(
        "Forward, backward and AdamW by CUDA graphs, without DeepSpeed, nothing recomputed, one document a sample. MFU",
        "counts what the attention needs, of 989.5 TFLOP/s. The baseline is the same model with the fastest dense",
        f"attention there is here, FlashAttention-4 {version}; beside it by cuDNN. Neither repeats its bits; NSA's",
        "kernels do.\n",
    )
    lines: list[list[object]] = []
    for case, by in found.items():
        nsa, best, cudnn = by["nsa"], fastest(by), by.get("cudnn")
        cells = [f"{row['ms']:.1f} ({row['mfu']:.1%})" if row else None for row in (nsa, best, cudnn)]
        ratios = [f"{row['ms'] / nsa['ms']:.2f}" if row else None for row in (best, cudnn)]
        lines.append([named(case), *cells, *ratios, STEP_AIMS.get(case)])
    header = [
        "samples x tokens",
        "NSA ms (MFU)",
        "FlashAttention-4",
        "cuDNN",
        "NSA over FlashAttention-4",
        "over cuDNN",
    ]
    yield from table([*header, "aim, over the fastest"], lines)
    yield source(results, MODELS)


def trainer(results: dict[str, dict]) -> Iterator[str]:
    """The trainer: its pace, and beside the bare model."""
    steady = results[STEADY]["steady"]
    whole = {row["attention"]: row for row in results[TRAINER]["training"]}
    bare = {(row["attention"], row.get("dense_attention")): row for row in results[BARE]["models"]}
    alone = {"nsa": bare["nsa", None], "dense": bare["dense", "triton"]}
    packed = {row["attention"]: row for row in results[PACKED]["training"] if row["config"] == "125m"}
    long = results[LONG]["training"][0]
    yield "## How fast is the trainer, and does it keep its pace?\n"
    yield words(
        "The trainer is DeepSpeed with ZeRO 1. All samples are packed of the same texts. MFU counts a sample as one",
        "document, which flatters packed ones. Dense attention is our Triton kernel, but for one row.\n",
    )

    def cell(row: dict) -> str:
        return f"{row['tokens_per_s']:,} ({row.get('mfu_sparse', row.get('mfu')):.1%})"

    fastest = cell(bare["dense", "flash-attn-4"])
    rows: list[list[object]] = [
        ["trainer, 125m, 4 micro batches of 8 x 4K", card(results[TRAINER]), *(cell(row) for row in whole.values())],
        ["bare model, the same samples", card(results[BARE]), *(cell(row) for row in alone.values())],
        ["bare model, the same samples, FlashAttention-4", card(results[BARE]), None, fastest],
        ["trainer, 125m, 1 x 16K", card(results[PACKED]), cell(packed["nsa"]), cell(packed["dense"])],
        ["trainer, 1b, 1 x 32K, all recomputed", card(results[LONG]), cell(long), None],
    ]
    yield from table(["", "one card", "NSA tokens/s (MFU)", "dense tokens/s (MFU)"], rows)
    shares = {kind: whole[kind]["tokens_per_s"] / alone[kind]["tokens_per_s"] for kind in whole}
    yield words(
        f"Over the bare model with the same attention, the trainer reaches {shares['nsa']:.3f} of its tokens/s with",
        f"NSA and {shares['dense']:.3f} with dense attention. At 4K, NSA is slower than dense attention.\n",
    )
    yield words(
        f"Pace ({steady['config']}, {steady['attention'].upper()}, {steady['tokens_per_step']:,} tokens a step):",
        f"{steady['first']:,} tokens/s in steps 100 to 600, {steady['last']:,} in steps 2,500 to 3,000, which is",
        f"{steady['ratio']:.3f} of it. Before c81e5c6 the pace fell from 522,000 to 421,000 within 700 steps.\n",
    )
    yield source(results, TRAINER, BARE, STEADY, PACKED, LONG)


def missed_by_steps(result: dict) -> Iterator[str]:
    found = cases(result)
    for case, aim in MFU_AIMS.items():
        if (mfu := found[case]["nsa"]["mfu"]) < aim:
            yield (
                f"NSA, {named(case)}: {100 * mfu:.1f} % MFU, the aim is {100 * aim:.0f} %. Over half of its step is "
                "attention, whose kernels have few programs at that length."
            )
    ratios = {case: fastest(found[case])["ms"] / found[case]["nsa"]["ms"] for case in STEP_AIMS}
    short = [f"{r:.2f} at {named(c)} (aim {STEP_AIMS[c]:g})" for c, r in ratios.items() if r < STEP_AIMS[c]]
    if short:
        yield f"NSA over FlashAttention-4 in whole steps, one {card(result)}: {', '.join(short)}."


def missed_by_operator(results: dict[str, dict]) -> str:
    cards = []
    for stem in (OPERATOR, OPERATOR_H200):
        runs = {(run["shape"], run["tokens"]): run["total"]["trained"]["vs"]["cudnn"] for run in results[stem]["runs"]}
        short = [
            f"{shape} {length(tokens)} {direction} {runs[shape, tokens][direction]:.2f} (aim {aim:g})"
            for (shape, tokens, direction), aim in AIMS.items()
            if runs[shape, tokens][direction] < aim
        ]
        cards.append(f"one {card(results[stem])}: {', '.join(short)}")
    return f"The operator over cuDNN, {'; '.join(cards)}."
