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
#   RAY_IP      the first node's IPv4 address for Ray (default: of the interface that GLOO_SOCKET_IFNAME or
#               NCCL_SOCKET_IFNAME names there, else what its `hostname --ip-address` says)
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
if ((${SLURM_HET_SIZE:-1} > 1)); then
  echo "slurm.sh: warning: of this heterogeneous job's $SLURM_HET_SIZE components only the first one's $NNODES nodes" \
    "are used; request all nodes as one component" >&2
fi

on_first_node() {
  srun --overlap --nodes=1 --ntasks=1 --nodelist="${nodes[0]}" "$@"
}

# Lines "INTERFACE ADDRESS" of the first node.
interfaces() {
  on_first_node ip -o -4 address show up | awk '{ sub(/@.*/, "", $2); sub(/\/.*/, "", $4); print $2, $4 }'
}

# Whether $1 is an IPv4 address at which other nodes may reach this one.
reachable() {
  [[ $1 =~ ^([0-9]{1,3}\.){3}[0-9]{1,3}$ && $1 != 127.* && $1 != 169.254.* && $1 != 0.* ]]
}

# Whether the interface $1 is among $2, written as for NCCL: prefixes, after `=` names, after `^` those left out.
named() {
  local list=${2#^} any='*' names name
  [[ $list != =* ]] || any=
  IFS=', ' read -ra names <<<"${list#=}"
  for name in "${names[@]}"; do
    if [[ -n $name && $1 == "$name"$any ]]; then
      [[ $2 != ^* ]]
      return
    fi
  done
  [[ $2 == ^* ]]
}

# Sets `ip` to the first node's address.
find_ip() {
  local variable='' rule='' reported interface address all candidates=()
  if [[ -n ${RAY_IP:-} ]]; then
    ip=$RAY_IP
    [[ $ip =~ ^([0-9]{1,3}\.){3}[0-9]{1,3}$ ]] || fail "RAY_IP=$ip is not an IPv4 address"
    return
  fi
  if [[ -n ${GLOO_SOCKET_IFNAME:-} ]]; then
    # Gloo takes names only.
    variable=GLOO_SOCKET_IFNAME rule="=$GLOO_SOCKET_IFNAME"
  elif [[ -n ${NCCL_SOCKET_IFNAME:-} ]]; then
    variable=NCCL_SOCKET_IFNAME rule=$NCCL_SOCKET_IFNAME
  fi
  reported=$(on_first_node hostname --ip-address | xargs) || true
  if [[ -z $rule ]]; then
    for address in $reported; do
      ! reachable "$address" || candidates+=("$address")
    done
  else
    while read -r interface address; do
      if named "$interface" "$rule" && reachable "$address"; then candidates+=("$address"); fi
    done < <(interfaces)
  fi
  for address in "${candidates[@]}"; do
    if [[ " $reported " == *" $address "* ]]; then
      ip=$address
      return
    fi
  done
  if ((${#candidates[@]})); then
    ip=${candidates[0]}
    return
  fi
  all=$(interfaces | paste -sd, | sed 's/,/, /g') || true
  fail "found no IPv4 address at which other nodes reach ${nodes[0]} (loopback and link-local ones are not): \
${variable:+$variable=${!variable} names no interface with one; }\`hostname --ip-address\` says '$reported'; its interfaces \
have '$all'. Set RAY_IP to its address, or NCCL_SOCKET_IFNAME to its interface"
}

find_ip
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
  ((SECONDS < deadline)) || fail "no Ray at $RAY_ADDRESS in time; raise RAY_WAIT, or set RAY_IP if that is not its address"
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
