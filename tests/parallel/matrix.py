"""Compares every layout with one process. `python tests/parallel/matrix.py` writes the table in docs/parallelism.md.

For each of tp {1, 2} x cp {1, 2, 4} x pp {1, 2} x ZeRO {0, 1, 2, 3}, with two data-parallel replicas where cp is
1: dense and NSA, SGD without clipping and AdamW with clipping in every step, ten steps in fp32 on
packed documents.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.parallel.layouts import (  # noqa: E402
    BASE,
    CLIPPED,
    SCRIPT,
    SGD,
    STEPS,
    Case,
    Curve,
    difference,
    layout,
    learned,
    references,
)
from tests.training.tiny import on_ranks  # noqa: E402

KINDS = {kind: [f"attention.kind={kind}"] for kind in ("dense", "nsa")}
OPTIMIZERS = {"SGD": SGD, "AdamW, clipped": CLIPPED}
LIMIT = 1e-5
MOST_RANKS = 16  # enough for all layouts; with fewer GPUs all runs, references included, use the CPU
PAGE, BEGIN, END = ROOT / "docs/parallelism.md", "<!-- table -->", "<!-- /table -->"

Layout = tuple[int, int, int]  # tensor, context, pipeline


def layouts(most_ranks: int) -> list[Layout]:
    return [sizes for sizes in product((1, 2), (1, 2, 4), (1, 2)) if ranks_of(sizes) <= most_ranks]


def ranks_of(sizes: Layout) -> int:
    """The ranks of one replica; of two without context parallelism, so that ZeRO has ranks to shard over."""
    tensor, context, pipeline = sizes
    return tensor * max(context, 2) * pipeline


def stages(sizes: Layout) -> list[int]:
    return [0, 1, 2] if sizes[2] > 1 else [0, 1, 2, 3]


def cases(sizes: Layout, zero: int) -> list[Case]:
    spread = {"tensor": sizes[0], "context": sizes[1], "pipeline": sizes[2]}
    return [
        [*BASE, *kind, *optimizer, *layout(**spread, zero=zero)]
        for kind in KINDS.values()
        for optimizer in OPTIMIZERS.values()
    ]


def run(sizes: Layout, folder: Path, reference: dict[str, Curve], timeout: float = 3600) -> dict[str, list[float]]:
    """Largest relative difference of each kind and optimizer, by ZeRO stage.

    One launch per stage: process groups are not destroyed, and gloo's threads of a dozen would slow down 16 ranks.
    """
    differences = {}
    for zero in stages(sizes):
        todo = cases(sizes, zero)
        checks = {"curves": ("curves", {"cases": todo, "steps": STEPS})}
        within = folder / f"zero{zero}"
        within.mkdir()
        curves = on_ranks(ranks_of(sizes), within, checks, SCRIPT, timeout, gpus=MOST_RANKS)["curves"]
        differences[str(zero)] = [
            difference(curve, reference[str(learned(case))]) for case, curve in zip(todo, curves, strict=True)
        ]
    return differences


def table(results: dict[str, dict[str, list[float]]], commit: str) -> str:
    """Markdown: the largest difference of a layout and ZeRO stage over kinds, optimizers and steps."""
    lines = [
        f"Written by `python tests/parallel/matrix.py` at commit {commit}: the largest relative difference from one "
        f"process, in loss and unclipped gradient norm, over {STEPS} steps of "
        f"{{{', '.join(KINDS)}}} x {{{', '.join(OPTIMIZERS)}}}, fp32, packed documents. The limit is {LIMIT:g}.",
        "",
        "| tensor | context | pipeline | ranks | ZeRO 0 | ZeRO 1 | ZeRO 2 | ZeRO 3 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for key, found in results.items():
        sizes = tuple(int(n) for n in key.split(","))
        cells = [f"{max(found[z]):.1e}" if z in found else "rejected" for z in "0123"]
        lines.append(f"| {' | '.join(map(str, sizes))} | {ranks_of(sizes)} | {' | '.join(cells)} |")  # type: ignore[arg-type]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare every layout with one process; write docs/parallelism.md.")
    parser.add_argument("--most-ranks", type=int, default=MOST_RANKS, help="leave out layouts of more")
    parser.add_argument("--results", type=Path, help="a JSON file to go on from: what it has is not run again")
    parser.add_argument("--at-most", type=int, default=1000, help="layouts to run now (with --results, for pieces)")
    options = parser.parse_args()
    results = json.loads(options.results.read_text()) if options.results and options.results.exists() else {}
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "one").mkdir()
        reference = references(Path(name) / "one", cases((1, 1, 1), zero=0), gpus=MOST_RANKS)
        keys = {",".join(map(str, sizes)): sizes for sizes in layouts(options.most_ranks)}
        now = [key for key in keys if key not in results][: options.at_most]
        for number, (key, sizes) in enumerate(keys.items()):
            if key in now:
                (Path(name) / str(number)).mkdir()
                results[key] = run(sizes, Path(name) / str(number), reference)
                if options.results:
                    options.results.write_text(json.dumps(results, indent=1))
            if key in results:
                print(key, {zero: f"{max(values):.1e}" for zero, values in results[key].items()}, flush=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    page = PAGE.read_text()
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n{table(results, commit.stdout.strip())}\n{END}{after}")
    return int(max(v for found in results.values() for values in found.values() for v in values) >= LIMIT)


if __name__ == "__main__":
    sys.exit(main())
