"""verl's trainer, adapted to train many runs in the same processes.

Starting Ray and verl takes about a minute, as long as a run of the study. :class:`StudyTrainer` is verl's own
synchronous trainer, with these changes:

- :meth:`StudyTrainer.begin` resets everything that training changes: weights, optimizer, schedule, loss
  configuration, data order, random streams. ``tests/trainer/test_study.py`` shows that a run does not depend on the
  runs before it, bit for bit.
- Samples come from verl's rollout server, but in one batch, and are scored in this process
  (:class:`BatchedAgentLoops`); verl's own agent loops send several messages per sample.
- Samples can be stale by a fixed number of steps, and the old policy can be the behaviour policy.
- Samples of a batch are ordered by prompt, so equal seeds give equal runs.
- For a pretrained model, evaluations also give greedy success, and the steps before them say which tokens left the
  trust region (:mod:`benchmarks.study.probe`), both measured on the rollout server's copy of the weights.
"""

from __future__ import annotations

import dataclasses
import os
from collections import deque
from typing import Any

import numpy as np
import ray
import torch
import transfer_queue as tq
from omegaconf import DictConfig, OmegaConf, open_dict
from tensordict import NonTensorStack, TensorDict
from transfer_queue import KVBatchMeta
from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics, AgentLoopOutput
from verl.single_controller.base.decorator import Dispatch, register
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1 import PPOTrainerSync
from verl.utils import tensordict_utils as tu
from verl.utils.tensordict_utils import list_of_dict_to_tensordict
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker

from benchmarks.study import probe
from benchmarks.study.names import DISTINCT, GREEDY
from benchmarks.study.reward import compute_score
from verl_troll.embedded.generation import Completion, generate

Sampled = list[tuple[list[int], list[int]]]
"""Prompt and response, as token ids."""


class StudyWorker(ActorRolloutRefWorker):
    """verl's worker, able to rebuild its models, optimizer and loss."""

    def set_dispatch_collect(self, mesh_name: str, **ranks: Any) -> None:
        """verl's method, but repeated calls are ignored instead of refused."""
        known = self.__dict__.setdefault("_study_meshes", set())
        if mesh_name not in known:
            known.add(mesh_name)
            super().set_dispatch_collect(mesh_name, **ranks)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def begin(self, config: DictConfig) -> None:
        """Restart with the weights on disk and the settings of ``config`` (``actor_rollout_ref``)."""
        torch.manual_seed(0)
        self.config = config
        self.init_model()


class StudyCritic(TrainingWorker):
    """verl's critic worker, with its head initialised from a fixed seed."""

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def reset(self) -> None:
        """Restart with the weights on disk and a new head."""
        torch.manual_seed(0)
        super().reset()


