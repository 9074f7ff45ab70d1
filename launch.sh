#!/usr/bin/env bash
# The one entrance. `bash launch.sh --help` says what it does.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

usage() {
    cat <<'HELP'
usage: bash launch.sh [COMMAND] [ARGUMENTS]

  (none), demo [KEY=VALUE ...]      set up, then pretrain, export and evaluate a small model on real text
                                    (about seven minutes on two CPU cores, no network after the set-up)
  setup                             only make the environment in .venv (every command does, when needed)
  test [--slow] [PYTEST ARGUMENTS]  ruff, mypy and the tests
  prepare CONFIG [KEY=VALUE ...]    train the tokenizer and write the token shards (train does it too)
  train CONFIG [KEY=VALUE ...]      train on all local GPUs, or on one CPU process; the same command resumes
  export RUN                        write a run's last checkpoint as a Hugging Face folder
  evaluate EXPORT                   bits per byte by position and recall tasks of an export
  tensorboard [FOLDER]              show the runs in FOLDER (checkpoints) on http://127.0.0.1:6006

exit codes of train (docs/reliability.md)
  0 complete, 2 mend something, 75 stopped and saved, 85 a rank was lost: on 75 and 85 run the same command again

environment
  PYTHON       the interpreter that .venv is made with: 3.11 or newer (default: the first found)
  HOSTFILE     train on the machines of a DeepSpeed hostfile ("host slots=8" a line; needs pdsh and ssh)
  CUDA_VISIBLE_DEVICES, MASTER_ADDR, MASTER_PORT, OMP_NUM_THREADS   as everywhere
  SLURM        srun --nodes 4 --ntasks-per-node 8 --gpus-per-node 8 bash launch.sh train configs/7b.yaml
               needs nothing else: every task is a rank (run `bash launch.sh setup` once before)

examples
  bash launch.sh
  bash launch.sh train configs/125m.yaml optimizer.learning_rate=3e-4 'attention.kind=[dense, nsa]'
HELP
}

say() { printf '\033[1m== %s\033[0m\n' "$*" >&2; }
fail() { printf 'launch.sh: %s\n' "$*" >&2; exit 1; }

has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi --list-gpus 2>/dev/null | grep -q '^GPU'; }

# ---------------------------------------------------------------------------------------------------- set-up

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.11 python3.12 python3.13 python3 python; do
        if [[ -n $candidate ]] &&
            "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
        [[ -z $candidate || $candidate != "${PYTHON:-}" ]] || fail "PYTHON=$PYTHON is no Python >= 3.11 with venv"
    done
    fail "needs Python >= 3.11 with its venv module (Debian: apt install python3-venv); or set PYTHON"
}

# On Linux the torch of the public index brings gigabytes of CUDA libraries. Without an NVIDIA GPU only a CPU build
# is asked for, by its local version: pip finds it where it is configured to, and never falls back to the other.
install_cpu_torch() {
    local pin
    pin=$(sed -n 's/^ *"\(torch==[0-9.]*\)",.*/\1/p' pyproject.toml)
    python -c "import torch, sys; sys.exit(torch.__version__.split('+')[0] != '${pin#torch==}')" 2>/dev/null && return
    say "installing $pin, CPU build (no NVIDIA GPU found)"
    pip install --no-cache-dir --quiet --progress-bar off "$pin+cpu" || fail "pip finds no CPU build of $pin.
The build on the public index would bring gigabytes of CUDA libraries, useless on this machine without an NVIDIA GPU.
Let pip see PyTorch's CPU builds and run the command again: set PIP_EXTRA_INDEX_URL to the address that the
installation page of pytorch.org shows for 'Compute Platform: CPU', or PIP_FIND_LINKS to a folder with the wheel.
(Any other build: .venv/bin/pip install $pin, then run the command again.)"
}

setup() {
    local stamp wanted
    stamp=.venv/setup-stamp
    wanted="$PWD $(has_gpu && echo gpu || echo cpu) $(cksum <pyproject.toml)"
    if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
        activate
        return
    fi
    mkdir -p .venv
    exec 9>.venv/setup-lock
    if command -v flock >/dev/null && ! flock --nonblock 9; then
        say "another process is setting up .venv: waiting"
        flock 9
        exec 9>&-
        setup
        return
    fi
    local python
    python=$(find_python)
    say "setting up .venv with $("$python" --version) (a few minutes, once)"
    [[ -x .venv/bin/pip ]] || "$python" -m venv .venv
    activate
    if [[ $(uname -s) == Linux ]] && ! has_gpu; then
        install_cpu_torch
    fi
    say "installing the dependencies of pyproject.toml"
    pip install --no-cache-dir --progress-bar off --editable '.[dev]'
    echo "$wanted" >"$stamp"
    exec 9>&-
    say "set-up done"
}

