"""Compare ways of being sparse at equal budget: siblings that were trained dense or sparse, and methods put onto them.

Command:
    python -m nsa.compare configs/compare/demo.yaml [key=value ...]   # goes on where it was interrupted
    python -m nsa.compare CONFIG --minutes 8                          # stops after so long with exit code 75
    python -m nsa.compare CONFIG --workers 8                          # in eight processes, spread over the GPUs
    python -m nsa.compare report checkpoints/compare-demo             # the report again, from its results
    python -m nsa.compare report checkpoints/compare-demo --pack OUT  # and results and report in few files
    python -m nsa.compare report FOLDER --partial                     # of a comparison that was stopped
    python -m nsa.compare list                                        # methods and tasks
    python -m nsa.compare explain quest                               # what a method does, and what is counted

`bash launch.sh compare CONFIG` trains the siblings that a configuration describes first.

Exit codes: 0 done; 2 something to fix, said in one message; 75 stopped, 85 a worker was killed: every finished cell is
written, run the same command again.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m nsa.compare", description="Compare methods of sparse attention.")
    parser.add_argument("what", nargs="?", help="a comparison's YAML file; or list, explain, report")
    parser.add_argument("rest", nargs="*", metavar="key=value", help="overrides, or what to explain or report")
    parser.add_argument("--minutes", type=float, help="begin nothing new after so many minutes; exit code 75")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes at once, spread over the GPUs")
    parser.add_argument("--launch", type=Path, metavar="LAUNCH_SH", help="train what is not trained, stage by stage")
    parser.add_argument("--pack", metavar="OUT", help="with report: also write the results, in few files, to OUT")
    parser.add_argument(
        "--partial", action="store_true", help="with report: of a comparison that was stopped, from the cells there are"
    )
    options = parser.parse_intermixed_args(arguments)
    if options.what is None:
        parser.error("name a comparison's YAML file, or list, explain or report")
    if options.partial and options.what != "report":
        parser.error("--partial goes with report")
    if options.pack is not None and (options.what != "report" or len(options.rest) != 1):
        parser.error("--pack goes with report and one folder of results")
    if options.what == "report" and not options.rest:
        parser.error("report needs a folder of results")
    if options.workers < 1:
        parser.error("--workers needs a number of processes, 1 or more")

    from nsa.evaluation.comparison import commands
    from nsa.evaluation.comparison.workers import WorkerLostError
    from nsa.training.exit_codes import LOST, REQUEUE, USER
    from nsa.training.signals import Stopped

    try:
        if options.what == "list":
            print(commands.listing())
        elif options.what == "explain":
            print(commands.explanations(options.rest))
        elif options.what == "report":
            for folder in options.rest:
                commands.report(folder, options.pack, options.partial)
        elif options.launch is not None:
            from nsa.evaluation.comparison import trainings

            return trainings.run(options.launch, options.what, options.rest, options.minutes, options.workers)
        elif not commands.compare(options.what, options.rest, options.minutes, options.workers):
            print(
                "the time is over; finished cells are written: run the same command again to continue", file=sys.stderr
            )
            return REQUEUE
    except (ValueError, OSError) as error:  # such as a folder that cannot be written
        print(f"error: {error}", file=sys.stderr)
        return USER
    except WorkerLostError as error:
        print(f"error: {error}", file=sys.stderr)
        return LOST
    except Stopped as stop:
        print(
            f"stopped ({stop.name}); finished cells are written: run the same command again to continue",
            file=sys.stderr,
        )
        return stop.code
    return 0


if __name__ == "__main__":
    from nsa.training.signals import stop_at_once

    stop_at_once()
    sys.exit(main())
