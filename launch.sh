#!/usr/bin/env bash
# The one entrance. `bash launch.sh --help` says what it does.
set -euo pipefail
HERE=$PWD
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$ROOT"

usage() {
    cat <<'HELP'
usage: bash launch.sh [COMMAND] [ARGUMENTS]

  (none), demo [KEY=VALUE ...]      set up, then pretrain, export and evaluate a small model on real text
                                    (about seven minutes on two CPU cores, no network after the set-up)
  setup                             only make the environment in .venv (every command does, when needed)
  test [--slow] [PYTEST ARGUMENTS]  ruff, mypy and the tests
  prepare CONFIG [KEY=VALUE ...]    train the tokenizer and write the token shards (train does it too)
  train CONFIG [KEY=VALUE ...]      train on all local GPUs, or on one CPU process; the same command resumes.
                                    A CONFIG with stages: one after the other, or one with stage=NAME
  export RUN                        write a run's last checkpoint as a Hugging Face folder
  evaluate EXPORT                   bits per byte by position and recall tasks of an export
  compare [CONFIG] [KEY=VALUE ...]  train the models of CONFIG, run methods of sparse attention on them, and write a
                                    report (without CONFIG: a small one, within half an hour on two CPU cores).
                                    --minutes N: begin nothing new after that, exit with 75; the same command continues
                                    --workers N: train and answer in N processes at once, spread over the GPUs
  compare --report FOLDER [--partial] [--pack OUT]
                                    write the report again from the results in FOLDER, or from committed results
                                    (docs/results); with OUT: also pack results and report into few files, for git
                                    --partial: of a comparison that was stopped, from the cells that are there
  tensorboard [FOLDER]              show the runs in FOLDER (checkpoints) on http://127.0.0.1:6006

Paths are relative to the folder in which you give the command. A CONFIG that is not there is looked for in this project.
`train CONFIG --dry-run` prints the size of a run and stops.

exit codes of train and compare (docs/reliability.md)
  0 complete, 2 fix something, 75 stopped and saved, 85 a rank was lost: on 75 and 85 run the same command again

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

say() { printf '\033[1m== %s\033[0m\n' "$*" >&2 || true; }
fail() { printf 'launch.sh: %s\n' "$*" >&2; exit 2; }

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
    wanted="$ROOT $(has_gpu && echo gpu || echo cpu) $(cksum <pyproject.toml)"
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
    export VIRTUAL_ENV=$ROOT/.venv PATH="$ROOT/.venv/bin:$PATH"
    # What is compiled belongs to this environment; nothing is left in the home folder.
    export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$ROOT/.venv/cache/torch_extensions}
    export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$ROOT/.venv/cache/triton}
    if ! has_gpu; then
        export DS_ACCELERATOR=cpu
    fi
}

# For the demo and the tests, which need no network: nothing is read from or left in the home folder or /tmp.
stay_inside() {
    export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_HOME=$ROOT/.venv/cache/huggingface
    export XDG_CACHE_HOME=$ROOT/.venv/cache MPLCONFIGDIR=$ROOT/.venv/cache/matplotlib TRITON_HOME=$ROOT/.venv/cache
    TMPDIR=$(mktemp -d)
    export TMPDIR
    trap 'rm -rf "$TMPDIR"' EXIT
}

# -------------------------------------------------------------------------------------------------- commands

