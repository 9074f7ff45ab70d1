"""docs/performance.md: one page of what users ask first, each figure beside the baseline that it is compared with."""

from collections.abc import Iterator

from benchmarks.headlines_dsa import missed_by_dsa, sparse_tokens
from benchmarks.markdown import card, length, ms, source, table, words

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
TWO_AIMS = {"data": 1.9, "tensor": 1.6, "context": 1.7}
# Aims of the project: the fastest dense call over this one, at 65,536 tokens and batch 8; milliseconds of a token.
DECODE_AIMS = {
    ("B", "quest"): 6.0,
    ("B", "quest_fp8"): 6.0,
    ("B", "twilight"): 6.0,
    ("A", "nsa"): 6.0,
    ("latent", "latent_dsa"): 3.0,
}
TOKEN_AIMS = {"nsa": 1.3, "dense": 1.4}  # ms, one sequence
BATCHED_AIM = 1.3  # dense over NSA, four sequences
PREFILL_AIM = 9.0  # cuDNN's time over choice and attention, at 65,536 tokens and a tenth of the pairs
DECODED = {"A": "64 query heads on 4 of 128", "B": "32 on 8 of 128", "latent": "latents, 128 heads"}
SHAPES = {
    "A": "64 query heads, 4 KV heads, head dimension 128",
    "B": "32 / 8, 128",
    "C": "16 / 1, 128",
    "D": "32 / 16, 64",
    "E": "32 / 16, 128",
    "A192": "64 / 4, keys 192, values 128",
    "long": "32 / 2, 128",
    "hN": "4 N / 4, 128: N query heads to a KV head",
}
SCALING = "scaling-h200-2026-11-30"
DECODE = ("decode-64k-a8d9eb0-h200-2026-12-01", "decode-64k-h200-2026-12-01")  # a call's time is that of the first
DECODER_STEPS = "decode-1b-h200-2026-12-01"
PREFILL = "prefill-h200-2026-11-30"
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


def cudnn_version(result: dict) -> str:
    """Of torch's: 9.19.0 for `cuDNN 91900`."""
    number = int(result["implementations"]["cudnn"].split()[-1])
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def page(results: dict[str, dict]) -> str:
    """From all results, by the stem of their file."""
    aims = [*missed_by_steps(results[MODELS]), missed_by_operator(results), *missed_by_dsa(results)]
    aims += missed_by_decoding(decoded(results), results[DECODER_STEPS]["decode"]["decoder"])
    lines = [
        "# Performance\n",
        words(
            "Written by `python benchmarks/report.py`. All measurements are in bf16, with a causal mask, on one GPU",
            "unless noted, with torch 2.11 and Triton 3.6. The versions that `pyproject.toml` pins now were not",
            "measured. A ratio is the time of the baseline over our time: above 1 ours is faster. Each measurement has",
            "a page in `benchmarks/results`, with its commands, tables and notes, beside the JSON file of the data.\n",
        ),
        *operator(results),
        *peers(results),
        *dense(results),
        *steps(results),
        *trainer(results),
        *sparse_tokens(results),
        *several(results),
        *prefilling(results),
        *decoding(results),
        "## Targets missed\n",
        "The targets were set by the project before the work.\n",
        *(words(f"- {line}", indent="  ") for line in aims),
        "",
        words(
            "The [log](log/README.md) says what was tried to reach the targets.",
            "[trainer.md](../benchmarks/results/trainer.md) compares each step with the prediction of the plan.",
        ),
    ]
    return "\n".join(lines) + "\n"


