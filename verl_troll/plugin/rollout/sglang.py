"""Keeps SGLang's top log-probabilities of each sampled token as the old policy's support."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import ray
from verl.workers.rollout.replica import TokenOutput
from verl.workers.rollout.sglang_rollout.async_sglang_server import SGLangHttpServer, SGLangReplica

from verl_troll.plugin.rollout.token_support import FIELD, LOWEST, SupportRequest, TokenSupport
from verl_troll.plugin.settings import refusal

__all__ = ["SglangSupportReplica", "SglangSupportServer"]

RAW_LOG_PROBS = "SGLANG_RETURN_ORIGINAL_LOGPROB"
# Sampling parameters that can change the distribution, with their neutral values.
_NEUTRAL: dict[str, Any] = {
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "min_new_tokens": 0,
    "logit_bias": None,
    "json_schema": None,
    "regex": None,
    "ebnf": None,
    "structural_tag": None,
    "n": 1,
}


def _check_environment() -> None:
    """Raise :class:`TrollConfigError` if SGLang would return log-probabilities before the temperature."""
    value = os.environ.get(RAW_LOG_PROBS, "")
    if value.lower() not in ("", "0", "false"):
        raise refusal(
            f"environment variable {RAW_LOG_PROBS}",
            value,
            "0 or unset with the old policy from the rollout engine",
            "With it, SGLang returns log-probabilities before the temperature: unset it on every node and in "
            "ray_kwargs.ray_init.runtime_env.",
        )


class _ObservedManager:
    """SGLang's tokenizer manager, recording top log-probabilities of requests that sample the unmodified policy."""

    def __init__(self, manager: Any, wanted: SupportRequest, temperature: float) -> None:
        self._manager = manager
        self._wanted = wanted
        self._temperature = temperature
        self.supports: dict[str, TokenSupport] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)

    def _samples_the_policy(self, request: Any) -> bool:
        # Validation and greedy requests sample from another distribution, which no update uses.
        params = {**(self._manager.preferred_sampling_params or {}), **request.sampling_params}
        return (
            bool(request.return_logprob)
            and not request.top_logprobs_num
            and request.custom_logit_processor is None
            and params.get("temperature") == self._temperature
            and all(params.get(name) in (None, value) for name, value in _NEUTRAL.items())
        )

    async def generate_request(self, request: Any, connection: Any = None) -> AsyncIterator[Any]:
        observed = self._samples_the_policy(request)
        if observed:
            request.top_logprobs_num = self._wanted.k
        # verl reads one output and drops the iterator; closing it here releases SGLang's lock at once.
        async with aclosing(self._manager.generate_request(request, connection)) as outputs:
            async for output in outputs:
                if observed:
                    support = self._take(request.rid, output)
                    if support is not None:
                        self.supports[request.rid] = support
                yield output

    def _take(self, request_id: str, output: dict[str, Any]) -> TokenSupport | None:
        """Remove the candidates from the output, and select from them.

        Raises:
            ValueError: the log-probabilities are not those of the request.
        """
        meta = output["meta_info"]
        candidates = [token or () for token in meta.pop("output_top_logprobs", None) or ()]
        meta.pop("input_top_logprobs", None)
        tokens, sampled = output["output_ids"], meta.get("output_token_logprobs")
        # The request was aborted before its first token; verl drops such an output.
        if not tokens or not sampled or len(tokens) != len(sampled):
            return None
        support = TokenSupport.read(
            tokens,
            [value for value, _, _ in sampled],
            [len(token) for token in candidates],
            [token_id for token in candidates for _, token_id, _ in token],
            [value for token in candidates for value, _, _ in token],
            self._wanted,
            f"SGLang, request {request_id},",
        )
        meta["output_token_logprobs"] = [(max(value, LOWEST), *rest) for value, *rest in sampled]
        return support


class SglangSupportServer(SGLangHttpServer):
    """verl's SGLang server; outputs of requests that sample from the policy carry a :class:`TokenSupport`."""

    tokenizer_manager: Any

    async def launch_server(self, *args: Any, **kwargs: Any) -> None:
        """Launch as verl does, then observe the engine.

        Raises:
            TrollConfigError: SGLang would return log-probabilities before the temperature.
        """
        _check_environment()
        await super().launch_server(*args, **kwargs)
        # Only the first node receives requests.
        if self.node_rank == 0:
            wanted = SupportRequest.of(self.config, self.model_config)
            self.tokenizer_manager = _ObservedManager(self.tokenizer_manager, wanted, self.config.temperature)

    async def generate(
        self, prompt_ids: list[int], sampling_params: dict[str, Any], request_id: str, **options: Any
    ) -> TokenOutput:
        """verl's ``generate``, with the support in ``extra_fields``."""
        try:
            output = await super().generate(prompt_ids, sampling_params, request_id, **options)
        finally:
            support = self.tokenizer_manager.supports.pop(request_id, None)
        if support is not None:
            output.extra_fields[FIELD] = support
        return output


class SglangSupportReplica(SGLangReplica):
    """verl's replica, with a :class:`SglangSupportServer` on each node."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not (self.is_reward_model or self.is_teacher_model):
            self.server_class = ray.remote(SglangSupportServer)
