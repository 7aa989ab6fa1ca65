#!/usr/bin/env bash
# Submits a run script to a running Ray cluster and shows its output:
#   export RAY_API_SERVER_ADDRESS=http://HEAD:8265
#   LOSS=vanilla NNODES=2 bash examples/cluster/ray_job.sh examples/run_qwen3_8b_fsdp.sh [SETTING...]
# The current folder is uploaded as the job's working directory, without what .gitignore names. It must hold the script.
# A cluster that asks for a token also needs RAY_AUTH_MODE=token and RAY_AUTH_TOKEN.
# Preferably install verl and verl_troll on every node. Otherwise PIP="verl_troll==X.Y" installs packages for this job,
# on each node, before it starts.
#   FORWARD    more variables to pass to the job, for example FORWARD="HF_HOME HF_HUB_OFFLINE". Ray's dashboard
#              shows their values: set secrets on the cluster instead.
set -euo pipefail

script=${1:?"name a run script, for example examples/run_qwen3_8b_fsdp.sh"}
shift
[[ -f $script && $script != /* ]] || {
  echo "ray_job.sh: there is no run script $script below the current folder" >&2
  exit 1
}

runtime_env=$(
  python3 - <<'PYTHON'
import json, os, re, sys

names = "MODEL ESTIMATOR LOSS TASK ROLLOUT NNODES GPUS_PER_NODE TP PP CP EP ROUTER_REPLAY".split()
names += os.environ.get("FORWARD", "").split()
values = {name: os.environ[name] for name in names if name in os.environ}
for name, value in values.items():
    if re.search(r"\$[\w{]", value):
        sys.exit(f"ray_job.sh: {name} is {value!r}, in which Ray would replace variables: leave `$` out")
runtime_env = {"env_vars": values}
if pip := os.environ.get("PIP", "").split():
    runtime_env["pip"] = pip
print(json.dumps(runtime_env))
PYTHON
)

ray job submit --working-dir . --runtime-env-json "$runtime_env" -- bash -- "$script" "$@"
