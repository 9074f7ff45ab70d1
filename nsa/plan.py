"""What a run will need and how fast it may be, before it is started.

Commands:
    python -m nsa.plan configs/1b.yaml --gpus 8 [key=value ...]              # parameters, FLOPs, memory, traffic
    python -m nsa.plan configs/1b.yaml --gpus 64 --gpu H200 parallel.tensor=4    # and speed, and the best layouts
    python -m nsa.plan configs/7b.yaml --gpus 64 --dry-run parallel.tensor=4     # and the passes of a rank, for real
    python -m nsa.plan --check [FILE ...]                                    # the prediction against measurements

Nothing is allocated: any size fits on a laptop.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from nsa.config import ConfigError, load_config


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m nsa.plan", description="What a run will need, before it starts.")
    parser.add_argument("config", nargs="?", help="a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. engine.zero_stage=3")
    parser.add_argument("--gpus", type=int, default=8, help="all of them (default: 8)")
    parser.add_argument("--gpu", help="H200, H100 or A100: also predict the speed, and search for the best layout")
    parser.add_argument("--dry-run", action="store_true", help="also run the passes of a rank on the meta device")
    parser.add_argument("--check", action="store_true", help="compare with measurements: the committed ones, or FILEs")
    options = parser.parse_intermixed_args(arguments)
    if options.config is None and not options.check:
        parser.error("name a YAML file, or --check")
    try:
        if options.check:
            files = [options.config, *options.overrides] if options.config else []
            _check([Path(name) for name in files])
        else:
            _plan(options)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _plan(options: argparse.Namespace) -> None:
    from nsa.planning import report
    from nsa.planning.dry_run import dry_run
    from nsa.planning.memory import memory_of
    from nsa.planning.search import search
    from nsa.planning.speed import GPUS, predict_speed

    config, gpus = load_config(options.config, options.overrides), options.gpus
    if gpus < 1:
        raise ConfigError(f"--gpus {gpus}: at least one is needed")
    if options.gpu is not None and options.gpu not in GPUS:
        raise ConfigError(f"--gpu {options.gpu}: one of {', '.join(GPUS)}")
    print(report.describe(config, gpus))
    if options.gpu:
        gpu = GPUS[options.gpu]
        speed = predict_speed(config, gpus, gpu)
        print("\n" + report.describe_speed(speed, memory_of(config, gpus), gpus, gpu), flush=True)
        print("\n" + report.describe_search(search(config, gpus, gpu), gpus, gpu))
    if options.dry_run:
        stages = config.parallel.pipeline
        for rank in (0, stages * config.parallel.context * config.parallel.tensor - 1) if stages > 1 else (0,):
            print("\n" + report.describe_dry_run(dry_run(config, gpus, rank)), flush=True)


def _check(files: list[Path]) -> None:
    from nsa.planning import measured

    rows = [row for path in files or measured.result_files() for row in measured.compare(path)]
    print("\n".join([measured.table(rows), "", *measured.error_lines(rows)]))


if __name__ == "__main__":
    sys.exit(main())
