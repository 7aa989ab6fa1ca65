"""The rollout ``hf``: a transformers model behind verl's rollout interface, for tests and small models.

It runs on verl's device: the CPU in CPU mode, otherwise (:mod:`verl_troll.embedded`) the accelerator of the replica's
first worker, which it shares.

One Ray actor per replica (:class:`EmbeddedServer`) serves ``generate`` calls. Requests that arrive together run as one
batch; batches and weight updates never overlap. The training side (:class:`EmbeddedRollout`) sends the full weights
after every step (verl's ``naive`` synchronisation).

Every request has its own random stream, keyed by ``rollout.seed``, the replica, the training step, the prompt and how
often that prompt was requested since the last weight update. So samples do not depend on arrival order or batch
composition; with several replicas, they may still depend on how verl routes requests.
"""

from __future__ import annotations

import asyncio
import os
import threading
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
import ray
import torch
from verl.plugin.platform import get_platform
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.device import get_device_name
from verl.workers.config import HFModelConfig, RolloutConfig
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutMode, RolloutReplica, TokenOutput
from verl.workers.rollout.utils import ensure_async_iterator

from verl_troll.embedded.generation import Completion, LogprobsMode, Request, generate

__all__ = ["EmbeddedReplica", "EmbeddedRollout", "EmbeddedServer", "stop_token_ids"]

_QUIET_SECONDS = 0.02
"""A batch starts once no request has arrived for this long."""

_DTYPES = {"float32": torch.float32, "fp32": torch.float32, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16}


def _server_name(replica_rank: int) -> str:
    return f"hf_server_{replica_rank}"


def stop_token_ids(model_config: HFModelConfig) -> frozenset[int]:
    """End-of-sequence tokens of the generation configuration and the tokenizer."""
    found: set[int] = set()
    for owner in (model_config.generation_config, model_config.tokenizer):
        value = getattr(owner, "eos_token_id", None)
        if value is not None:
            found.update([value] if isinstance(value, int) else value)
    return frozenset(found)


@dataclass
class _Batch:
    """Requests that run together; ``task`` resolves to their completions, in order."""

    requests: list[Request] = field(default_factory=list)
    task: asyncio.Task[list[Completion]] | None = None
    arrived: asyncio.Event = field(default_factory=asyncio.Event)


