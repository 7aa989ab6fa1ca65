#!/usr/bin/env bash
# Sets up the environments and runs all checks: lint, format, strict types, imports, shell scripts, pytest; then the
# tests on vLLM's CPU build, some once more on the torch, Triton and transformers that verl installs, and with --all
# those on SGLang.
#   bash tests/run.sh                 what CI runs
#   bash tests/run.sh --all           also the slow tests
#   bash tests/run.sh tests/core/test_support.py -k ties    only pytest, with these arguments
#   bash tests/run.sh --vllm          only the tests on vLLM; also takes arguments for pytest
#   bash tests/run.sh --sglang        only the tests on SGLang
#   bash tests/run.sh --verls-stack   only those on verl's own versions
# Environment variables pass through, for example to use older vector instructions than the processor offers:
#   ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2 bash tests/run.sh
set -euo pipefail
cd "$(dirname "$0")/.."

# Creates the environment $1 if it does not exist.
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

# Creates the environment $1 and runs the command $3... on it, unless that was done with the same files $2.
installed() {
    local folder=$1 state
    # shellcheck disable=SC2086  # a list of names
    state=$(cat setup.cfg verl_troll/__init__.py $2 | cksum)
    shift 2
    environment "$folder"
    [ "$(cat "$folder/installed" 2>/dev/null)" = "$state" ] && return
    "$@"
    echo "$state" >"$folder/installed"
}

install_verl() {
    installed .venv-test '' .venv-test/bin/python -m pip install --quiet --disable-pip-version-check \
        --editable '.[cpu,megatron-cpu,tasks,dev]'
}

install_vllm() {
    installed .venv-vllm "$(echo examples/vllm_cpu/{setup.cfg,requirements.txt,install.sh})" \
        bash examples/vllm_cpu/install.sh .venv-vllm/bin/python --editable '.[cpu]' beartype pytest pytest-timeout
}

install_sglang() {
    installed .venv-sglang "$(echo tests/sglang/{requirements.txt,install.sh})" \
        bash tests/sglang/install.sh .venv-sglang/bin/python --editable '.[cpu]' beartype pytest pytest-timeout
}

with_verl() { (
    install_verl
    # shellcheck source=/dev/null
    . .venv-test/bin/activate
    python -m pytest "$@"
); }

install_verls_stack() { (
    # shellcheck source=/dev/null
    . .venv-test/bin/activate
    stack=.venv-test/verls-stack
    [ -d "$stack" ] && return
    rm -rf "$stack.part"
    # What these replace, and nothing else, may differ from the environment.
    python -m pip freeze --disable-pip-version-check | grep '==' | grep -vE '^(torch|triton|transformers|numpy)==' >"$stack.txt"
    python -m pip install --quiet --disable-pip-version-check --no-compile --target "$stack.part" \
        --constraint "$stack.txt" torch==2.11.0 transformers==5.9.0 numpy==2.2.6
    mv "$stack.part" "$stack"
); }

# Kernels and engines once more on the torch, Triton and transformers that verl installs, and the NumPy of that Triton's
# interpreter. This torch exists with CUDA alone: 2 GB to download, 4.6 GB of disk.
with_verls_stack() { (
    install_verls_stack
    # shellcheck source=/dev/null
    . .venv-test/bin/activate
    export PYTHONPATH=$PWD/.venv-test/verls-stack
    python -m pytest tests/core/test_kernels.py tests/benchmarks/test_gpu_check.py --numprocesses 2 --dist loadscope \
        -k 'costs_on or launches_compiles and sm_90 or interpreter and (logits or rough or tokens or counts) or dry_run'
    python -m pytest tests/distributed/test_fsdp_engine.py tests/distributed/test_model_families.py \
        --numprocesses 2 --dist loadscope -k 'old_pass or lora or loss_gradient or fsdp2'
); }

with_vllm() {
    install_vllm
    .venv-vllm/bin/python -m pytest tests/vllm tests/patches/test_patches.py "$@"
}

with_sglang() {
    install_sglang
    .venv-sglang/bin/python -m pytest tests/sglang "$@"
}

checks() { (
    # shellcheck source=/dev/null
    . .venv-test/bin/activate
    ruff check .
    ruff format --check .
    mypy verl_troll hydra_plugins benchmarks examples/quickstart tests
    lint-imports --no-cache
    git ls-files -z '*.sh' .ci/run | xargs -0 shellcheck
); }

# Runs the part $1 in the background, as the process group $job.
beside() {
    set -m
    nice bash tests/run.sh "$1" >"$logs/$1" 2>&1 &
    set +m
    job=$!
}

# Waits for $job and prints the output of the part $1.
finish() {
    local status=0
    wait "$job" || status=$?
    job=
    cat "$logs/$1"
    return "$status"
}

leave_nothing() {
    if [ -n "$job" ]; then kill -- "-$job" 2>/dev/null || true; fi
    rm -rf "$logs"
}

everything() {
    job=
    logs=$(mktemp -d)
    trap leave_nothing EXIT
    install_verl
    # Downloaded and unpacked while the tests run.
    beside --install-others
    checks
    with_verl --numprocesses 2 --dist loadscope "$@"
    finish --install-others
    # Compilers and the interpreter work while engines are slow to start.
    beside --verls-stack
    with_vllm "$@"
    finish --verls-stack
    if [ "$*" = --all ]; then with_sglang "$@"; fi
}

case "${1:-}" in
    '' | --all) everything "$@" ;;
    --vllm) with_vllm "${@:2}" ;;
    --sglang) with_sglang "${@:2}" ;;
    # Parts that a whole run starts in the background.
    --install-others)
        install_vllm
        install_verls_stack
        ;;
    --verls-stack) with_verls_stack ;;
    *) with_verl "$@" ;;
esac