free_port() { python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'; }

# Run a command that a signal to this script ends as well. It has a process group of its own: a terminal's Ctrl-C comes
# here alone, and is passed on to the ranks, who save. Their launcher would give them 30 s.
attend() {
    local status=0
    asked=
    set -m
    "$@" </dev/null &
    attended=$!
    set +m
    trap 'pass_on TERM' TERM
    trap 'pass_on HUP' HUP
    trap 'pass_on USR1' USR1
    trap 'pass_on USR2' USR2
    trap 'pass_on INT' INT
    trap 'pass_on QUIT' QUIT
    trap '' PIPE
    while true; do
        status=0
        wait "$attended" || status=$?
        kill -0 "$attended" 2>/dev/null || break # else a signal ended the wait
    done
    while [[ -n $(ranks) ]]; do sleep 0.2 || true; done # of a launcher that was killed: they notice, and save
    trap - TERM HUP USR1 USR2 INT QUIT PIPE
    return "$status"
}

# The ranks on this machine that live, by the process ids that they have written.
ranks() {
    local pid
    [[ -n ${NSA_EXIT_FILE:-} && -f $NSA_EXIT_FILE.ranks ]] || return 0
    while read -r pid; do
        if kill -0 "$pid" 2>/dev/null; then echo "$pid"; fi
    done <"$NSA_EXIT_FILE.ranks"
}

pass_on() {
    local found
    asked=$1
    found=$(ranks)
    if [[ -n $found ]]; then
        kill -s "$1" $found 2>/dev/null || true
    elif [[ -n ${HOSTFILE:-} && -n ${run_folder:-} && -d ${run_folder:-} ]]; then # the ranks are elsewhere
        touch "$run_folder/STOP"
    else # nothing to save yet
        kill -s TERM -- "-$attended" 2>/dev/null || true
    fi
}

# The run folder of a configuration. A mistake in it is reported once and at once, not by every rank of a launcher.
run_folder_of() {
    local printed
    printed=$(python -m nsa.config "$@") || return
    python -c 'import sys, yaml; c = yaml.safe_load(sys.stdin); print(c["output_dir"] + "/" + c["name"])' <<<"$printed"
}

train() {
    [[ $# -ge 1 ]] || fail "train needs a configuration, e.g. bash launch.sh train configs/demo.yaml"
    local argument
    for argument in "$@"; do # an option prints something and stops
        if [[ $argument == -* ]]; then exec python -m nsa.train "$@"; fi
    done
    local stages stage
    stages=$(python -m nsa.config --stages "$1") || return
    if [[ -n $stages && " $*" != *" stage="* ]]; then # one run after the other; those that are complete end at once
        for stage in $stages; do
            say "stage $stage"
            if [[ -n ${SLURM_STEP_ID:-} ]]; then (train "$@" "stage=$stage"); else train "$@" "stage=$stage"; fi || return
        done
        return
    fi
    run_folder=$(run_folder_of "$@") || return
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
    # The launcher has exit codes of its own when a rank fails or it is killed: rank 0 writes the run's into a file.
    local status=0 said
    NSA_EXIT_FILE=$(mktemp)
    export NSA_EXIT_FILE
    attend "${launcher[@]}" "$ROOT/nsa/train.py" "$@" || status=$?
    said=$(<"$NSA_EXIT_FILE")
    rm -f "$NSA_EXIT_FILE" "$NSA_EXIT_FILE.ranks"
    unset NSA_EXIT_FILE
    if [[ -n $said ]]; then
        status=$said
    elif [[ $asked == INT || $asked == QUIT ]]; then
        status=130
    elif [[ -n $asked ]]; then
        status=75
    elif [[ $status -gt 128 || ($status -eq 0 && -z ${HOSTFILE:-}) ]]; then
        say "a process was killed: run the same command again"
        status=85
    fi
    return "$status"
}

demo() {
    local config=configs/demo.yaml run trigram
    run=$(run_folder_of "$config" "$@")
    say "1/5 data: the sources and docs of Python's standard library, a tokenizer trained on them"
    attend python -m nsa.data.prepare "$config" "$@"
    say "2/5 a byte-level trigram model on the same split, to compare with"
    trigram=$(python -m nsa.data.trigram "$config" "$@")
    echo "$trigram"
    say "3/5 training"
    train "$config" "$@"
    say "4/5 export to a Hugging Face folder"
    attend python -m nsa.export "$run"
    say "5/5 evaluation of the export"
    attend python -m nsa.evaluate "$run/export"
    say "done: the recall scores are above; here is the rest"
    python -m nsa.summary "$run"
    echo "to compare with: $trigram"
    echo "watch the curves: bash launch.sh tensorboard"
}

# Each training of a sibling is a `launch.sh train`. Python passes signals on to it.
compare() {
    local command=(python -m nsa.compare) argument before='' config=''
    case ${1:-} in
        --report) exec "${command[@]}" report "${@:2}" ;;
        --report=*) exec "${command[@]}" report "${1#*=}" "${@:2}" ;;
    esac
    command+=(--launch "$ROOT/launch.sh")
    for argument in "$@"; do
        [[ $argument == -* || $before == --minutes || $before == --workers ]] || config=$argument
        before=$argument
    done
    [[ -z $config ]] || exec "${command[@]}" "$@"
    stay_inside
    attend "${command[@]}" "$ROOT/configs/compare/demo.yaml" "$@"
}

run_tests() {
    local pytest=(pytest --numprocesses "$(python -c 'import os; print(min(8, os.cpu_count()))')")
    pytest+=(--dist loadgroup --no-loadscope-reorder) # in the order of tests/conftest.py: what takes longest comes first
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    say "ruff"
    ruff check .
    ruff format --check .
    say "mypy"
    mypy
    say "${pytest[*]} $*"
    "${pytest[@]}" "$@"
}

show_board() { exec tensorboard --logdir "${1:-checkpoints}" --host 127.0.0.1 --load_fast=false "${@:2}"; }

prepare() { exec python -m nsa.data.prepare "$@"; }

# Run "$1" where the command was given: its files are there. A configuration that is not may be the repository's.
from_here() {
    local command=$1
    shift
    cd "$HERE"
    if [[ $# -gt 0 && ! -e $1 && -f $ROOT/$1 ]]; then set -- "$ROOT/$1" "${@:2}"; fi
    "$command" "$@"
}

main() {
    local command=${1:-demo}
    [[ $# -eq 0 ]] || shift
    case $command in
        -h | --help | help) usage ;;
        setup) setup ;;
        demo) setup; stay_inside; demo "$@" ;;
        test) setup; stay_inside; run_tests "$@" ;;
        train) setup; from_here train "$@" ;;
        compare) setup; from_here compare "$@" ;;
        prepare) setup; from_here prepare "$@" ;;
        export) setup; cd "$HERE"; exec python -m nsa.export "$@" ;;
        evaluate) setup; cd "$HERE"; exec python -m nsa.evaluate "$@" ;;
        tensorboard) setup; cd "$HERE"; show_board "$@" ;;
        *=* | *.yaml) fail "unknown command $command; did you mean: bash launch.sh train $command ?" ;;
        *) fail "unknown command $command; bash launch.sh --help shows the commands" ;;
    esac
}

main "$@"
