#!/usr/bin/env bash
# Qwen3-30B-A3B (mixture of experts), GRPO with TROLL on verl's Megatron actor, one node of 8 GPUs with 80 GB or more.
#   bash examples/run_qwen3_30b_a3b_megatron.sh                     # TROLL
#   LOSS=gspo bash examples/run_qwen3_30b_a3b_megatron.sh           # the same run with a clipped loss, for comparison
#   ROUTER_REPLAY=R2 bash examples/run_qwen3_30b_a3b_megatron.sh    # the update takes the old pass's expert routes
# Data: verl's examples/data_preprocess/gsm8k.py writes the parquet files.
set -euxo pipefail

MODEL=${MODEL:-Qwen/Qwen3-30B-A3B}
DATA=${DATA:-$HOME/data/gsm8k}
NNODES=${NNODES:-1}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
TP=${TP:-1}
PP=${PP:-1}
CP=${CP:-1}
EP=${EP:-8}
ETP=${ETP:-1}
ROUTER_REPLAY=${ROUTER_REPLAY:-disabled}
ROLLOUT=${ROLLOUT:-vllm}
ROLLOUT_TP=${ROLLOUT_TP:-4}
# troll, or one of verl's own losses: vanilla, gspo, cispo, dppo_kl, ...
LOSS=${LOSS:-troll}

if [[ $LOSS == troll ]]; then
  loss=(+troll=default)
else
  loss=("actor_rollout_ref.actor.policy_loss.loss_mode=$LOSS")
fi

# Megatron overlaps communication with computation on one connection.
export CUDA_DEVICE_MAX_CONNECTIONS=1

python3 -m verl.trainer.main_ppo \
  'hydra.searchpath=[pkg://verl_troll.configs]' \
  +megatron=moe \
  "${loss[@]}" \
  algorithm.adv_estimator=grpo \
  data.train_files="$DATA/train.parquet" \
  data.val_files="$DATA/test.parquet" \
  data.train_batch_size=256 \
  data.max_prompt_length=1024 \
  data.max_response_length=4096 \
  data.filter_overlong_prompts=True \
  actor_rollout_ref.model.path="$MODEL" \
  actor_rollout_ref.actor.optim.lr=1e-6 \
  actor_rollout_ref.actor.ppo_mini_batch_size=64 \
  actor_rollout_ref.actor.ppo_max_token_len_per_gpu=8192 \
  actor_rollout_ref.actor.megatron.tensor_model_parallel_size="$TP" \
  actor_rollout_ref.actor.megatron.pipeline_model_parallel_size="$PP" \
  actor_rollout_ref.actor.megatron.context_parallel_size="$CP" \
  actor_rollout_ref.actor.megatron.expert_model_parallel_size="$EP" \
  actor_rollout_ref.actor.megatron.expert_tensor_parallel_size="$ETP" \
  actor_rollout_ref.actor.megatron.router_replay.mode="$ROUTER_REPLAY" \
  actor_rollout_ref.actor.megatron.override_transformer_config.recompute_granularity=full \
  actor_rollout_ref.actor.megatron.override_transformer_config.recompute_method=uniform \
  actor_rollout_ref.actor.megatron.override_transformer_config.recompute_num_layers=1 \
  actor_rollout_ref.actor.megatron.param_offload=True \
  actor_rollout_ref.actor.megatron.optimizer_offload=True \
  actor_rollout_ref.rollout.name="$ROLLOUT" \
  actor_rollout_ref.rollout.tensor_model_parallel_size="$ROLLOUT_TP" \
  actor_rollout_ref.rollout.gpu_memory_utilization=0.6 \
  actor_rollout_ref.rollout.n=8 \
  trainer.logger='[console,wandb]' \
  trainer.project_name=verl_troll \
  trainer.experiment_name="qwen3-30b-a3b-megatron-$LOSS" \
  trainer.nnodes="$NNODES" \
  trainer.n_gpus_per_node="$GPUS_PER_NODE" \
  trainer.test_freq=10 \
  trainer.save_freq=50 \
  trainer.total_epochs=5 \
  "$@"