class EmbeddedServer:
    """Serves ``generate`` for one replica, as an asynchronous Ray actor.

    Args:
        config: ``actor_rollout_ref.rollout``.
        model_config: ``actor_rollout_ref.model``.
        replica_rank: index of the replica; gives each replica its own random streams.

    Raises:
        ValueError: this rollout does not support a setting.
    """

    def __init__(self, config: RolloutConfig, model_config: Any, replica_rank: int) -> None:
        from transformers import AutoModelForCausalLM

        self.config = config
        self.replica_rank = replica_rank
        model_config = omega_conf_to_dataclass(model_config, dataclass_type=HFModelConfig)
        attention = getattr(model_config.hf_config, "_attn_implementation", None)
        for key, value, allowed in (
            ("rollout.dtype", config.dtype, tuple(_DTYPES)),
            ("rollout.load_format", config.load_format, ("auto", "dummy")),
            ("rollout.logprobs_mode", config.logprobs_mode, get_args(LogprobsMode)),
            ("model.override_config.attn_implementation", attention, ("sdpa", "eager")),
        ):
            if value not in allowed:
                raise ValueError(
                    f"actor_rollout_ref.{key}={value!r} is not supported by the rollout 'hf': use one of "
                    f"{list(allowed)}"
                )
        self.logprobs_mode: LogprobsMode = config.logprobs_mode
        kwargs = {"dtype": _DTYPES[config.dtype], "trust_remote_code": model_config.trust_remote_code}
        if config.load_format == "auto":
            self.model = AutoModelForCausalLM.from_pretrained(
                model_config.local_path, config=model_config.hf_config, **kwargs
            )
        else:
            self.model = AutoModelForCausalLM.from_config(model_config.hf_config, **kwargs)
        self.model.eval().requires_grad_(False).to(get_device_name())
        self.has_weights = config.load_format == "auto"
        self.stop_ids = stop_token_ids(model_config)
        self.max_model_len = int(
            config.max_model_len or model_config.hf_config.get_text_config().max_position_embeddings
        )
        self.global_steps: int | None = None
        self.weight_updates = 0
        self._asked: Counter[tuple[int, ...]] = Counter()
        self._open: _Batch | None = None
        self._in_flight: set[str] = set()
        self._model_lock = asyncio.Lock()
        self._abort = threading.Event()
        self._admitted = asyncio.Event()
        self._admitted.set()
        self._rejecting = False

    async def address(self) -> str:
        """Address of this server's node, without a port because requests arrive through Ray."""
        return str(ray.util.get_node_ip_address())

    async def generate(
        self,
        prompt_ids: list[int],
        sampling_params: Mapping[str, Any],
        request_id: str,
        image_data: Any = None,
        video_data: Any = None,
        **unused: Any,
    ) -> TokenOutput:
        """Complete one prompt.

        Args:
            prompt_ids: token ids of the prompt.
            sampling_params: ``temperature``, ``top_p``, ``top_k``, ``max_tokens`` (or ``max_new_tokens``),
                ``ignore_eos``, ``logprobs``; ``repetition_penalty`` must be 1. ``logprobs`` is a bool, or a number k:
                then ``extra_fields["top_logprobs"]`` holds the ids ``[r, k]`` and log-probabilities ``[r, k]`` of the
                k most probable tokens at each of the r new ones.
            request_id: verl's request id.

        Raises:
            ValueError: an unknown or unsupported sampling parameter, or a prompt that leaves no room for a token.
            RuntimeError: no weights have arrived yet (``rollout.load_format=dummy``).
        """
        if image_data is not None or video_data is not None:
            raise ValueError("the rollout 'hf' serves text only: image_data and video_data must be empty")
        if not self.has_weights:
            raise RuntimeError("rollout.load_format=dummy and no weight update has arrived: nothing to sample from")
        while not self._admitted.is_set():
            if self._rejecting:
                return self._output(Completion([], [], "aborted"), with_log_probs=False)
            await self._admitted.wait()
        request = self._request([int(token) for token in prompt_ids], sampling_params)
        batch = self._open
        if batch is None or len(batch.requests) >= self.config.max_num_seqs:
            batch = self._open = _Batch()
            batch.task = asyncio.create_task(self._run(batch))
        index = len(batch.requests)
        batch.requests.append(request)
        batch.arrived.set()
        assert batch.task is not None
        self._in_flight.add(request_id)
        try:
            # Shielded so that cancelling one request does not cancel its batch.
            completions = await asyncio.shield(batch.task)
        finally:
            self._in_flight.discard(request_id)
        return self._output(completions[index], with_log_probs=bool(sampling_params.get("logprobs", False)))

    def _request(self, prompt: list[int], params: Mapping[str, Any]) -> Request:
        known = {
            "temperature",
            "top_p",
            "top_k",
            "max_tokens",
            "max_new_tokens",
            "ignore_eos",
            "logprobs",
            "repetition_penalty",
        }
        if unknown := sorted(set(params) - known):
            raise ValueError(f"the rollout 'hf' does not know the sampling parameters {unknown}, only {sorted(known)}")
        penalty = params.get("repetition_penalty", self.config.repetition_penalty)
        if penalty != 1.0:
            raise ValueError(f"repetition_penalty={penalty!r}: the rollout 'hf' supports only 1.0")
        room = self.max_model_len - len(prompt)
        if room < 1:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens leaves no room in a context of {self.max_model_len}: shorten "
                "data.max_prompt_length, or raise actor_rollout_ref.rollout.max_model_len if the model allows it"
            )
        budget = min(self.config.response_length, self.config.prompt_length + self.config.response_length - len(prompt))
        limit = int(params.get("max_tokens", params.get("max_new_tokens", budget)))
        key = tuple(prompt)
        occurrence = self._asked[key]
        self._asked[key] += 1
        version = self.weight_updates if self.global_steps is None else self.global_steps
        return Request(
            prompt=key,
            max_tokens=max(1, min(limit, room)),
            temperature=float(params.get("temperature", self.config.temperature)),
            top_p=float(params.get("top_p", self.config.top_p)),
            top_k=int(params.get("top_k", self.config.top_k)),
            candidates=0 if isinstance(logprobs := params.get("logprobs", False), bool) else int(logprobs or 0),
            stop_ids=frozenset() if params.get("ignore_eos", self.config.ignore_eos) else self.stop_ids,
            noise=(
                int(self.config.seed),
                self.replica_rank,
                version,
                zlib.crc32(np.asarray(prompt, dtype=np.int64).tobytes()),
                occurrence,
            ),
        )

    async def _run(self, batch: _Batch) -> list[Completion]:
        while batch.arrived.is_set() and len(batch.requests) < self.config.max_num_seqs:
            batch.arrived.clear()
            await asyncio.sleep(_QUIET_SECONDS)
        async with self._model_lock:
            # The batch grows while it waits for the lock; its requests would have to wait anyway.
            if self._open is batch:
                self._open = None
            return await asyncio.to_thread(generate, self.model, batch.requests, self.logprobs_mode, self._abort.is_set)

    def _output(self, completion: Completion, with_log_probs: bool) -> TokenOutput:
        fields: dict[str, Any] = {"global_steps": self.global_steps}
        if completion.candidates:
            fields["top_logprobs"] = tuple(
                torch.stack(part).numpy() for part in zip(*completion.candidates, strict=True)
            )
        return TokenOutput(
            token_ids=completion.token_ids,
            log_probs=completion.log_probs if with_log_probs else None,
            stop_reason=completion.stop_reason,
            num_preempted=0,
            extra_fields=fields,
        )

    async def update_weights(self, state: dict[str, torch.Tensor], global_steps: int | None) -> None:
        """Replace all weights, after the running batch.

        Args:
            state: every parameter by its transformers name; tied parameters may be given once.
            global_steps: training step of the weights.

        Raises:
            ValueError: a parameter is missing or unknown.
        """
        async with self._model_lock:
            missing, unexpected = self.model.load_state_dict(state, strict=False)
            self.model.tie_weights()
            # Tied parameters share storage; one of their names is enough.
            given = {self.model.get_parameter(name).data_ptr() for name in state if name not in unexpected}
            parameters = dict(self.model.named_parameters(remove_duplicate=False))
            missing = [name for name in missing if name in parameters and parameters[name].data_ptr() not in given]
            if missing or unexpected:
                raise ValueError(f"weight update does not fit the model: missing {missing}, unexpected {unexpected}")
            self.has_weights = True
            self.weight_updates += 1
            self.global_steps = global_steps
            self._asked.clear()

    async def abort_all_requests(self, reject_request: bool = False) -> dict[str, Any]:
        """Abort running requests, returning their tokens so far; hold new ones until :meth:`resume_generation`.

        Args:
            reject_request: return new requests as aborted instead of holding them.

        Returns:
            ``aborted_count`` and ``request_ids`` of the aborted requests.
        """
        self._rejecting = reject_request
        self._admitted.clear()
        self._abort.set()
        aborted = sorted(self._in_flight)
        async with self._model_lock:
            # Only waits for the running batch.
            pass
        return {"aborted_count": len(aborted), "request_ids": aborted}

    async def resume_generation(self) -> None:
        """Admit requests again."""
        self._abort.clear()
        self._rejecting = False
        self._admitted.set()

    async def wake_up(self, tags: list[str] | None = None) -> None:
        """Nothing was released."""

    async def sleep(self) -> None:
        """Weights stay where they are."""

    async def clear_kv_cache(self) -> None:
        """No cache outlives a batch."""

    async def release_kv_cache(self) -> None:
        """No cache outlives a batch."""

    async def resume_kv_cache(self) -> None:
        """No cache outlives a batch."""

    async def start_profile(self, **unused: Any) -> None:
        """No profiler."""

    async def stop_profile(self) -> None:
        """No profiler."""


