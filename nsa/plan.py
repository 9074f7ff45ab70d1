"""What a run will need and how fast it may be, before it is started.

Commands:
    python -m nsa.plan configs/1b.yaml --gpus 8 [key=value ...]              # parameters, FLOPs, memory, traffic
    python -m nsa.plan configs/1b.yaml --gpus 64 --gpu H200 parallel.tensor=4    # and speed, and the best choices
    python -m nsa.plan configs/1b.yaml --gpus 8 --memory 80                  # the same on H100s of 80 GB
    python -m nsa.plan configs/7b.yaml --gpus 64 --passes parallel.tensor=4      # and the passes of a rank, for real
    python -m nsa.plan --check [FILE ...]                                    # the prediction against measurements
    python -m nsa.plan --fit FILE ...                                        # fit its constants to measurements

The choices are layout, recomputation (engine.activation_checkpointing) and micro batch. FILEs are those of
benchmarks/models.py, training.py and steady.py; without one --check takes those of the last fit. The constants are in
nsa/planning/constants.json.
Nothing is allocated: any size fits on a laptop.
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from nsa.config import ConfigError, load_config

GPUS_UNLESS_NAMED = 8


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m nsa.plan", description="Predict what a run needs: memory, communication, time."
    )
    parser.add_argument("config", nargs="?", help="a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. engine.zero_stage=3")
    parser.add_argument("--gpus", type=int, help=f"number of GPUs of the run (default: {GPUS_UNLESS_NAMED})")
    parser.add_argument("--gpu", help="H200, H100 or A100: also predict the speed, and search for the fastest layouts")
    parser.add_argument("--memory", type=float, help="GB of one GPU (default: those of --gpu, or of an H100)")
    parser.add_argument("--passes", action="store_true", help="also dry-run a rank's passes on the meta device")
    parser.add_argument("--check", action="store_true", help="compare with measurements in FILEs, or of the last fit")
    parser.add_argument("--fit", action="store_true", help="fit the constants to FILEs, and print the error")
    options = parser.parse_intermixed_args(arguments)
    if options.config is None and not options.check:
        parser.error("name a YAML file, or --check, or --fit with files")
    try:
        if options.check or options.fit:
            files = [Path(name) for name in (options.config, *options.overrides) if name]
            _fit(files) if options.fit else _check(files)
        else:
            _plan(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _plan(options: argparse.Namespace) -> None:
    from nsa.planning.describe import describe, describe_dry_run, describe_search, describe_speed, describe_text
    from nsa.planning.dry_run import dry_run
    from nsa.planning.memory import memory_of
    from nsa.planning.search import search
    from nsa.planning.speed import GPUS, predict_speed
    from nsa.training.deepspeed_config import micro_batches_per_step
    from nsa.training.start import check_stage_before
    from nsa.training.state import check_beginning

    config, gpus = load_config(options.config, options.overrides), options.gpus
    if gpus is None:
        gpus = GPUS_UNLESS_NAMED
        try:
            micro_batches_per_step(config, gpus)
        except ValueError as error:
            raise ConfigError(f"{error}.\n--gpus is {gpus} by default: add --gpus N for a run on N GPUs") from None
    if gpus < 1:
        raise ConfigError(f"--gpus {gpus}: at least one is needed")
    if options.gpu is not None and options.gpu not in GPUS:
        raise ConfigError(f"--gpu {options.gpu}: one of {', '.join(GPUS)}")
    if options.memory is not None and options.memory <= 0:
        raise ConfigError(f"--memory {options.memory:g}: GB of a GPU")
    print(describe(config, gpus) + "\n\n" + describe_text(config))
    if config.start_from is not None:
        try:
            check_stage_before(config, options.config, options.overrides)
            check_beginning(config)
        except (ValueError, OSError) as error:  # a plan may be made elsewhere, or before the stage that it starts from
            print(f"\nnote: here the run could not begin: {error}")
    if options.gpu or options.memory:
        gpu = GPUS[options.gpu or "H100"]
        gpu = replace(gpu, memory=1e9 * options.memory) if options.memory else gpu
        speed = predict_speed(config, gpus, gpu)
        print("\n" + describe_speed(speed, memory_of(config, gpus), gpus, gpu), flush=True)
        print("\n" + describe_search(search(config, gpus, gpu), gpus, gpu))
    if options.passes:
        stages = config.parallel.pipeline
        for rank in (0, stages * config.parallel.context * config.parallel.tensor - 1) if stages > 1 else (0,):
            print("\n" + describe_dry_run(dry_run(config, gpus, rank)), flush=True)


def _fit(files: list[Path]) -> None:
    from nsa.planning import constants, measured
    from nsa.planning.fit import fit

    cases = [case for path in files for case in measured.cases(path) if case.seconds is not None]
    content = fit(cases, constants.read())
    constants.write(content)
    known = content.values()
    for case in sorted(cases, key=lambda case: -abs(case.error(known))):
        print(f"{100 * case.error(known):+6.1f} %  {case.describe()}")
    for words, mean, worst in (
        ("", content.mean_error, content.worst_error),
        (" of each case by a fit to the others", content.mean_error_left_out, content.worst_error_left_out),
    ):
        print(f"Error of the step time{words}: {100 * mean:.1f} % on average, {100 * worst:.1f} % at most.")
    print(f"Written: {constants.PATH}")


def _check(files: list[Path]) -> None:
    from nsa.planning import measured

    rows = [row for path in files or measured.fitted_files() for row in measured.compare(path)]
    print("\n".join([measured.table(rows), "", *measured.error_lines(rows)]))


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends the printing
    sys.exit(main())
