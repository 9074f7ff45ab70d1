"""Exit codes of a training process, so that a scheduler knows what to do next without reading a log.

    0    the run is complete
    1    a fault of this program (a traceback is printed); the last checkpoint stands, running again may help or not
    2    something that the user must fix, said in one message; running again without fixing it fails again
    75   asked to stop (SIGTERM, SIGHUP, SIGUSR1, a STOP file, training.max_hours, a launcher that is gone): everything
         is saved; or another process still trains in the run folder: run the command again
    85   a rank was lost or hung: the last checkpoint stands, run the command again
    130  Ctrl-C (SIGINT) or SIGQUIT: everything is saved; nobody should start it again by himself

75 is EX_TEMPFAIL of sysexits.h. A process that was killed outright has 128 + the signal's number, as everywhere.

Launchers answer with codes of their own when a rank fails: launch.sh names a file in NSA_EXIT_FILE, which rank 0 writes
its code into. Every rank writes its process id into a file beside it, so that launch.sh can pass signals on.
"""

import os
from contextlib import suppress
from pathlib import Path

DONE = 0
FAULT = 1
USER = 2
REQUEUE = 75
LOST = 85
INTERRUPTED = 130


def write_exit_file(code: int) -> None:
    """Tell launch.sh. Only rank 0 does."""
    path = os.environ.get("NSA_EXIT_FILE")
    if path and os.environ.get("RANK", "0") == "0":
        with suppress(OSError):  # a full disk may be what the code is about
            Path(path).write_text(f"{code}\n")


def write_process_id() -> None:
    """Tell launch.sh that this process is a rank."""
    if path := os.environ.get("NSA_EXIT_FILE"):
        with suppress(OSError), Path(f"{path}.ranks").open("a") as file:
            file.write(f"{os.getpid()}\n")
