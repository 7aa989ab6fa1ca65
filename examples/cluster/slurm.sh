#!/usr/bin/env bash
#SBATCH --job-name=verl-troll
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=24:00:00
# Starts Ray on the nodes of a Slurm allocation and a run script on the first one:
#   LOSS=vanilla sbatch --nodes=2 examples/cluster/slurm.sh examples/run_qwen3_8b_fsdp.sh [SETTING...]
# Adapt the lines above to your cluster; sbatch options override them. Submit from an environment in which verl and
# verl_troll are installed, on a file system that all nodes share. sbatch passes the run script's variables along;
# NNODES and GPUS_PER_NODE come from the allocation.
#   RAY_PORT    Ray's port on the first node (default: derived from the job id)
#   RAY_WAIT    seconds to wait for all nodes to join (default 300)
set -euo pipefail

fail() {
  echo "slurm.sh: $1" >&2
  exit 1
}

script=${1:?"name a run script, for example examples/run_qwen3_8b_fsdp.sh"}
shift
[[ -f $script ]] || fail "there is no run script $script"
: "${SLURM_JOB_ID:?"run this with sbatch"}"

NNODES=$SLURM_JOB_NUM_NODES
GPUS_PER_NODE=${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}
[[ -n $GPUS_PER_NODE ]] || fail "the allocation has no GPUs: give sbatch --gpus-per-node, or set GPUS_PER_NODE"
cpus=${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
read -r ip _ < <(srun --overlap --nodes=1 --ntasks=1 --nodelist="${nodes[0]}" hostname --ip-address)
RAY_ADDRESS=$ip:${RAY_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
# Only this job's processes may use its Ray.
RAY_AUTH_MODE=token RAY_AUTH_TOKEN=$(od -An -v -N32 -tx1 /dev/urandom | tr -d ' \n')
export NNODES GPUS_PER_NODE RAY_ADDRESS RAY_AUTH_MODE RAY_AUTH_TOKEN

# Starts Ray on the $2 nodes listed in $1; with `--block` it ends with its job step.
steps=()
start_ray() {
  srun --overlap --nodelist="$1" --nodes="$2" --ntasks="$2" --ntasks-per-node=1 --cpus-per-task="$cpus" \
    ray start "${@:3}" --num-cpus="$cpus" --num-gpus="$GPUS_PER_NODE" --disable-usage-stats --block &
  steps+=($!)
}
trap 'kill "${steps[@]}" 2>/dev/null || true; wait || true' EXIT

deadline=$((SECONDS + ${RAY_WAIT:-300}))
start_ray "${nodes[0]}" 1 --head --node-ip-address="$ip" --port="${RAY_ADDRESS##*:}"
until ray health-check --address="$RAY_ADDRESS" &>/dev/null; do
  kill -0 "${steps[0]}" 2>/dev/null || fail "Ray's head on ${nodes[0]} ended; its messages are above"
  ((SECONDS < deadline)) || fail "no Ray at $RAY_ADDRESS in time; raise RAY_WAIT"
  sleep 1
done
if ((NNODES > 1)); then
  start_ray "$(IFS=, && echo "${nodes[*]:1}")" "$((NNODES - 1))" --address="$RAY_ADDRESS"
fi
python3 - "$NNODES" "$((deadline - SECONDS))" <<'PYTHON'
import sys, time
import ray

nodes, end = int(sys.argv[1]), time.monotonic() + int(sys.argv[2])
ray.init(log_to_driver=False, logging_level="ERROR")  # at RAY_ADDRESS
while (alive := sum(node["Alive"] for node in ray.nodes())) < nodes:
    if time.monotonic() > end:
        sys.exit(f"slurm.sh: {alive} of {nodes} nodes joined Ray in time; raise RAY_WAIT, or see the messages above")
    time.sleep(1)
PYTHON
echo "slurm.sh: Ray has $NNODES nodes at $RAY_ADDRESS"

bash -- "$script" "$@" || {
  status=$?
  # Says so if a disk of this node is full.
  python3 -m verl_troll.tools.disk "$PWD" || true
  exit "$status"
}