class EmbeddedReplica(RolloutReplica):
    """verl's handle to one :class:`EmbeddedServer`, on the node of the replica's first worker."""

    async def launch_servers(self) -> None:
        """Start the server.

        Raises:
            NotImplementedError: the replica serves another model than the policy.
        """
        if self.rollout_mode is RolloutMode.COLOCATED or self.is_reward_model or self.is_teacher_model:
            raise NotImplementedError(
                f"rollout mode {self.rollout_mode}: the rollout 'hf' serves only the trained policy. "
                "Use another rollout for reward and teacher models."
            )
        first = self.workers[0].__ray_call__
        node_id = await first.remote(lambda self: ray.get_runtime_context().get_node_id())
        platform = get_platform()
        options: dict[str, Any] = {}
        if platform.device_name != "cpu":
            # The server requests no accelerator, so Ray would hide them all from it.
            held = await first.remote(lambda self: ray.get_runtime_context().get_accelerator_ids())
            variables = dict.fromkeys(platform.ray_noset_envvars(), "1")
            variables[platform.visible_devices_envvar()] = held[platform.ray_resource_name()][0]
            options["runtime_env"] = {"env_vars": variables}
        server = (
            ray.remote(EmbeddedServer)
            .options(
                name=_server_name(self.replica_rank),
                num_cpus=0,
                max_concurrency=self.max_concurrency,
                scheduling_strategy=ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node_id, soft=False),
                **options,
            )
            .remote(self.config, self.model_config, self.replica_rank)
        )
        self.servers = [server]
        self._server_handle = server
        # verl's load balancer identifies servers by this string.
        self._server_address = f"{await server.address.remote()}:{self.replica_rank}"


