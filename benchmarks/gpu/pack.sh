#!/usr/bin/env bash
# Packs what verl's trainer needs on an offline GPU machine that has PyTorch and the usual packages around it:
# verl, Ray (without dashboard pages and jars), megatron-core, and what they import. Packing needs a network and pip;
# any Python will do.
#   bash benchmarks/gpu/pack.sh [FOLDER]                      FOLDER/site.tar.xz, by default in .pack
#   PYTHON_VERSION=3.11 bash benchmarks/gpu/pack.sh FOLDER    for a Python other than 3.12
# On that machine, in the clone, with FOLDER beside it:
#   python3 -m tarfile -e FOLDER/site.tar.xz /tmp/site && export PYTHONPATH=/tmp/site:$PWD
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=${1:-.pack}
version=${PYTHON_VERSION:-3.12}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT

# The machine provides torch, triton, numpy, pandas, pyarrow, accelerate, aiohttp, grpcio, protobuf, psutil, einops,
# safetensors, huggingface-hub, cloudpickle, msgpack, prometheus-client, tensorboard and their dependencies.
# The tested versions, as setup.cfg pins them, and what they import.
tested='verl|ray(\[default\])?|tensordict|TransferQueue|transformers|megatron-core|mbridge'
mapfile -t packages < <(grep -oE "^ +($tested)==[0-9.]+$" setup.cfg | tr -d ' ')
((${#packages[@]} == 7)) || {
    echo "pack.sh: setup.cfg should pin seven packages of $tested, and pins ${packages[*]}" >&2
    exit 1
}
packages+=(
    tokenizers==0.22.2
    hydra-core==1.3.8 omegaconf==2.3.1 pyvers==0.1.0 orjson==3.13.0 importlib_metadata==10.2.0 lazy-importer==0.1.0
    pyzmq==27.3.0 msgspec==0.22.0 cachetools==8.0.2 codetiming==1.4.0 torchdata==0.11.0 peft==0.21.2
    datasets==5.2.0 dill==0.4.1 multiprocess==0.70.19
    fastapi==0.115.14 starlette==0.46.2 uvicorn==0.54.0 pydantic==2.14.4 pydantic_core==2.50.5
    jaxtyping==0.3.11 wadler-lindig==0.1.8
    annotated-types==0.8.0 typing-inspection==0.4.5 typing_extensions==4.16.0
    jsonschema==4.26.0 jsonschema-specifications==2025.9.1 referencing==0.37.0 rpds-py==2026.9.1
)

platforms=()
for name in manylinux_2_34_x86_64 manylinux_2_28_x86_64 manylinux_2_27_x86_64 manylinux_2_26_x86_64 \
    manylinux_2_24_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64 manylinux1_x86_64; do
    platforms+=(--platform "$name")
done
python=${PYTHON:-python3}
"$python" -m pip install --quiet --disable-pip-version-check --no-deps --no-compile --target "$site" \
    --only-binary=:all: --implementation cp --python-version "$version" "${platforms[@]}" "${packages[@]}"
# Published without a wheel; pure Python.
"$python" -m pip install --quiet --disable-pip-version-check --no-deps --no-compile --target "$site" \
    antlr4-python3-runtime==4.9.3

(
    cd "$site"
    rm -rf bin ray/jars ray/cpp ray/dashboard/client ray/rllib ray/tune ray/serve ray/llm ray/core/libjemalloc.so
    find . -depth \( -name __pycache__ -o -name tests -o -name '*.pyi' -o -name '*.pxd' \) -exec rm -rf {} +
)
mkdir -p "$folder"
tar -C "$site" --sort=name --owner=0 --group=0 --mtime=@0 -c . | xz -6 -T0 >"$folder/site.tar.xz"
du -h "$folder/site.tar.xz"
