"""Do to a training run what happens in a cluster's life, and count how often the outcome is the documented one.

    python benchmarks/fault_campaign.py                      # all, some 25 minutes on two cores
    python benchmarks/fault_campaign.py --kills 10 --quick   # a little of each
    python benchmarks/fault_campaign.py --only "a hung rank" "rank 1 killed"
    python benchmarks/fault_campaign.py --write              # figures into docs/reliability.md as well

Every run trains a tiny model on a little of Python's own text on CPU ranks (gloo), with a checkpoint every other step.
"Identical" means bitwise: every weight, moment, generator and counter of the last checkpoint, and every logged loss. A
traceback, a lost checkpoint or an undocumented exit code counts against. Exits with 1 if anything did.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
# Threads of one process that wait for each other spin, and starve those of the others: hours instead of minutes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402 - after the path

from benchmarks.faults import damage, fuzz, kills, ranks  # noqa: E402
from benchmarks.faults.lives import Stage  # noqa: E402

BEGIN, END = "<!-- figures of the last campaign: begin -->", "<!-- figures of the last campaign: end -->"
Row = dict[str, object]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as engine.zero_stage=3")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="few repeats and inputs")
    parser.add_argument("--only", nargs="+", metavar="PART", help="parts, by name")
    parser.add_argument("--write", action="store_true", help="write the figures into docs/reliability.md")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    options = parser.parse_args()

    started, repeats, rows = time.monotonic(), 1 if options.quick else 3, []
    sizes = (400, 50, 100) if options.quick else (10_000, 1_500, 1_000)
    with tempfile.TemporaryDirectory(prefix="fault_campaign_") as folder:
        stage, seed = Stage(Path(folder), options.overrides), options.seed
        parts: dict[str, Callable[[], Row | list[Row]]] = {
            "fuzz": lambda: fuzz.campaign(stage, *sizes, seed),
            "NaN on one rank": lambda: ranks.nan_on_one_rank(stage),
            "a hung rank": lambda: ranks.hung_rank(stage),
            "rank 0 frozen": lambda: ranks.frozen_rank(stage, 0),
            "rank 1 frozen": lambda: ranks.frozen_rank(stage, 1),
            "rank 0 killed": lambda: ranks.killed_rank(stage, 0),
            "rank 1 killed": lambda: ranks.killed_rank(stage, 1),
            "a user's error on one rank": lambda: ranks.user_error_on_one_rank(stage),
            "unpickling": lambda: ranks.nothing_unpickles(stage),
            "spikes": lambda: ranks.spikes_roll_back(stage),
            "requests to stop": lambda: ranks.stop_requests(stage),
            "SIGTERM during a save": lambda: kills.sigterm_during_saves(stage, 3 * repeats, seed),
            "full disk": lambda: damage.full_disk(stage),
            "damaged checkpoints": lambda: damage.damaged_checkpoints(stage, repeats, seed),
            "damaged figures": lambda: damage.damaged_figures(stage, repeats, seed),
            "damaged data": lambda: damage.damaged_shards(stage, repeats, seed),
            "kills": lambda: kills.campaign(stage, options.kills, seed),
        }
        if unknown := set(options.only or ()) - set(parts):
            parser.error(f"unknown part {min(unknown)!r}; there are: {', '.join(parts)}")
        for name in options.only or parts:
            print(f"== {name}", flush=True)
            found = parts[name]()
            rows += found if isinstance(found, list) else [found]

    figures = {
        "ok": all(row["ok"] for row in rows),
        "command": shlex.join(["python", "benchmarks/fault_campaign.py", *sys.argv[1:]]),
        "commit": _commit(),
        "machine": f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}",
        "overrides": options.overrides,
        "seconds": round(time.monotonic() - started),
        "rows": rows,
    }
    print(json.dumps(figures, indent=1))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    if options.write:
        path = ROOT / "docs/reliability.md"
        before, _, rest = path.read_text().partition(BEGIN)
        path.write_text(before + BEGIN + "\n" + table(figures) + END + rest.partition(END)[2])
    return 0 if figures["ok"] else 1


def table(figures: Row) -> str:
    """Markdown: one row for each fault and outcome; files that it was injected into ("fault: file") share the row."""
    lines = [
        "",
        f"Commit {figures['commit']}, {figures['machine']}, {figures['seconds']} s; written by",
        f"`{figures['command']}`.",
        "",
        "| fault | injected | behaved as documented | what happens |",
        "|---|--:|--:|---|",
    ]
    assert isinstance(figures["rows"], list)
    together: dict[tuple[str, str], list[Row]] = {}
    for row in figures["rows"]:
        together.setdefault((str(row["fault"]).partition(": ")[0], str(row["outcome"])), []).append(row)
    for (fault, outcome), rows in together.items():
        files = ", ".join(str(row["fault"]).partition(": ")[2] for row in rows)
        times, good = (sum(int(str(row[key])) for row in rows) for key in ("times", "as documented"))
        lines.append(f"| {fault}{': ' if files else ''}{files} | {times:,} | {good:,} | {outcome} |")
    return "\n".join(lines) + "\n\n"


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
