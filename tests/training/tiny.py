"""A run small enough for a test, and a way to start several ranks of it."""

import json
import os
import signal
import socket
import subprocess
import sys
import sysconfig
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from nsa.config import Config, load_config
from tests import warm_python
from tests.conftest import HAS_GPU

ROOT = Path(__file__).resolve().parents[2]
TEXT = f"{sysconfig.get_path('stdlib')}/json/*.py"
YAML = """
name: run
output_dir: {folder}/runs
model: {{vocab_size: 400, hidden_size: 32, num_layers: 2, num_heads: 2, num_kv_heads: 1, head_dim: 16,
         intermediate_size: 48, max_position: 128}}
attention:
  kind: [nsa, dense]
  nsa: {{compress_length: 8, compress_stride: 4, block_size: 8, num_blocks: 4, window: 16}}
data:
  cache_dir: {folder}/../cache
  sequence_length: 64
  validation_fraction: 0.2
  workers: 1
  tokenizer: {{vocab_size: 400}}
  sources:
    - {{name: text, kind: files, path: "{text}"}}
    - {{name: copy, kind: synthetic, task: copy, weight: 0.25}}
optimizer: {{learning_rate: 3.0e-3, warmup_steps: 2}}
training: {{steps: 6, global_batch_size: 4, micro_batch_size: 1, validation_every: 4, validation_samples: 3,
            probe_every: 4}}
checkpoint: {{every: 2, keep_last: 10}}
engine: {{zero_stage: 0, precision: fp32}}
"""


def write_documents(folder: Path, number: int, longest: int) -> None:
    """Files in ``folder``/documents: short ones, some of a single character, so that a sample holds many."""
    (folder / "documents").mkdir()
    text = "".join(path.read_text() for path in sorted(Path(TEXT).parent.glob("*.py"))).replace("e", "é")
    start = 0
    for i in range(number):
        length = 1 + (i * i * 7) % longest
        (folder / "documents" / f"{i:03}.txt").write_text(text[start : start + length])
        start += length
    assert start < len(text)


def write_yaml(folder: Path) -> Path:
    """The tiny configuration as a file; runs land in ``folder``, prepared data beside it, for its sisters."""
    path = folder / f"tiny-{os.getpid()}.yaml"  # ranks write at the same time
    path.write_text(YAML.format(folder=folder, text=TEXT))
    return path


def tiny_config(folder: Path, *overrides: str) -> Config:
    return load_config(write_yaml(folder), overrides)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(
    arguments: list[str],
    rank: int = 0,
    world_size: int = 1,
    port: int = 0,
    own_session: bool = False,
    anew: bool = HAS_GPU,
    **more: str,
) -> Any:
    """Start ``python *arguments`` as one rank, as a launcher would (or without a launcher: ``world_size`` 1).

    Args:
        anew: in a new interpreter, and not in one that has its imports done.
        more: environment variables.

    Returns:
        A `subprocess.Popen`, or what behaves as one.
    """
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **more}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    environment |= as_rank(rank, world_size, port)
    if not anew:
        return warm_python.start(arguments, environment, ROOT, own_session)
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=own_session,
    )


def as_rank(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What a launcher puts into the environment of one rank; nothing for one alone."""
    if world_size == 1:
        return {}
    here = {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return here | {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}


def train(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """`python -m nsa.train` on the tiny configuration, in one process."""
    process = start(["-m", "nsa.train", str(write_yaml(folder)), *overrides])
    output, _ = process.communicate(timeout=180)
    return subprocess.CompletedProcess(process.args, process.returncode, output)


def on_ranks(
    world_size: int,
    folder: Path,
    checks: dict[str, tuple[str, dict[str, Any]]],
    script: Path | None = None,
    timeout: float = 600,
    gpus: int = 0,
) -> dict[str, Any]:
    """Run checks of ``script`` (rank_checks.py), one after the other, each in ``world_size`` new processes.

    Args:
        checks: a name for each, the check's function and its arguments.
        gpus: compute on the CPU where there are fewer; at least one for each process.

    Returns:
        What each returned on rank 0, by name.
    """
    write_yaml(folder)
    (folder / "checks.json").write_text(json.dumps(checks))
    script = script or Path(__file__).with_name("rank_checks.py")
    enough = torch.cuda.device_count() >= max(world_size, gpus)
    # To ask CUDA itself whether there is a GPU would keep the forked ranks from using it.
    more = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"} if enough else {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    process = start([str(script), str(folder), str(world_size)], own_session=True, **more)
    try:
        output = process.communicate(timeout=timeout)[0]
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # ranks that hang, too
    assert process.returncode == 0, output
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in checks}
