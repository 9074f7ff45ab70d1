#!/usr/bin/env bash
# What meets transformers (exports, imports, methods on its models) under the oldest and the newest release that
# pyproject.toml allows:
#
#     bash tests/export/both_ends.sh [PYTEST ARGUMENTS]
#
# Each release, with what it needs, is installed over .venv in a temporary folder; .venv stays as it is.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
range=$(sed -n 's/^eval = .*"\(transformers>=[^"]*\)".*/\1/p' pyproject.toml)
oldest=${range#transformers>=}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONPATH=$PWD OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HOME=$work/hf
if ! nvidia-smi --list-gpus 2>/dev/null | grep -q '^GPU'; then export DS_ACCELERATOR=cpu; fi

status=0
for wanted in "transformers==${oldest%%,*}" "$range"; do
    environment=$work/${wanted//[^0-9.]/_}
    .venv/bin/python -m venv "$environment"
    site=$("$environment/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    .venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$site/below.pth"
    "$environment/bin/pip" install --quiet --no-cache-dir --upgrade "$wanted"
    "$environment/bin/python" -c 'import transformers; print("== transformers", transformers.__version__)'
    HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 "$environment/bin/python" -m pytest --numprocesses 2 --quiet \
        tests/export tests/importing tests/evaluation/test_hugging_face.py tests/evaluation/comparison/test_runner.py "$@" ||
        status=1
done
exit "$status"
