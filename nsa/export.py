"""Write a trained model as a Hugging Face folder, proven equal to what was trained.

Command:
    python -m nsa.export checkpoints/demo            # newest good checkpoint -> checkpoints/demo/export
    python -m nsa.export checkpoints/demo/step_00000100 --out my-model --dtype bfloat16
"""

import argparse
import sys
from collections.abc import Sequence

from nsa.exporting import export


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m nsa.export", description="Write a model as a Hugging Face folder.")
    parser.add_argument("source", help="a run folder, or a step_* folder in one")
    parser.add_argument("--out", help="folder to write (default: export in the run folder)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="type of the weights")
    options = parser.parse_args(arguments)
    try:
        folder, proof = export(options.source, options.out, options.dtype)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"exported {folder}: equal to the trained model on {proof.tokens:,} tokens (largest difference "
        f"{proof.difference:.1e} of the largest logit, {proof.dtype}) and {proof.texts:,} texts"
    )
    print(f"format: {proof.form}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