class EmbeddedRollout(BaseRollout):
    """The training side: sends the policy's weights to the server of this rank's replica.

    Args:
        config: ``actor_rollout_ref.rollout``.
        model_config: ``actor_rollout_ref.model``.
        device_mesh: unused, since the ranks of a replica share one server.
        replica_rank: index of the replica; -1 derives it from ``RANK``.
    """

    def __init__(
        self, config: RolloutConfig, model_config: HFModelConfig, device_mesh: Any, replica_rank: int = -1
    ) -> None:
        super().__init__(config, model_config, device_mesh)
        ranks = (
            self.config.tensor_model_parallel_size
            * self.config.data_parallel_size
            * self.config.pipeline_model_parallel_size
        )
        rank = int(os.environ["RANK"])
        self.replica_rank = rank // ranks if replica_rank == -1 else replica_rank
        self.is_leader_rank = rank % ranks == 0

    async def resume(self, tags: list[str]) -> None:
        """Nothing was released."""

    async def release(self) -> None:
        """Weights stay where they are."""

    async def update_weights(
        self,
        weights: Iterator[tuple[str, torch.Tensor]] | AsyncIterator[tuple[str, torch.Tensor]],
        global_steps: int | None = None,
        wire_format: str = "named_tensors",
        peft_config: Any = None,
        **unused: Any,
    ) -> None:
        """Send all weights to the server. Every rank must take part; the replica's first rank sends.

        Args:
            weights: ``(name, tensor)`` pairs of the full model.
            global_steps: training step of the weights.
            wire_format: must be ``"named_tensors"``.
            peft_config: must be None; unmerged adapters are not supported.

        Raises:
            NotImplementedError: another wire format, or an unmerged adapter.
        """
        if wire_format != "named_tensors":
            raise NotImplementedError(
                f"wire_format={wire_format!r}: the rollout 'hf' takes full weights only, set "
                "actor_rollout_ref.rollout.checkpoint_engine.backend=naive"
            )
        if peft_config is not None:
            raise NotImplementedError(
                "the rollout 'hf' takes merged weights only: set actor_rollout_ref.model.lora.merge=True"
            )
        state: dict[str, torch.Tensor] = {}
        with torch.no_grad():
            # Every rank iterates over all weights, since gathering each one is a collective.
            async for name, weight in ensure_async_iterator(weights):
                if self.is_leader_rank:
                    # Copied: verl restores merged adapters once the iteration ends.
                    state[name] = weight.detach().to("cpu", copy=True)
        if self.is_leader_rank:
            await ray.get_actor(_server_name(self.replica_rank)).update_weights.remote(state, global_steps)
