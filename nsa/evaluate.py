"""Measure an exported model: bits per byte by position, and recall at and beyond the training length.

Command:
    python -m nsa.evaluate checkpoints/demo/export
    python -m nsa.evaluate checkpoints/demo/export --config other.yaml --out results evaluation.recall_samples=16
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from nsa.config import Config, EvaluationConfig, load_config, load_saved
from nsa.evaluation.runner import check, evaluate, measured
from nsa.exporting.folder import CONFIG, is_export


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m nsa.evaluate", description="Measure an exported model.")
    parser.add_argument(
        "export", nargs="?", help="a folder written by nsa.export, or one that transformers saved of it"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. evaluation.recall_samples=16")
    parser.add_argument("--config", help="YAML whose data and evaluation sections to use (default: the training's)")
    parser.add_argument("--out", help="folder for the results (default: evaluation, beside the export)")
    options = parser.parse_intermixed_args(arguments)
    if options.export is None:
        parser.error("name a folder that nsa.export wrote")
    try:
        export = Path(options.export)
        check(export)
        config: Config | EvaluationConfig | None = None
        if options.config or (is_export(export) and options.overrides):
            path = Path(options.config or export / CONFIG)
            config = (load_saved if path.name == CONFIG else load_config)(path, options.overrides)
        elif options.overrides:
            config = measured(options.overrides)
        evaluate(export, options.out, config)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
