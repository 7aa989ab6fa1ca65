#!/usr/bin/env bash
# Qwen3-235B-A22B (mixture of experts) on verl's Megatron actor, eight nodes of 8 GPUs with 80 GB.
#   bash examples/run_qwen3_235b_a22b_megatron.sh              # GRPO with TROLL on GSM8K
#   LOSS=gspo bash examples/run_qwen3_235b_a22b_megatron.sh    # the same run with GSPO's clipping
#   sbatch --nodes=8 examples/cluster/slurm.sh examples/run_qwen3_235b_a22b_megatron.sh
# docs/recipes.md lists what each variable takes; arguments go to verl and override everything here.
set -euo pipefail

MODEL=${MODEL:-Qwen/Qwen3-235B-A22B}
ESTIMATOR=${ESTIMATOR:-grpo}
LOSS=${LOSS:-troll}
TASK=${TASK:-gsm8k}
ROLLOUT=${ROLLOUT:-vllm}
NNODES=${NNODES:-8}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}

case $LOSS,$ESTIMATOR in
  troll,gspo) loss=+troll=sequence ;;
  troll,*) loss=+troll=default ;;
  *) loss=+baseline=$LOSS ;;
esac

set -x
python3 -m verl.trainer.main_ppo \
  +megatron=moe +size=235b_a22b +inference="$ROLLOUT" +estimator="$ESTIMATOR" "$loss" +task="$TASK" \
  actor_rollout_ref.model.path="$MODEL" \
  actor_rollout_ref.actor.optim.lr=1e-6 \
  actor_rollout_ref.actor.ppo_mini_batch_size=64 \
  actor_rollout_ref.actor.megatron.tensor_model_parallel_size="${TP:-4}" \
  actor_rollout_ref.actor.megatron.context_parallel_size="${CP:-1}" \
  actor_rollout_ref.actor.megatron.router_replay.mode="${ROUTER_REPLAY:-disabled}" \
  data.train_batch_size=256 \
  trainer.nnodes="$NNODES" trainer.n_gpus_per_node="$GPUS_PER_NODE" \
  trainer.project_name=verl_troll trainer.experiment_name="qwen3-235b-a22b-megatron-$TASK-$ESTIMATOR-$LOSS" \
  trainer.test_freq=10 trainer.save_freq=50 trainer.total_epochs=5 \
  "$@"
