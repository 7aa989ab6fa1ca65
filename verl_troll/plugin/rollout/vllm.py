"""Keeps vLLM's top log-probabilities of each sampled token as the old policy's support."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import ray
from verl.workers.rollout.replica import TokenOutput
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer, vLLMReplica
from vllm import SamplingParams
from vllm.logprobs import FlatLogprobs, Logprob
from vllm.outputs import CompletionOutput

from verl_troll.plugin.rollout.token_support import FIELD, LOWEST, SupportRequest, TokenSupport, wrong_answer

__all__ = ["VllmSupportReplica", "VllmSupportServer"]


class _ObservedEngine:
    """vLLM's engine, recording the top log-probabilities of requests that sample from the unmodified policy."""

    def __init__(self, engine: Any, wanted: SupportRequest, temperature: float) -> None:
        self._engine = engine
        self._wanted = wanted
        self._temperature = temperature
        self.supports: dict[str, TokenSupport] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def _samples_the_policy(self, params: SamplingParams) -> bool:
        # Validation and greedy requests sample from another distribution, which no update uses.
        return (
            params.logprobs is not None
            and params.temperature == self._temperature
            and params.top_p == 1.0
            and params.top_k in (-1, 0)
            and params.min_p == 0.0
            and params.repetition_penalty == 1.0
            and params.presence_penalty == 0.0
            and params.frequency_penalty == 0.0
            and params.min_tokens == 0
            and not params.logit_bias
            and not params.allowed_token_ids
            and not params.bad_words
            and getattr(params, "structured_outputs", None) is None
        )

    async def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **options: Any
    ) -> AsyncIterator[Any]:
        observed = self._samples_the_policy(sampling_params)
        if observed:
            sampling_params.logprobs = self._wanted.k
            sampling_params.flat_logprobs = True
            # Text is only needed for stop strings, and decoding every candidate costs more than sampling.
            sampling_params.detokenize = bool(sampling_params.stop)
        async for output in self._engine.generate(
            prompt=prompt, sampling_params=sampling_params, request_id=request_id, **options
        ):
            if observed and output.finished and output.outputs:
                support = self._take(request_id, output.outputs[0])
                if support is not None:
                    self.supports[request_id] = support
            yield output

    def _take(self, request_id: str, completion: CompletionOutput) -> TokenSupport | None:
        """Select from the candidates, and leave only what verl reads: the sampled token's log-probability.

        Raises:
            ValueError: the log-probabilities are not those of the request.
        """
        flat = completion.logprobs
        if flat is None or len(flat) == 0:
            return None
        if not isinstance(flat, FlatLogprobs):
            flat = FlatLogprobs()
            flat.extend(completion.logprobs)
        source = f"vLLM, request {request_id},"
        tokens = list(completion.token_ids)
        starts, counts = np.asarray(flat.start_indices), np.subtract(flat.end_indices, flat.start_indices)
        ids, log_probs = np.asarray(flat.token_ids, dtype=np.int64), np.asarray(flat.logprobs, dtype=np.float32)
        if len(counts) != len(tokens):
            raise wrong_answer(source, f"{len(tokens)} tokens, log-probabilities of {len(counts)}")
        if (counts == 0).any():
            raise wrong_answer(source, f"token {int(counts.argmin())} of {len(tokens)} has no log-probabilities")
        if self._wanted.k > 1 and (counts == 1).any():
            raise wrong_answer(source, f"token {int(counts.argmin())} of {len(tokens)} has no candidates")
        # The sampled token comes first, then the candidates by rank; the sampled token not again if vLLM made the
        # list from a dictionary.
        wrong = ids[starts] != np.asarray(tokens)
        if wrong.any():
            at = int(wrong.argmax())
            raise wrong_answer(
                source, f"token {at} of {len(tokens)} is {tokens[at]}, its log-probability of {ids[starts][at]}"
            )
        sampled = np.maximum(log_probs[starts], LOWEST)
        if (counts == self._wanted.k + 1).all():
            counts, ids, log_probs = counts - 1, np.delete(ids, starts), np.delete(log_probs, starts)
        support = TokenSupport.read(tokens, sampled, counts, ids, log_probs, self._wanted, source)
        completion.logprobs = [{token: Logprob(float(value))} for token, value in zip(tokens, sampled, strict=True)]
        return support


class VllmSupportServer(vLLMHttpServer):
    """verl's vLLM server; outputs of requests that sample from the policy carry a :class:`TokenSupport`."""

    engine: Any

    def _preprocess_engine_kwargs(self, engine_kwargs: dict[str, Any]) -> None:
        super()._preprocess_engine_kwargs(engine_kwargs)
        wanted = SupportRequest.of(self.config, self.model_config)
        engine_kwargs["max_logprobs"] = max(int(engine_kwargs.get("max_logprobs", 0)), wanted.k)

    async def run_server(self, args: Any) -> None:
        """Launch as verl does, then observe the engine."""
        await super().run_server(args)
        wanted = SupportRequest.of(self.config, self.model_config)
        self.engine = _ObservedEngine(self.engine, wanted, self.config.temperature)

    async def generate(
        self, prompt_ids: list[int], sampling_params: dict[str, Any], request_id: str, **options: Any
    ) -> TokenOutput:
        """verl's ``generate``, with the support in ``extra_fields``."""
        try:
            output = await super().generate(prompt_ids, sampling_params, request_id, **options)
        finally:
            support = self.engine.supports.pop(request_id, None)
        if support is not None:
            output.extra_fields[FIELD] = support
        return output


class VllmSupportReplica(vLLMReplica):
    """verl's replica, with a :class:`VllmSupportServer` on each node."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not (self.is_reward_model or self.is_teacher_model):
            self.server_class = ray.remote(VllmSupportServer)
