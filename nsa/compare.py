"""Compare ways of being sparse at equal budget: siblings that were trained dense or sparse, and methods put onto them.

Command:
    python -m nsa.compare configs/compare/demo.yaml [key=value ...]   # goes on where it was interrupted
    python -m nsa.compare report checkpoints/compare-demo             # the report again, from its results
    python -m nsa.compare list                                        # methods and tasks
    python -m nsa.compare explain quest                               # what a method does, and what is counted

`bash launch.sh compare CONFIG` trains the siblings that a configuration describes first.
"""

import argparse
import os
import sys
from collections.abc import Sequence

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m nsa.compare", description="Compare ways of being sparse.")
    parser.add_argument("what", help="a comparison's YAML file; or list, explain, report")
    parser.add_argument("rest", nargs="*", metavar="key=value", help="overrides, or what to explain or report")
    parser.add_argument("--untrained", action="store_true", help="print how to train what is not trained yet, and stop")
    options = parser.parse_intermixed_args(arguments)

    from nsa.evaluation.comparison import commands

    try:
        if options.what == "list":
            print(commands.listing())
        elif options.what == "explain":
            print("\n\n".join(commands.explain(name) for name in options.rest or [""]))
        elif options.what == "report":
            for folder in options.rest or [""]:
                commands.report(folder)
        elif options.untrained:
            for line in commands.untrained(options.what, options.rest):
                print("\t".join(line))
        else:
            commands.compare(options.what, options.rest)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
