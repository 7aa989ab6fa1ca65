#!/usr/bin/env bash
# The study in its own environment: bash benchmarks/study.sh cell --task chain --loss union --lr 2e-4 --seed 0
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=.venv-study
requirements=$(cat setup.cfg benchmarks/study.sh | cksum)
if [[ ! -f $venv/installed || $(<"$venv/installed") != "$requirements" ]]; then
  echo "creating $venv (a few minutes, once)"
  "${PYTHON:-python3}" -m venv --clear "$venv"
  "$venv/bin/pip" install --quiet --disable-pip-version-check --editable '.[cpu,report,reasoning-gym]' gguf==0.19.0
  echo "$requirements" >"$venv/installed"
fi
exec "$venv/bin/python" -m benchmarks.study "$@"