def operator(results: dict[str, dict]) -> Iterator[str]:
    """NSA's operator over dense attention."""
    newest = [row["over_cudnn"] for row in one_document(results[DENSE]) if row["implementation"] == "flash-attn-4"]
    yield "## NSA's operator against dense attention\n"
    yield words(
        "The time of NSA's operator covers compressed attention, selection, selected attention, window and the gated",
        "sum, without projections and without the compression MLP. The inputs select blocks as a trained model does;",
        "one document, batch 1. Shapes: A has 64 query heads on 4 KV heads of 128, A192 the same with keys of 192, B",
        "32 query heads on 8 KV heads of 128, and E 32 on 16 of 128.\n",
    )
    yield f"![time of forward and backward, and times faster than cuDNN](images/{OPERATOR}.png)\n"
    yield words(
        f"The baselines are dense attention by cuDNN {cudnn_version(results[DENSE])} and by FlashAttention-2, both as",
        "called by torch 2.11. Their backward passes are not deterministic; ours is. FlashAttention-4 was not run on",
        "these shapes. Over FlashAttention-4 the ratios would be smaller: on an H200, on the shapes of [dense",
        f"attention](#dense-attention), it is {min(newest):.1f} to {max(newest):.2f} times as fast as cuDNN.\n",
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
    yield "Speed-ups are those of forward / backward / both together. FlashAttention-2 ran up to 64K tokens.\n"
    header = ["shape, tokens", "NSA ms, both, H100", "speed-up over cuDNN, H100", "over FlashAttention-2, H100"]
    yield from table([*header, "over cuDNN, both, H200"], rows)
    yield source(results, OPERATOR, OPERATOR_H200)


def peers(results: dict[str, dict]) -> Iterator[str]:
    """NSA's operator over that of others."""
    yield "## NSA's operator against other public NSA kernels\n"
    yield words(
        "The table has the time of other implementations of the same function over our time: forward and backward,",
        "eager launches, each implementation with its own selection; 4 KV heads of 128, 32K tokens. Whether the others",
        "are deterministic was not tested. Flash-linear-attention was not run here.\n",
    )
    runs = sorted(results[GROUPS]["runs"], key=lambda run: int(run["shape"][1:]))
    rows: list[list[object]] = []
    for peer, name in PEERS.items():
        by = {run["shape"]: run["peers"][peer] for run in runs}
        version = next(iter(by.values()))["version"].split("@")[1]
        rows.append([f"{name} ({version})", *(f"{e['stages']['total']['ratio']['both']:.2f}" for e in by.values())])
    yield from table(["H100; query heads per KV head:", *(run["shape"][1:] for run in runs)], rows)
    ratios = [
        entry["stages"]["total"]["ratio"]["both"]
        for run in results[GROUPS_H200]["runs"]
        for entry in run["peers"].values()
    ]
    yield words(f"On an H200 the others take {min(ratios):.2f} to {max(ratios):.2f} times as long as ours.\n")
    yield source(results, GROUPS, GROUPS_H200)


def one_document(result: dict) -> list[dict]:
    return [row for row in result["dense_attention"] if row["packing"] == "one"]


def dense(results: dict[str, dict]) -> Iterator[str]:
    """Dense attention with document boundaries by every implementation."""
    result = results[DENSE]
    yield "## Dense attention\n"
    yield words(
        "These are the implementations behind `engine.dense_attention`. On Hopper, `auto` uses the first that is",
        "installed and supports the inputs: FlashAttention-4, cuDNN, our Triton kernel. cuDNN is not used if documents",
        "differ in length. `.venv/bin/pip install -e '.[flash4]'` installs FlashAttention-4.\n",
    )
    yield words(
        "The table has speed-ups, forward and backward together, at 8K / 32K tokens. Each implementation is given",
        f"document boundaries, and one document fills the sample. The baseline is cuDNN {cudnn_version(result)}",
        "without boundaries.\n",
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
    yield from table(["query / KV heads, head dimension", *header], [*lines, ["deterministic", *same]])
    times: dict[str, list[float]] = {}
    for row in result["dense_attention"]:
        if row["packing"] == "packed":
            times.setdefault(row["implementation"], []).append(row["forward_ms"] + row["backward_ms"])
    older = [a / b for a, b in zip(times["flash"], times["triton"], strict=True)]
    newer = [a / b for a, b in zip(times["triton"], times["flash-attn-4"], strict=True)]
    yield words(
        "On packed documents (1024 tokens on average) our kernel is",
        f"{min(older):.1f} to {max(older):.1f} times as fast as FlashAttention-2, and FlashAttention-4",
        f"{min(newer):.1f} to {max(newer):.1f} times as fast as our kernel.\n",
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
    yield "## Whole training steps, one document per sample\n"
    yield f"![MFU of whole steps, and NSA over dense attention](images/{MODELS}.png)\n"
    yield words(
        "A step is forward, backward and AdamW as CUDA graphs, without DeepSpeed and without recomputation. The",
        f"baselines are the same model with dense attention by FlashAttention-4 {version}, the fastest measured here,",
        "and by cuDNN. Neither is deterministic; NSA's kernels are. MFU counts the FLOPs that the configured attention",
        "needs, over 989.5 TFLOP/s. NSA needs fewer FLOPs, so its MFU is lower even where its step is faster.\n",
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
    yield from table([*header, "target, over FlashAttention-4"], lines)
    yield source(results, MODELS)


def trainer(results: dict[str, dict]) -> Iterator[str]:
    """The trainer: its throughput over time, and beside the bare model."""
    steady = results[STEADY]["steady"]
    whole = {row["attention"]: row for row in results[TRAINER]["training"]}
    bare = {(row["attention"], row.get("dense_attention")): row for row in results[BARE]["models"]}
    alone = {"nsa": bare["nsa", None], "dense": bare["dense", "triton"]}
    packed = {row["attention"]: row for row in results[PACKED]["training"] if row["config"] == "125m"}
    long = results[LONG]["training"][0]
    yield "## The trainer, on packed documents\n"
    yield words(
        "The trainer runs DeepSpeed with ZeRO 1; the bare model runs without DeepSpeed. All samples are packed from",
        "the same texts. Dense attention is our Triton kernel, except in the FlashAttention-4 row. MFU is counted as",
        "if each sample were one document, so it is too high here.\n",
    )

    def cell(row: dict) -> str:
        return f"{row['tokens_per_s']:,} ({row.get('mfu_sparse', row.get('mfu')):.1%})"

    def over(by: dict[str, dict]) -> str:
        return f"{by['nsa']['tokens_per_s'] / by['dense']['tokens_per_s']:.2f}"

    newest = bare["dense", "flash-attn-4"]
    beside = over({"nsa": alone["nsa"], "dense": newest})
    rows: list[list[object]] = [
        ["trainer, 125m, 4 micro batches of 8 x 4K", card(results[TRAINER]), *map(cell, whole.values()), over(whole)],
        ["bare model, the same samples", card(results[BARE]), *map(cell, alone.values()), over(alone)],
        ["bare model, the same samples, FlashAttention-4", card(results[BARE]), None, cell(newest), beside],
        ["trainer, 125m, 1 x 16K", card(results[PACKED]), cell(packed["nsa"]), cell(packed["dense"]), over(packed)],
        ["trainer, 1b, 1 x 32K, full recomputation", card(results[LONG]), cell(long), None, None],
    ]
    yield from table(["", "one GPU", "NSA tokens/s (MFU)", "dense tokens/s (MFU)", "NSA over dense"], rows)
    shares = {kind: whole[kind]["tokens_per_s"] / alone[kind]["tokens_per_s"] for kind in whole}
    yield words(
        f"**Short packed documents are slower with NSA**: at 8 x 4K the trainer with NSA has {over(whole)} of the",
        f"speed of our dense kernel, and the bare model has {beside} of the speed of FlashAttention-4. The trainer",
        f"reaches {shares['nsa']:.3f} of the tokens/s of the bare model with NSA, and {shares['dense']:.3f} with dense",
        "attention.\n",
    )
    yield words(
        f"Throughput over time ({steady['config']}, {steady['attention'].upper()}, {steady['tokens_per_step']:,}",
        f"tokens per step, `python benchmarks/steady.py`): {steady['first']:,} tokens/s in steps 100 to 600,",
        f"{steady['last']:,} in steps 2,500 to 3,000 (ratio {steady['ratio']:.3f}).\n",
    )
    yield source(results, TRAINER, BARE, STEADY, PACKED, LONG)


def several(results: dict[str, dict]) -> Iterator[str]:
    """The trainer on two GPUs, over one."""
    result, what = (
        results[SCALING],
        {"data": "data parallel", "tensor": "tensor parallel", "context": "context parallel"},
    )
    yield "## Two GPUs\n"
    yield words(
        "The baseline is the same trainer on one of the two H200, which are linked by NVLink. With data parallelism",
        "each of the two GPUs has as many samples as the single one; in the other rows the step has the same samples.",
        "[parallelism.md](parallelism.md#on-gpus) has four GPUs, at older commits.\n",
    )
    one = {row["case"]: row for row in result["scaling"] if row["gpus"] == 1}
    rows: list[list[object]] = [
        [
            f"{what[row['case']]}, {row['config']}, {row['samples']} x {length(row['tokens'])}",
            *(f"{r['tokens_per_s']:,} ({r['peak_gib']:.0f} GiB)" for r in (one[row["case"]], row)),
            f"{row['over_one']:.2f}",
            TWO_AIMS[row["case"]],
        ]
        for row in result["scaling"]
        if row["gpus"] == 2
    ]
    yield from table(["NSA", "one GPU, tokens/s", "two GPUs", "over one", "target"], rows)
    yield source(results, SCALING)


def prefilling(results: dict[str, dict]) -> Iterator[str]:
    """A prompt's chosen blocks and lines, at a tenth of the pairs; nothing before it was measured."""
    if PREFILL not in results:
        return
    rows = [row for row in results[PREFILL]["prefill"]["rows"] if row.get("wanted") == 0.1 and "ms" in row]
    found = {(row["method"], row["tokens"], row["call"]): row for row in rows}
    cells: list[list[object]] = []
    for (method, tokens, call), row in found.items():
        if call == "both":
            times = [ms(found[method, tokens, name]["ms"]) for name in ("choose", "attend")]
            aim = f"{PREFILL_AIM:g}" if tokens == 65536 else None
            cells.append([f"{method}, {length(tokens)}", *times, row.get("over_cudnn"), row.get("over_flash"), aim])
    yield "## Prompts of models with dense attention\n"
    yield words(
        "MInference's patterns (arXiv 2407.02490) keep a tenth of the visible pairs of query and key, with 32 query",
        "heads on 8 KV heads of 128. The ratios include the time of the choice. The inputs are synthetic, not those of",
        "a model.\n",
    )
    header = ["pattern, tokens", "choice ms", "attention ms", "cuDNN over both", "FlashAttention-2 over both", "target"]
    yield from table(header, cells)
    yield source(results, PREFILL)


def decoding(results: dict[str, dict]) -> Iterator[str]:
    """One token a sequence: what was aimed at."""
    yield "## Decoding\n"
    found = decoded(results)
    cells: list[list[object]] = []
    for (shape, call), aim in DECODE_AIMS.items():
        row = found[shape, call]
        name = f"{call}, {DECODED[shape]}, 64K, batch 8"
        cells.append([name, f"{row['ms'] * 1e3:.0f} us", row["over_dense"], aim])
    yield from table(["one token", "time", "dense over it", "target"], cells)
    decoder = results[DECODER_STEPS]["decode"]["decoder"]
    alone, four = ([row for row in decoder if row["batch"] == batch] for batch in (1, 4))
    steps = [
        f"{row['steps_ms']:.2f} ms with {'NSA' if row['kind'] == 'nsa' else 'dense attention'} (target "
        f"{TOKEN_AIMS[row['kind']]:g})"
        for row in alone
    ]
    grown = [f"{row['growing_ms']:.0f}" for row in alone]
    yield words(
        f"A token of {decoder[0]['decoder']} after a prompt of 32K tokens, batch 1, as a CUDA graph:",
        f"{' and '.join(steps)}. Without CUDA graphs, with",
        f"caches that grow, Python needs {' and '.join(grown)} ms for a token. With four sequences dense attention",
        f"takes {_of_four(four):.2f} times as long as NSA (target {BATCHED_AIM:g}).\n",
    )
    yield words(
        "`quest_fp8` keeps the bounds of pages in 8 bits, rounded outwards:",
        f"{100 * found['B', 'quest_fp8']['same_pages']:.0f} % of the chosen pages are the same.\n",
    )
    slower = [f"{call} ({DECODED[shape]})" for (shape, call), row in found.items() if row["over_dense"] < 1]
    if slower := [name for name in slower if not name.startswith(("flash", "cudnn", "ours"))]:
        yield words(f"**Slower than dense at 64K, batch 8**: {'; '.join(slower)}.\n")
    yield source(results, *DECODE, DECODER_STEPS)


def decoded(results: dict[str, dict]) -> dict[tuple[str, str], dict]:
    """By shape and call: what was measured last at 65,536 tokens and batch 8."""
    rows = [row for stem in reversed(DECODE) for row in results[stem]["decode"]["rows"] if "ms" in row]
    return {(row["shape"], row["call"]): row for row in rows if row["batch"] == 8 and row["tokens"] == 65536}


def _of_four(rows: list[dict]) -> float:
    times = {row["kind"]: row["steps_ms"] for row in rows}
    return times["dense"] / times["nsa"]


def missed_by_decoding(found: dict[tuple[str, str], dict], decoder: list[dict]) -> Iterator[str]:
    """Targets of one token that are missed: of calls over dense attention (see `decoded`), and of a whole decoder."""
    ratios = {case: (found[case]["over_dense"], aim) for case, aim in DECODE_AIMS.items()}
    low = [f"{case[1]} {ratio:.2f} (target {aim:g})" for case, (ratio, aim) in ratios.items() if ratio < aim]
    if low:
        yield f"Decoding over dense attention, 64K, batch 8: {', '.join(low)}."
    four = [row for row in decoder if row["batch"] == 4]
    if (ratio := _of_four(four)) < BATCHED_AIM:
        named = f"A token of {four[0]['decoder']} for four sequences"
        yield f"{named}, dense over NSA: {ratio:.2f} (target {BATCHED_AIM:g})."
    for row in decoder:
        if row["batch"] == 1 and row["steps_ms"] > (aim := TOKEN_AIMS[row["kind"]]):
            named = "NSA" if row["kind"] == "nsa" else "dense attention"
            yield f"A token of {row['decoder']} with {named}: {row['steps_ms']:.2f} ms (target {aim:g})."


def missed_by_steps(result: dict) -> Iterator[str]:
    found = cases(result)
    for case, aim in MFU_AIMS.items():
        if (mfu := found[case]["nsa"]["mfu"]) < aim:
            yield (
                f"NSA, {named(case)}: {100 * mfu:.1f} % MFU (target {100 * aim:.0f} %). Over half of its step is "
                "attention, whose kernels have too few thread blocks to fill the GPU at that length."
            )
    ratios = {case: fastest(found[case])["ms"] / found[case]["nsa"]["ms"] for case in STEP_AIMS}
    short = [f"{r:.2f} at {named(c)} (target {STEP_AIMS[c]:g})" for c, r in ratios.items() if r < STEP_AIMS[c]]
    if short:
        yield f"NSA over FlashAttention-4 in whole steps, one {card(result)}: {', '.join(short)}."


def missed_by_operator(results: dict[str, dict]) -> str:
    cards = []
    for stem in (OPERATOR, OPERATOR_H200):
        runs = {(run["shape"], run["tokens"]): run["total"]["trained"]["vs"]["cudnn"] for run in results[stem]["runs"]}
        short = [
            f"{shape} {length(tokens)} {direction} {runs[shape, tokens][direction]:.2f} (target {aim:g})"
            for (shape, tokens, direction), aim in AIMS.items()
            if runs[shape, tokens][direction] < aim
        ]
        cards.append(f"one {card(results[stem])}: {', '.join(short)}")
    return f"The operator over cuDNN, {'; '.join(cards)}."
