"""Summary of a finished run, its loss and its files: `python -m nsa.summary RUN`. The demo ends with it."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from nsa.untrusted import regular_size

LEFT_BEHIND = {  # name -> pattern of its files in the run folder
    "configuration": "config.yaml",
    "figures": "metrics.jsonl",
    "checkpoint": "step_*/manifest.json",
    "export": "export/config.json",
    "evaluation": "evaluation/*.json",
    "plot": "evaluation/*.png",
}


def summarise(run: Path) -> str:
    """A few lines of text. Raises ``ValueError`` if ``run`` is not the folder of a run that was validated."""
    try:
        regular_size(run / "metrics.jsonl", follow=True)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    except OSError as error:
        raise ValueError(f"{run}: not the folder of a run (no metrics.jsonl: {error.strerror})") from error
    validations = [line for line in lines if "validation/bits_per_byte" in line]
    if not validations:
        raise ValueError(f"{run}: the run has not been validated yet")
    first, last = validations[0], validations[-1]
    summary = [
        f"validation bits per byte: {last['validation/bits_per_byte']:.3f} after {last['step']} steps"
        f" ({first['validation/bits_per_byte']:.3f} after {first['step']})"
    ]
    for name, pattern in LEFT_BEHIND.items():
        paths = sorted(run.glob(pattern))
        if name in ("checkpoint", "export"):
            paths = [path.parent for path in paths][-1:]  # the folder, and only of the last checkpoint
        summary += [f"{name + ':':<15}{path}" for path in paths]
    return "\n".join(summary)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m nsa.summary", description="Print the results of a run.")
    parser.add_argument("run", type=Path, help="the folder of a run, such as checkpoints/demo")
    try:
        print(summarise(parser.parse_args(arguments).run))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
