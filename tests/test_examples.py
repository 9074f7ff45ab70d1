"""The cluster examples, run: two local ranks under stand-ins for Slurm's commands, and DeepSpeed's hostfile here."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nsa.training import checkpoint
from tests.conftest import HAS_GPU, ROOT
from tests.training.tiny import free_port, write_yaml

# What srun does, on this machine: every task gets the variables that launch.sh reads; the highest exit code counts.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
export SLURM_STEP_ID=0 SLURM_NTASKS=2 SLURM_STEP_NODELIST=localhost
for task in 0 1; do SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & pids+=($!); done
if [[ -n ${SIGNAL_AFTER:-} && ! -e $SIGNAL_AFTER.sent ]]; then
    until grep -q '^step' "$SIGNAL_AFTER" 2>/dev/null; do sleep 0.05; kill -0 "${pids[0]}" || break; done
    touch "$SIGNAL_AFTER.sent"
    kill -USR1 "${pids[1]}"
fi
status=0
for pid in "${pids[@]}"; do wait "$pid"; code=$?; ((code > status)) && status=$code; done
exit "$status"
"""
SCONTROL = """#!/bin/bash
case $1 in
    show) echo 127.0.0.1 ;;
    requeue) echo "requeue $2" >>"$REQUEUED" ;;
esac
"""
SMALL = ["training.steps=60", "checkpoint.every=30", "checkpoint.keep_last=1"]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone that has been set up with this Python, so that launch.sh installs nothing."""
    root = tmp_path / "clone"
    (root / ".venv").mkdir(parents=True)
    for name in ("launch.sh", "pyproject.toml", "nsa", "models", "data", "docs"):
        (root / name).symlink_to(ROOT / name)
    for name in ("bin", "lib", "pyvenv.cfg"):
        (root / ".venv" / name).symlink_to(Path(sys.prefix) / name)
    gpu = "gpu" if HAS_GPU else "cpu"
    cksum = subprocess.run(["cksum"], stdin=(ROOT / "pyproject.toml").open(), capture_output=True, text=True).stdout
    (root / ".venv/setup-stamp").write_text(f"{root} {gpu} {cksum}")
    return root


@pytest.fixture
def cluster(tmp_path: Path, clone: Path) -> dict[str, str]:
    """The environment of a Slurm job."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, script in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tools / name).write_text(script)
        (tools / name).chmod(0o755)
    job = {"SLURM_JOB_ID": str(free_port() - 20000), "SLURM_SUBMIT_DIR": str(clone), "MASTER_PORT": str(free_port())}
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    path = f"{tools}:{environment['PATH']}"
    return {
        **environment,
        **job,
        "PATH": path,
        "OMP_NUM_THREADS": "1",
        "REQUEUED": str(tmp_path / "requeued"),
        "PYTHONPATH": str(ROOT),
    }


def run(command: list[str], environment: dict[str, str], log: Path) -> int:
    """The exit code of a command in the clone."""
    with log.open("w") as file:
        here = environment["SLURM_SUBMIT_DIR"]
        done = subprocess.run(command, cwd=here, env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=300)
        return done.returncode


def test_a_slurm_job_that_is_signalled_saves_and_is_requeued_until_it_is_complete(tmp_path, cluster):
    """SIGUSR1 to one rank, as Slurm sends before a time limit: saved, 75, requeued; the next job completes the run."""
    log, command = tmp_path / "log", ["bash", "docs/examples/train.slurm", str(write_yaml(tmp_path)), *SMALL]
    environment = {**cluster, "SIGNAL_AFTER": str(log)}
    assert run(command, environment, log) == 75, log.read_text()
    text = log.read_text()
    assert "run the same command to go on" in text and "exit code 75: requeued" in text and "Traceback" not in text
    assert Path(cluster["REQUEUED"]).read_text() == f"requeue {cluster['SLURM_JOB_ID']}\n"
    assert run(command, {**environment, "MASTER_PORT": str(free_port())}, log) == 0, log.read_text()
    assert "resumed" in log.read_text() and "2 x cpu" in log.read_text()
    assert checkpoint.step_of(checkpoint.checkpoints(tmp_path / "runs/run")[0]) == 60
    assert Path(cluster["REQUEUED"]).read_text().count("requeue") == 1


def test_a_run_is_started_from_elsewhere_and_its_launcher_is_stopped(tmp_path, clone):
    """What systemd or a container signals is launch.sh. It writes beside the configuration that it was given."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    here = tmp_path / "exp"
    here.mkdir()
    write_yaml(tmp_path).rename(here / "mine.yaml")
    process = subprocess.Popen(
        ["bash", str(clone / "launch.sh"), "train", "mine.yaml", "output_dir=runs", *SMALL, "training.steps=4000"],
        cwd=here,
        env={**environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    printed = []
    for line in process.stdout:
        printed.append(line)
        if line.startswith("step"):
            break
    process.send_signal(signal.SIGTERM)
    printed.append(process.communicate(timeout=120)[0])
    assert process.returncode == 75, "".join(printed)
    assert "(SIGTERM); run the same command to go on" in "".join(printed)
    assert len(checkpoint.checkpoints(here / "runs/run")) == 1


def test_a_hostfile(tmp_path, cluster):
    """In the format of docs/examples/hostfile: this machine's name, two slots, and a stand-in for the ssh that
    DeepSpeed asks it with; a STOP file stops the run, and launch.sh tells the run's own exit code."""
    lines = (ROOT / "docs/examples/hostfile").read_text().splitlines()
    assert all(line.split()[1].startswith("slots=") for line in lines)
    ssh = tmp_path / "tools/ssh"
    ssh.write_text("#!/bin/bash\n[[ $* == *hostname* ]] && echo 127.0.0.1\n")
    ssh.chmod(0o755)
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    (tmp_path / "runs/run").mkdir(parents=True)
    (tmp_path / "runs/run/STOP").touch()
    environment = {**cluster, "HOSTFILE": str(tmp_path / "hosts"), "MASTER_ADDR": "127.0.0.1"}
    code = run(["bash", "launch.sh", "train", str(write_yaml(tmp_path)), *SMALL], environment, tmp_path / "log")
    text = (tmp_path / "log").read_text()
    assert code == 75, text
    assert "2 x cpu" in text and "the file" in text and not (tmp_path / "runs/run/STOP").exists()
