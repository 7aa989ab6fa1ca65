#!/usr/bin/env bash
# Sets up the environments and runs all checks: lint, format, strict types, imports, shell scripts, pytest; then the
# tests on vLLM's CPU build, some once more on the Triton and the transformers that verl installs, and with --all those
# on SGLang.
#   bash tests/run.sh                 what CI runs
#   bash tests/run.sh --all           also the slow tests
#   bash tests/run.sh tests/core/test_support.py -k ties    only pytest, with these arguments
#   bash tests/run.sh --vllm          only the tests on vLLM; also takes arguments for pytest
#   bash tests/run.sh --sglang        only the tests on SGLang
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

# Prints the folder $1 of the active environment, with the packages $2... in it: first on PYTHONPATH, they replace others.
folder_of() {
    local site=$VIRTUAL_ENV/$1
    shift
    if [ ! -d "$site" ]; then
        rm -rf "$site.part"
        python -m pip install --quiet --disable-pip-version-check --no-deps --target "$site.part" "$@" >&2 || return
        mv "$site.part" "$site"
    fi
    echo "$site"
}

# The kernels once more on the Triton of torch 2.11, verl's version; its interpreter needs an older NumPy.
with_verls_triton() { (
    # shellcheck source=/dev/null
    . .venv-test/bin/activate
    site=$(folder_of triton-3.6 triton==3.6.0 numpy==2.2.6)
    PYTHONPATH=$site python -m pytest tests/core/test_kernels.py tests/benchmarks/test_gpu_check.py --numprocesses 2 --dist loadscope \
        -k 'costs_on or launches_compiles and sm_90 or interpreter and (logits or rough or tokens or counts) or dry_run'
); }

# The engines once more on the transformers of verl's own stack. Its torch is on the index for CUDA alone.
with_verls_transformers() { (
    # shellcheck source=/dev/null
    . .venv-test/bin/activate
    site=$(folder_of transformers-5.9 transformers==5.9.0)
    PYTHONPATH=$site python -m pytest tests/embedded/test_rollout.py tests/distributed/test_fsdp_engine.py \
        tests/distributed/test_fused_head.py tests/distributed/test_model_families.py --numprocesses 2 --dist loadscope \
        -k 'test_rollout or sequence_parallel or old_pass or lora or half_precision or loss_gradient or fsdp2 or vision'
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
    beside --install-vllm
    checks
    with_verl --numprocesses 2 --dist loadscope "$@"
    finish --install-vllm
    # Compilers and the interpreter work while engines are slow to start.
    beside --verls-versions
    with_vllm "$@"
    finish --verls-versions
    if [ "$*" = --all ]; then with_sglang "$@"; fi
}

case "${1:-}" in
    '' | --all) everything "$@" ;;
    --vllm) with_vllm "${@:2}" ;;
    --sglang) with_sglang "${@:2}" ;;
    # Parts that a whole run starts in the background.
    --install-vllm) install_vllm ;;
    --verls-versions)
        with_verls_triton
        with_verls_transformers
        ;;
    *) with_verl "$@" ;;
esac
