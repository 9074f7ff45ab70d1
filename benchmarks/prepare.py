"""Times the preparation of text, by the length of its documents: MB of text a second, and peak memory.

    python benchmarks/prepare.py [--megabytes 10] [--bytes 20 140 2000 100000] [--workers 2] [--folder DIR] [--out FILE]

The text is random words, the same for all lengths; one JSONL file. Each length is prepared in a process of its own,
tokenizer included. Memory is the sum of the resident sets of that process and its workers, looked at ten times a second
(pages that they share count in each); `memory_mib` is its peak in each tenth of the time.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.measure import environment
from nsa.data.config import DataConfig
from nsa.data.prepare import prepare

PARTS = 10


def write_corpus(path: Path, num_bytes: int, length: int) -> None:
    """A JSONL file of ``num_bytes`` of text in documents of about ``length`` bytes."""
    dice = random.Random(0)
    words = ["".join(dice.choices("abcdefghijklmnopqrstuvwxyz", k=dice.randint(2, 9))) for _ in range(20_000)]
    written = 0
    with path.open("w") as file:
        while written < num_bytes:
            text = " ".join(dice.choices(words, k=max(1, length // 6)))
            file.write(json.dumps({"text": text}) + "\n")
            written += len(text)


def measure(corpus: Path, cache: Path, workers: int) -> dict[str, float]:
    """Prepare ``corpus`` in this process."""
    text = {"name": "text", "kind": "files", "path": str(corpus)}
    config = DataConfig.model_validate(
        {"sources": [text], "cache_dir": str(cache), "sequence_length": 512, "workers": workers}
    )
    start = time.perf_counter()
    data = prepare(config, seed=1, progress=False)
    seconds = time.perf_counter() - start
    entry = data.manifest["sources"]["text"]
    num_bytes = entry["train"]["bytes"] + entry["validation"]["bytes"]
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {
        "documents": entry["train"]["documents"] + entry["validation"]["documents"] + entry["duplicates"],
        "seconds": round(seconds, 1),
        "cpu_seconds": round(sum(u.ru_utime + u.ru_stime for u in used), 1),
        "mb_per_s": round(num_bytes / seconds / 1e6, 2),
    }


def watch(process: subprocess.Popen[str]) -> list[float]:
    """MiB of the process and all that it started, ten times a second until it ends."""
    seen = []
    tree = psutil.Process(process.pid)
    while process.poll() is None:
        total = 0
        try:
            for one in (tree, *tree.children(recursive=True)):
                total += one.memory_info().rss
        except psutil.NoSuchProcess:  # it ended between the two lines
            continue
        seen.append(total / 2**20)
        time.sleep(0.1)
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=10)
    parser.add_argument("--bytes", type=int, nargs="+", default=[20, 140, 2000, 100_000], help="of a document")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="for the corpus and the shards, which are removed; default: /tmp")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("CORPUS", "CACHE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*map(Path, options.one), options.workers)))
        return
    report = environment() | {"megabytes": options.megabytes, "workers": options.workers, "prepare": []}
    for length in options.bytes:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            corpus = Path(folder) / "corpus.jsonl"
            write_corpus(corpus, int(options.megabytes * 1e6), length)
            command = [sys.executable, __file__, "--workers", str(options.workers)]
            process = subprocess.Popen(
                [*command, "--one", str(corpus), f"{folder}/cache"], stdout=subprocess.PIPE, text=True
            )
            memory = watch(process)
            reported, _ = process.communicate()
            if process.returncode:
                sys.exit(process.returncode)
        parts = [max(part) for part in np.array_split(memory, PARTS) if len(part)]
        row = {
            "bytes": length,
            **json.loads(reported),
            "peak_mib": round(max(parts)),
            "memory_mib": [round(p) for p in parts],
        }
        report["prepare"].append(row)
        print(row, flush=True)
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
