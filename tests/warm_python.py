"""Python processes that find their imports done: they are forked from one that has imported what training needs.

A new process that trains takes ten seconds to import torch's compiler, DeepSpeed and ours. `start` returns at once what
behaves as `subprocess.Popen` of ``python *arguments``: a process of its own, with its environment, signals and exit
code. Not its own are the seed of hashes and what a module does as it is imported: who tests these starts Python anew.
"""

import atexit
import gc
import importlib
import json
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

IMPORTS = ("torch._inductor", "deepspeed", "nsa.training.job", "nsa.training.trainer", "tensorboard")
MESSAGE = 1 << 20  # bytes, for a request

_server: socket.socket | None = None  # of this process


class Process:
    """The part of `subprocess.Popen` that tests use; standard output and errors come in one stream."""

    def __init__(self, arguments: list[str], environment: dict[str, str], cwd: Path, own_session: bool) -> None:
        self.args, self.returncode = arguments, None
        request = {"arguments": arguments, "environment": environment, "cwd": str(cwd), "own_session": own_session}
        output, written = os.pipe()
        self._status, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        socket.send_fds(server(), [json.dumps(request).encode()], [written, theirs.fileno()])
        os.close(written)
        theirs.close()
        self.stdout = os.fdopen(output)
        self.pid = int(self._status.recv(20) or 0)
        assert self.pid, "the process that forks is gone"

    def poll(self) -> int | None:
        try:
            return self.wait(timeout=0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self._status.settimeout(timeout)
            try:
                self.returncode = int(self._status.recv(20))
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired(self.args, timeout or 0) from None
            self._status.close()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        said: list[str] = []
        reader = threading.Thread(target=lambda: said.append(self.stdout.read()), daemon=True)
        reader.start()
        reader.join(timeout)
        if reader.is_alive():
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        self.stdout.close()
        self.wait(timeout)
        return said[0], None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


def start(arguments: list[str], environment: dict[str, str], cwd: Path, own_session: bool = False) -> Process:
    """As `subprocess.Popen` of ``python *arguments``: a file, ``-m`` and a module or ``-c`` and code come first."""
    return Process(arguments, environment, cwd, own_session)


def server() -> socket.socket:
    """The way to the process that forks, which ends with this one."""
    global _server
    if _server is None:
        _server, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        root = str(Path(__file__).resolve().parents[1])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        command = [sys.executable, "-m", "tests.warm_python", str(theirs.fileno())]
        forks = subprocess.Popen(
            command, cwd=root, env=environment, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
        )
        theirs.close()
        atexit.register(lambda channel: channel.close() or forks.wait(), _server)
    return _server


# ------------------------------------------------------------------------------------------ the process that forks


def import_all() -> None:
    """What a run imports, also what it imports as its first optimizer is made and its first engine is built."""
    for name in IMPORTS:
        importlib.import_module(name)
    import deepspeed
    import torch

    torch.optim.SGD([torch.zeros(1)], lr=1.0)
    deepspeed.ops.__compatible_ops__  # noqa: B018 - asks the compiler what it can compile


def serve(channel: socket.socket) -> dict[str, Any]:
    """Fork for every request, and return it in the new process. Who waits for that process tells its exit code."""
    while True:
        message, fds, *_ = socket.recv_fds(channel, MESSAGE, 2)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if not message:
            os._exit(0)
        if not os.fork():
            break
        for fd in fds:
            os.close(fd)
    channel.close()
    output, status = fds[0], socket.socket(fileno=fds[1])
    request = json.loads(message)
    if process := os.fork():
        for fd in (0, 1, 2, output):
            os.close(fd)
        status.send(str(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])).encode())
        os._exit(0)
    if request["own_session"]:
        os.setsid()
    for fd in (1, 2):
        os.dup2(output, fd)
    os.close(output)
    status.send(str(os.getpid()).encode())
    status.close()
    return request


def become(request: dict[str, Any]) -> None:
    """Run what ``python *arguments`` would."""
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    random.seed()
    first, *rest = request["arguments"]
    if first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv = ["-c", *rest[1:]]
        main = sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), vars(main))  # noqa: S102 - of a test
    else:
        sys.argv = [first, *rest]
        sys.path.insert(0, str(Path(first).resolve().parent))
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    inherited = socket.socket(fileno=int(sys.argv[1]))
    import_all()
    gc.freeze()  # the collector would write to, and so copy, every object
    assert threading.active_count() == 1
    become(serve(inherited))
