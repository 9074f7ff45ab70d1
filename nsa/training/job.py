"""A training job from its configuration to its exit code: what went wrong is said in words, by one rank."""

import os
import sys
import traceback
from contextlib import suppress

import torch.distributed as dist

from nsa.config import Config
from nsa.training.cuda_graphs import forget_recordings
from nsa.training.distributed import ReportedError
from nsa.training.exit_codes import FAULT, INTERRUPTED, LOST, REQUEUE, USER, write_exit_file
from nsa.training.memory import is_memory
from nsa.training.run_folder import FolderBusyError
from nsa.training.signals import Stopped
from nsa.training.trainer import Trainer
from nsa.training.watchdog import Watchdog

AGAIN = "The last checkpoint, if there is one, stands; run the same command again"
LESS_MEMORY = (
    "lower training.micro_batch_size, set engine.activation_checkpointing=full or engine.cuda_graphs=false, or see "
    "docs/parallelism.md"
)
LOST_WORDS = ("gloo", "NCCL", "Connection closed", "Connection reset", "Timed out waiting", "Broken pipe", "TCPStore")


def train(config: Config) -> int:
    """Train; returns the exit code (`nsa.training.exit_codes`) and has said on stderr what it means.

    A rank that stops by itself leaves word to the others, whose collective operations then fail: they stop with its
    exit code. Does not return where this process must end while a thread of it still waits for a lost rank.
    """
    rank = int(os.environ.get("RANK", "0"))
    trainer: Trainer | None = None
    watchdog: Watchdog | None = None
    try:
        trainer = Trainer(config)
        watchdog = trainer.watchdog
        code = trainer.run()
        trainer.close()
        return _end(code, "")
    except ReportedError as e:
        return _end(e.code, "")  # rank 0 says it
    except FolderBusyError as e:
        return _end(REQUEUE, f"error: {e}")
    except ValueError as e:
        return _end(USER, f"error: {e}" if rank == 0 else f"error (rank {rank}): {e}", watchdog)
    except BrokenPipeError:  # nobody reads what is printed
        return _end(REQUEUE, "")
    except OSError as e:
        what = f"{os.fsdecode(e.filename)}: {e.strerror}" if e.filename else str(e.strerror or e)
        return _end(USER, f"error (rank {rank}): {what}. Make room or fix it. {AGAIN}", watchdog)
    except Stopped:
        raise
    except KeyboardInterrupt:
        return _end(INTERRUPTED, f"interrupted while it stopped. {AGAIN}", watchdog)
    except Exception as e:
        if is_memory(e) and not isinstance(e, dist.DistError):
            said = str(e).splitlines()[0] if str(e) else type(e).__name__
            return _end(USER, f"error (rank {rank}): out of memory, {LESS_MEMORY}: {said}", watchdog)
        if isinstance(e, dist.DistError) or (
            isinstance(e, RuntimeError) and any(word in str(e) for word in LOST_WORDS) and dist.is_initialized()
        ):
            if isinstance(e, dist.DistBackendError):  # NCCL's: of a lost rank, but also of memory or of devices
                print(f"rank {rank}: {type(e).__name__}: {e}", file=sys.stderr, flush=True)
            code, reason = watchdog.last_words() if watchdog else (LOST, "a rank was lost at the start")
            message = f"error: {reason}. {AGAIN} (exit code {code})" if code == LOST else f"error: {reason}"
            _end(code, message if rank == 0 or "rank 0" in reason else "")
            os._exit(code)  # what waits for the lost rank cannot be stopped
        traceback.print_exc()
        kind = f"{type(e).__name__}: {e}".splitlines()[0]
        return _end(FAULT, f"error (rank {rank}): a fault of this program, please report it: {kind}. {AGAIN}", watchdog)
    finally:
        forget_recordings()
        if trainer is not None:
            trainer.end_threads()


def _end(code: int, message: str, watchdog: Watchdog | None = None) -> int:
    if message:
        with suppress(BrokenPipeError):
            print(message, file=sys.stderr, flush=True)
        if watchdog is not None:
            watchdog.leave_word(code, message.partition(": ")[2] or message)
    write_exit_file(code)
    return code