class BatchedAgentLoops:
    """Replaces verl's agent-loop manager: samples a whole batch from the rollout server in one call.

    Args:
        trainer: provides configuration, tokenizer and server.
    """

    def __init__(self, trainer: StudyTrainer) -> None:
        self.trainer = trainer
        self.distinct_answers = 0.0
        self.first_samples: Sampled = []
        self.greedy_scores: list[float] = []

    def generate_sequences(self, batch: TensorDict) -> None:
        """Sample and score responses to all prompts, and put them into the transfer queue as verl's workers do."""
        config = self.trainer.config.actor_rollout_ref.rollout
        validate = tu.pop(batch, key="validate", default=False)
        chosen = config.val_kwargs if validate else config
        count = config.val_kwargs.n if validate else config.n
        sampling = {
            "temperature": chosen.temperature,
            "top_p": chosen.top_p,
            "top_k": chosen.top_k,
            "repetition_penalty": 1.0,
            "logprobs": config.calculate_log_probs,
        }
        columns = {key: _entries(value, len(batch)) for key, value in batch.items()} | {
            "agent_name": ["batched"] * len(batch)
        }
        prompts = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        tokens = [
            self.trainer.tokenizer.apply_chat_template(
                list(prompt["raw_prompt"]), add_generation_prompt=True, tokenize=True, return_dict=False
            )
            for prompt in prompts
        ]
        version, answers = ray.get(self.trainer.rollout_server.__ray_call__.remote(_sample, tokens, sampling, count))
        texts = self.trainer.tokenizer.batch_decode([answer.token_ids for answer in answers], skip_special_tokens=True)
        keys, fields, tags = [], [], []
        for index, (answer, text) in enumerate(zip(answers, texts, strict=True)):
            prompt, ids, sample = prompts[index // count], tokens[index // count], index % count
            score = _score(prompt, text)
            output = AgentLoopOutput(
                prompt_ids=ids,
                response_ids=answer.token_ids,
                response_mask=[1] * len(answer.token_ids),
                response_logprobs=answer.log_probs,
                reward_score=score,
                num_turns=2,
                metrics=AgentLoopMetrics(),
                extra_fields={"reward_extra_info": {}, "min_global_steps": version, "max_global_steps": version},
            )
            field = output.as_dict() | prompt | {"session_id": sample}
            field["loss_mask"] = field["response_mask"]
            field["input_ids"] = torch.cat([field["prompts"], field["responses"]])
            field["position_ids"] = torch.arange(len(field["input_ids"]))
            field["multi_modal_inputs"] = {}
            if not validate:
                # Training needs no other columns, and verl copies each column row by row for every mini-batch.
                field = {name: value for name, value in field.items() if _is_trained_on(name, value)}
            keys.append(f"{prompt['uid']}_{sample}_0")
            fields.append(field)
            tags.append(
                {
                    "status": "success",
                    "prompt_len": len(ids),
                    "response_len": len(answer.token_ids),
                    "seq_len": len(field["input_ids"]),
                    "global_steps": prompt["global_steps"],
                    "min_global_steps": version,
                    "max_global_steps": version,
                }
            )
        if validate:
            if self.trainer.config.study.get("greedy", False):
                self._score_greedily(prompts, tokens, sampling)
        else:
            self.first_samples = [(ids, answer.token_ids) for ids, answer in zip(tokens, answers[::count], strict=True)]
            groups = [texts[start : start + count] for start in range(0, len(texts), count)]
            self.distinct_answers = float(np.mean([len(set(group)) / count for group in groups]))
        partition = "val" if validate else "train"
        tq.kv_batch_put(keys=keys, fields=list_of_dict_to_tensordict(fields), tags=tags, partition_id=partition)
        tq.kv_batch_put(
            keys=[prompt["uid"] for prompt in prompts],
            tags=[{"status": "finished"}] * len(prompts),
            partition_id=partition,
        )

    def _score_greedily(self, prompts: list[dict[str, Any]], tokens: list[list[int]], sampling: dict[str, Any]) -> None:
        greedy = {**sampling, "temperature": 0.0}
        _, answers = ray.get(self.trainer.rollout_server.__ray_call__.remote(_sample, tokens, greedy, 1))
        texts = self.trainer.tokenizer.batch_decode([answer.token_ids for answer in answers], skip_special_tokens=True)
        self.greedy_scores += [_score(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]


def _score(prompt: dict[str, Any], text: str) -> float:
    return compute_score(prompt["data_source"], text, prompt["reward_model"]["ground_truth"], prompt.get("extra_info"))


def _is_trained_on(name: str, value: Any) -> bool:
    return isinstance(value, torch.Tensor) or name in ("uid", "num_turns", "multi_modal_inputs")


def _entries(column: Any, rows: int) -> list[Any]:
    """A column's entries by row; a shared value is repeated."""
    if isinstance(column, torch.Tensor):
        return list(column)
    if isinstance(column, NonTensorStack):
        return [entry.data for entry in column]
    return [column.data] * rows


class StudyTrainer(PPOTrainerSync):
    """verl's synchronous trainer; see the module docstring.

    Args:
        config: verl's configuration, with the group ``study`` added by :mod:`benchmarks.study.cells`: ``staleness`` in
            steps, and ``old_policy``, ``rescored`` (with the weights at the update, verl's default) or ``behaviour``
            (with the weights that sampled). Optional: ``greedy``, to evaluate greedily too, and ``probe``, the support
            sizes to probe.
    """

    def __init__(self, config: DictConfig) -> None:
        super().__init__(config)
        self.agent_loops = BatchedAgentLoops(self)
        self._prompts = 0
        self._submitted = 0
        self._waiting: deque[Sampled] = deque()

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        for role in self.role_worker_mapping:
            self.role_worker_mapping[role] = ray.remote(StudyCritic if role is Role.Critic else StudyWorker)

    @property
    def rollout_server(self) -> Any:
        """The rollout ``hf``'s only server."""
        (replica,) = self.llm_server_manager.get_replicas()
        return replica.servers[0]

    def begin(self, config: DictConfig) -> None:
        """Reset for a run with the settings of ``config``.

        Settings fixed at process start (task, the estimator's models, plugin, temperature, lengths) must match the
        initial configuration.
        """
        for partition, items in (tq.kv_list() or {}).items():
            if items:
                tq.kv_clear(keys=list(items), partition_id=partition)
        self.config = config
        self._prompts = 0
        self._submitted = 0
        self._waiting.clear()
        self.global_steps = 0
        self.local_trigger_step = 0
        self.replay_buffer = self._build_replay_buffer()
        if config.algorithm.use_kl_in_reward:
            self.kl_ctrl_in_reward = core_algos.get_kl_controller(config.algorithm.kl_ctrl)
        self._init_dataloader()
        self._init_dump_executor()
        self.actor_rollout_wg.begin(config.actor_rollout_ref)
        if self.use_critic:
            self.critic_wg.reset()
        seed = config.actor_rollout_ref.rollout.seed
        ray.get(self.rollout_server.__ray_call__.remote(_reseed, seed))
        self.on_init_end()

    def on_train_begin(self) -> None:
        """Sample ahead, so each step trains on samples from ``staleness`` steps before."""
        first = self.global_steps
        for ahead in range(self.config.study.staleness, 0, -1):
            self.global_steps = first - ahead
            self._add_batch_to_generate()
        self.global_steps = first

    def _next_train_batch(self, num_prompts: int | None = None) -> TensorDict:
        batch = super()._next_train_batch(num_prompts)
        first, self._prompts = self._prompts, self._prompts + len(batch)
        tu.assign_non_tensor_stack(batch, "uid", [f"{number:09d}" for number in range(first, self._prompts)])
        return batch

    def _submit_batch_to_rollout(self, batch: TensorDict) -> int:
        uids = set(_entries(batch.get("uid"), len(batch)))
        count: int = super()._submit_batch_to_rollout(batch)
        self._submitted += 1
        self._waiting.append(self.agent_loops.first_samples)
        if self.config.study.old_policy == "behaviour":
            items = {key: tag for key, tag in tq.kv_list("train")["train"].items() if key.split("_")[0] in uids}
            keys = sorted(key for key in items if "_" in key)
            sampled = KVBatchMeta(partition_id="train", keys=keys, tags=[items[key] for key in keys])
            sampled.extra_info["temperature"] = self.config.actor_rollout_ref.rollout.temperature
            self._old_policy_metrics: dict[str, Any] = {}
            super()._compute_old_log_prob(sampled, metrics=self._old_policy_metrics)
            self._note_old_policy(self._submitted, self.agent_loops.first_samples)
        return count

    def _compute_old_log_prob(self, batch: Any, metrics: dict[str, Any]) -> Any:
        if self.config.study.old_policy == "behaviour":
            metrics.update(self._old_policy_metrics)
            return batch
        return super()._compute_old_log_prob(batch, metrics)

    def _is_probed(self, step: int) -> bool:
        frequency = self.config.trainer.test_freq
        return bool(self.config.study.get("probe")) and (
            step % frequency == 0 or step == self.config.trainer.total_training_steps
        )

    def _note_old_policy(self, step: int, samples: Sampled) -> None:
        """The server's policy is the old one in ``step``."""
        if self._is_probed(step):
            ray.get(self.rollout_server.__ray_call__.remote(_keep_logits, samples))

    def _update_actor(self, batch: Any, metrics: dict[str, Any]) -> Any:
        if self.config.study.old_policy == "rescored":
            self._note_old_policy(self.global_steps, self._waiting[0])
        return super()._update_actor(batch, metrics)

    def _validate(self) -> dict[str, float]:
        self.agent_loops.greedy_scores.clear()
        metrics: dict[str, float] = super()._validate()
        if scores := self.agent_loops.greedy_scores:
            metrics[GREEDY] = float(np.mean(scores))
        return metrics

    def _balance_batch(self, batch: Any, metrics: Any, *args: Any, **kwargs: Any) -> Any:
        batch.reorder(sorted(range(len(batch.keys)), key=batch.keys.__getitem__))
        return super()._balance_batch(batch, metrics, *args, **kwargs)

    def _compute_metrics(self, batch: Any, metrics: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        super()._compute_metrics(batch, metrics, *args, **kwargs)
        metrics[DISTINCT] = self.agent_loops.distinct_answers
        samples = self._waiting.popleft()
        if self._is_probed(self.global_steps):
            ks = list(self.config.study.probe)
            metrics.update(ray.get(self.rollout_server.__ray_call__.remote(_compare_with_old_policy, samples, ks)))


def _sample(
    server: Any, prompts: list[list[int]], sampling: dict[str, Any], count: int
) -> tuple[int, list[Completion]]:
    """Run in the server: the step of its weights, and ``count`` completions per prompt.

    One batch keeps the sums independent of timing.
    """
    requests = [server._request(prompt, sampling) for prompt in prompts for _ in range(count)]
    return server.global_steps, generate(server.model, requests, server.logprobs_mode)


def _reseed(server: Any, seed: int) -> None:
    server.config = dataclasses.replace(server.config, seed=seed)
    server._asked.clear()
    server.noted = deque()


def _keep_logits(server: Any, samples: Sampled) -> None:
    server.noted.append(probe.response_logits(server.model, *zip(*samples, strict=True)))


def _compare_with_old_policy(server: Any, samples: Sampled, ks: list[int]) -> dict[str, float]:
    new = probe.response_logits(server.model, *zip(*samples, strict=True))
    sampled = torch.tensor([token for _, response in samples for token in response], device=new.device)
    return probe.compare_policies(server.noted.popleft(), new, sampled, ks)


@ray.remote
class StudyRunner:
    """Replaces verl's task runner: trains once per call of :meth:`run`, in the same processes."""

    def __init__(self, config: DictConfig) -> None:
        config = _resolved(config)
        tq.init(config.transfer_queue)
        self.trainer = StudyTrainer(config)
        self.trainer.init()

    def run(self, config: DictConfig, metrics: str) -> None:
        """Train with ``config``; verl's file logger writes one line per step to ``metrics``."""
        os.environ["VERL_FILE_LOGGER_PATH"] = metrics
        self.trainer.begin(_resolved(config))
        try:
            self.trainer.fit(self.trainer.agent_loops)
        finally:
            if (tracking := getattr(self.trainer, "logger", None)) is not None:
                tracking.finish(exit_code=0)


def _resolved(config: DictConfig) -> DictConfig:
    with open_dict(config):
        config.transfer_queue.enable = True
    OmegaConf.resolve(config)
    return config
