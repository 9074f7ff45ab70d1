"""Pretrain a decoder: `python -m nsa.train CONFIG [key=value ...]`, or under a launcher `deepspeed nsa/train.py ...`.

Exit codes: 0 the run is complete; 2 something that the user can fix, said in one message; 75 it was asked to stop and
is saved, 85 a rank was lost or hung: run the same command again; 130 Ctrl-C, saved; anything else is a fault. See
docs/reliability.md.
"""

import argparse
import os
import signal
import sys
from pathlib import Path

if __name__ == "__main__" and not __package__:
    # Run as a script, Python puts nsa/ first on the path, where its modules would shadow others of the same name.
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(p for p in sys.path if Path(p or ".").resolve() != here)]


def main() -> int:
    from nsa.training.exit_codes import write_exit_file, write_process_id
    from nsa.training.signals import Stopped, ignore, stop_at_once

    try:
        stop_at_once()
        write_process_id()
        return _main()
    except Stopped as stop:
        if os.environ.get("RANK", "0") == "0":
            print(f"stopped before the first step ({stop.name}); run the same command to go on", file=sys.stderr)
        write_exit_file(stop.code)
        return stop.code
    finally:
        ignore()


def _main() -> int:
    parser = argparse.ArgumentParser(
        prog="nsa.train", description="Pretrain a decoder. The same command resumes a run."
    )
    parser.add_argument("config", nargs="?", help="YAML file, such as configs/demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as training.steps=100")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("--dry-run", action="store_true", help="check the run, print its size and memory, and stop")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # launchers insert it; LOCAL_RANK says it
    arguments = parser.parse_intermixed_args()
    if arguments.config is None:
        parser.error("name a YAML file, such as configs/demo.yaml")

    from nsa.config import dump_config, load_config
    from nsa.training.exit_codes import USER, write_exit_file

    is_main = os.environ.get("RANK", "0") == "0"
    try:
        config = load_config(arguments.config, arguments.overrides)
    except ValueError as e:
        if is_main:  # every rank reads the same
            print(f"error: {e}", file=sys.stderr, flush=True)
        write_exit_file(USER)
        return USER
    if arguments.print_config or arguments.dry_run:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends the printing
    if arguments.print_config:
        print(dump_config(config), end="")
        return 0
    if arguments.dry_run:
        from nsa.planning.describe import describe, describe_text
        from nsa.training.start import check_stage_before
        from nsa.training.state import check_beginning

        try:
            print(describe(config, int(os.environ.get("WORLD_SIZE", "1"))))
            print("\n" + describe_text(config), flush=True)
        except ValueError as e:
            more = f"For another number of ranks: python -m nsa.plan {arguments.config} --gpus N"
            print(f"error: {e}\n{more}", file=sys.stderr)
            return USER
        try:
            check_stage_before(config, arguments.config, arguments.overrides)
            check_beginning(config)
        except (ValueError, OSError) as e:
            print(f"error: {e}", file=sys.stderr)
            return USER
        return 0

    from nsa.training.job import train
    from nsa.training.start import check_stage_before

    try:
        check_stage_before(config, arguments.config, arguments.overrides)
    except ValueError as e:
        if is_main:
            print(f"error: {e}", file=sys.stderr, flush=True)
        write_exit_file(USER)
        return USER
    return train(config)


if __name__ == "__main__":
    sys.exit(main())
