"""What the plugin does to a request and its answer, without an engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sglang.srt.managers.io_struct import GenerateReqInput
from verl.workers.rollout.replica import RolloutReplicaRegistry

from verl_troll.plugin.rollout.sglang import RAW_LOG_PROBS, SglangSupportReplica, SglangSupportServer, _ObservedManager
from verl_troll.plugin.rollout.token_support import SupportRequest, TokenSupport
from verl_troll.plugin.settings import TrollConfigError

FLOOR = float(np.finfo(np.float32).min)


class FakeManager:
    """Stands in for SGLang's tokenizer manager: one answer of two tokens."""

    def __init__(self, preferred: dict[str, Any] | None = None) -> None:
        self.preferred_sampling_params = preferred
        self.answer = {
            "output_ids": [7, 3],
            "meta_info": {
                "output_token_logprobs": [(np.log(0.25), 7, None), (0.0, 3, None)],
                "input_top_logprobs": [],
                "output_top_logprobs": [
                    [(np.log(0.75), 2, None), (np.log(0.25), 7, None)],
                    [(0.0, 3, None), (FLOOR, 0, None)],
                ],
            },
        }

    async def generate_request(self, request: Any, connection: Any) -> AsyncIterator[Any]:
        yield self.answer


def ask(manager: FakeManager, params: dict[str, Any], **options: Any) -> tuple[GenerateReqInput, TokenSupport | None]:
    """One request, made as verl makes it."""
    request = GenerateReqInput(rid="a", input_ids=[1], sampling_params=params, **{"return_logprob": True, **options})
    observed = _ObservedManager(manager, SupportRequest(2, 0.0), temperature=0.8)

    async def first() -> None:
        await observed.generate_request(request, None).__anext__()

    asyncio.run(first())
    return request, observed.supports.get("a")


def test_the_candidates_leave_the_answer() -> None:
    manager = FakeManager()
    request, support = ask(manager, {"temperature": 0.8, "top_p": 1.0, "top_k": -1, "repetition_penalty": 1.0})
    assert request.top_logprobs_num == 2
    assert support is not None
    assert support.tokens.tolist() == [7, 3]
    assert support.ids.tolist() == [2, 7, 3]
    np.testing.assert_allclose(np.exp(support.log_probs), [0.75, 0.25, 1.0], rtol=1e-6)
    # SGLang writes a probability of zero as the lowest float; such an id is no candidate.
    assert support.counts.tolist() == [2, 1]
    assert list(manager.answer["meta_info"]) == ["output_token_logprobs"]


def test_fewer_and_more_candidates_than_asked() -> None:
    manager = FakeManager()
    meta: dict[str, Any] = manager.answer["meta_info"]  # type: ignore[assignment]
    meta["output_top_logprobs"][0].append((np.log(0.1), 5, None))
    meta["output_top_logprobs"][1].pop()
    _, support = ask(manager, {"temperature": 0.8})
    assert support is not None
    assert support.ids.tolist() == [2, 7, 3]
    assert support.counts.tolist() == [2, 1]


@pytest.mark.parametrize("value", [FLOOR, -9999.0, -np.inf])
def test_sampled_token_without_probability_has_the_lowest_that_travels(value: float) -> None:
    manager = FakeManager()
    meta: dict[str, Any] = manager.answer["meta_info"]  # type: ignore[assignment]
    meta["output_token_logprobs"][1] = (value, 5, None)
    manager.answer["output_ids"] = [7, 5]
    _, support = ask(manager, {"temperature": 0.8})
    assert support is not None
    assert support.ids.tolist() == [2, 7, 3, 5]
    # verl reads it from there.
    assert support.log_probs[-1] == meta["output_token_logprobs"][1][0] == -128


@pytest.mark.parametrize(
    ("candidates", "said"),
    [
        ([[(0.0, 7, None)], None], "token 1 of 2 has no candidates"),
        ([[], [(0.0, 3, None)]], "token 0 of 2 has no candidates"),
        ([[(0.0, 7, None)]], "candidates for 1"),
        (None, "candidates for 0"),
        ([[(0.0, 7, None)], [(None, 3, None)]], "a log-probability is NaN"),
    ],
)
def test_answer_without_the_candidates_is_refused_by_name(candidates: Any, said: str) -> None:
    manager = FakeManager()
    manager.answer["meta_info"]["output_top_logprobs"] = candidates  # type: ignore[index]
    with pytest.raises(ValueError, match=f"SGLang, request a, answered without .*{said}"):
        ask(manager, {"temperature": 0.8})


@pytest.mark.parametrize(
    ("preferred", "params", "options"),
    [
        ({"repetition_penalty": 1.2}, {}, {}),
        (None, {"min_new_tokens": 4}, {}),
        (None, {"logit_bias": {"3": 1.0}}, {}),
        (None, {}, {"custom_logit_processor": "x"}),
        (None, {}, {"top_logprobs_num": 5}),
        (None, {}, {"return_logprob": False}),
    ],
)
def test_other_requests_stay_as_they_are(
    preferred: dict[str, Any] | None, params: dict[str, Any], options: dict[str, Any]
) -> None:
    manager = FakeManager(preferred)
    request, support = ask(manager, {"temperature": 0.8, **params}, **options)
    assert support is None
    assert request.top_logprobs_num == options.get("top_logprobs_num")
    assert len(manager.answer["meta_info"]) == 3


@pytest.mark.parametrize("value", ["1", "true", "yes"])
def test_log_probs_before_the_temperature_are_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RAW_LOG_PROBS, value)
    with pytest.raises(TrollConfigError, match=f"{RAW_LOG_PROBS}='{value}'.*unset"):
        asyncio.run(SglangSupportServer.launch_server(SimpleNamespace()))  # type: ignore[arg-type]


def test_the_replica_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    # verl's loader removes the variable; restored here for the tests that follow.
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    assert RolloutReplicaRegistry.get("sglang") is SglangSupportReplica
