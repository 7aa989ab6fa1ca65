#!/usr/bin/env bash
# SmolLM3-3B on verl's FSDP2 actor, one node of 8 GPUs with 80 GB.
#   bash examples/run_smollm3_3b_fsdp.sh                 # GRPO with TROLL on GSM8K
#   LOSS=vanilla bash examples/run_smollm3_3b_fsdp.sh    # the same run with PPO's clipping
#   ESTIMATOR=gspo TASK=dapo_math NNODES=2 bash examples/run_smollm3_3b_fsdp.sh trainer.total_epochs=1
# docs/recipes.md lists what each variable takes; arguments go to verl and override everything here.
set -euo pipefail

MODEL=${MODEL:-HuggingFaceTB/SmolLM3-3B}
ESTIMATOR=${ESTIMATOR:-grpo}
LOSS=${LOSS:-troll}
TASK=${TASK:-gsm8k}
ROLLOUT=${ROLLOUT:-vllm}
NNODES=${NNODES:-1}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}

case $LOSS,$ESTIMATOR in
  troll,gspo) loss=+troll=sequence ;;
  troll,*) loss=+troll=default ;;
  *) loss=+baseline=$LOSS ;;
esac

set -x
python3 -m verl.trainer.main_ppo \
  +fsdp=default +size=4b +inference="$ROLLOUT" +estimator="$ESTIMATOR" "$loss" +task="$TASK" \
  actor_rollout_ref.model.path="$MODEL" \
  actor_rollout_ref.actor.optim.lr=1e-6 \
  actor_rollout_ref.actor.ppo_mini_batch_size=64 \
  data.train_batch_size=256 \
  trainer.nnodes="$NNODES" trainer.n_gpus_per_node="$GPUS_PER_NODE" \
  trainer.project_name=verl_troll trainer.experiment_name="smollm3-3b-fsdp-$TASK-$ESTIMATOR-$LOSS" \
  trainer.test_freq=10 trainer.save_freq=50 trainer.total_epochs=5 \
  "$@"