activate() {
    export VIRTUAL_ENV=$PWD/.venv PATH="$PWD/.venv/bin:$PATH"
    # What is compiled belongs to this environment; nothing is left in the home folder.
    export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$PWD/.venv/cache/torch_extensions}
    export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$PWD/.venv/cache/triton}
    if ! has_gpu; then
        export DS_ACCELERATOR=cpu
    fi
}

# For the demo and the tests, which need no network: nothing is read from or left in the home folder or /tmp.
stay_inside() {
    export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_HOME=$PWD/.venv/cache/huggingface
    export XDG_CACHE_HOME=$PWD/.venv/cache MPLCONFIGDIR=$PWD/.venv/cache/matplotlib TRITON_HOME=$PWD/.venv/cache
    TMPDIR=$(mktemp -d)
    export TMPDIR
    trap 'rm -rf "$TMPDIR"' EXIT
}

# -------------------------------------------------------------------------------------------------- commands

free_port() { python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'; }

train() {
    [[ $# -ge 1 ]] || fail "train needs a configuration, e.g. bash launch.sh train configs/demo.yaml"
    python -m nsa.config "$@" >/dev/null # a mistake is told once and at once, not by every rank of a launcher
    if [[ -n ${SLURM_STEP_ID:-} && ${SLURM_NTASKS:-1} -gt 1 ]]; then # inside srun: this process is one rank
        export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
        export MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_STEP_NODELIST" | head -n 1)}
        export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
        exec python -m nsa.train "$@"
    fi
    local launcher=(deepspeed --quiet)
    if [[ -n ${HOSTFILE:-} ]]; then
        launcher+=(--hostfile "$HOSTFILE" ${MASTER_ADDR:+--master_addr "$MASTER_ADDR"})
        launcher+=(${MASTER_PORT:+--master_port "$MASTER_PORT"})
    else
        has_gpu || launcher+=(--num_gpus 1) # the launcher counts CPU processes as GPUs
        launcher+=(--master_port "${MASTER_PORT:-$(free_port)}")
    fi
    say "${launcher[*]} nsa/train.py $*"
    # The launcher has exit codes of its own when a rank fails: rank 0 writes the run's into a file.
    local status=0 said
    NSA_EXIT_FILE=$(mktemp)
    export NSA_EXIT_FILE
    "${launcher[@]}" nsa/train.py "$@" || status=$?
    said=$(<"$NSA_EXIT_FILE")
    rm -f "$NSA_EXIT_FILE"
    if [[ $status -ne 0 && -n $said ]]; then
        status=$said
    elif [[ $status -gt 128 && $status -ne 130 ]]; then
        say "a process was killed: run the same command again"
        status=85
    fi
    return "$status"
}

demo() {
    local config=configs/demo.yaml run trigram
    run=$(python -m nsa.config "$config" "$@" | python -c \
        'import sys, yaml; c = yaml.safe_load(sys.stdin); print(c["output_dir"] + "/" + c["name"])')
    say "1/5 data: the sources and docs of Python's standard library, a tokenizer trained on them"
    python -m nsa.data.prepare "$config" "$@"
    say "2/5 a byte-level trigram model on the same split, to compare with"
    trigram=$(python -m nsa.data.trigram "$config" "$@")
    echo "$trigram"
    say "3/5 training"
    train "$config" "$@"
    say "4/5 export to a Hugging Face folder"
    python -m nsa.export "$run"
    say "5/5 evaluation of the export"
    python -m nsa.evaluate "$run/export"
    say "done: the recall scores are above; here is the rest"
    python -m nsa.summary "$run"
    echo "to compare with: $trigram"
    echo "watch the curves: bash launch.sh tensorboard"
}

run_tests() {
    local pytest=(pytest --numprocesses "$(python -c 'import os; print(min(8, os.cpu_count()))')" --dist loadgroup)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    say "ruff"
    ruff check .
    ruff format --check .
    say "mypy"
    mypy
    say "${pytest[*]} $*"
    "${pytest[@]}" "$@"
}

main() {
    local command=${1:-demo}
    [[ $# -eq 0 ]] || shift
    case $command in
        -h | --help | help) usage ;;
        setup) setup ;;
        demo) setup; stay_inside; demo "$@" ;;
        test) setup; stay_inside; run_tests "$@" ;;
        train) setup; train "$@" ;;
        prepare) setup; python -m nsa.data.prepare "$@" ;;
        export) setup; python -m nsa.export "$@" ;;
        evaluate) setup; python -m nsa.evaluate "$@" ;;
        tensorboard) setup; tensorboard --logdir "${1:-checkpoints}" --host 127.0.0.1 --load_fast=false "${@:2}" ;;
        *=* | *.yaml) fail "unknown command $command; did you mean: bash launch.sh train $command ?" ;;
        *) fail "unknown command $command; bash launch.sh --help shows the commands" ;;
    esac
}

main "$@"
