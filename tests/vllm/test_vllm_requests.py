"""What the plugin does to vLLM's answer, without an engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm import SamplingParams
from vllm.logprobs import FlatLogprobs, Logprob

from verl_troll.plugin.rollout.token_support import SupportRequest, TokenSupport
from verl_troll.plugin.rollout.vllm import _ObservedEngine

Pairs = list[tuple[int, float]]
TOKENS = [7, 3, 5]
# The sampled token first, then the candidates by rank, as vLLM's engine writes them.
ASKED: list[Pairs] = [
    [(7, np.log(0.25)), (2, np.log(0.75)), (7, np.log(0.25))],
    [(3, np.log(0.5)), (3, np.log(0.5)), (0, np.log(0.5))],
    [(5, np.log(0.125)), (1, np.log(0.5)), (2, np.log(0.25))],
]


def flat(positions: Iterable[Pairs]) -> FlatLogprobs:
    result = FlatLogprobs()
    for pairs in positions:
        ids, values = [token for token, _ in pairs], [value for _, value in pairs]
        result.append_fast(ids, values, [1] * len(ids), [None] * len(ids))
    return result


def dictionaries(positions: Iterable[Pairs]) -> list[dict[int, Logprob] | None]:
    return [{token: Logprob(value) for token, value in pairs} or None for pairs in positions]


def ask(log_probs: Any, tokens: list[int] = TOKENS, k: int = 2) -> tuple[TokenSupport | None, Any]:
    """The support, and what is left of the answer, of one request made as verl makes it."""
    completion = SimpleNamespace(token_ids=tokens, logprobs=log_probs)

    class Engine:
        async def generate(self, **_: Any) -> AsyncIterator[Any]:
            yield SimpleNamespace(finished=True, outputs=[completion])

    observed = _ObservedEngine(Engine(), SupportRequest(k, 0.0), temperature=0.8)

    async def all_of_it() -> None:
        params = SamplingParams(temperature=0.8, logprobs=0)
        async for _ in observed.generate([1], params, "request-9"):
            pass

    asyncio.run(all_of_it())
    return observed.supports.get("request-9"), completion.logprobs


def check(support: TokenSupport | None) -> None:
    assert support is not None
    assert support.tokens.tolist() == TOKENS
    assert support.ids.tolist() == [2, 7, 0, 3, 1, 2, 5]
    assert support.counts.tolist() == [2, 2, 3]
    np.testing.assert_allclose(np.exp(support.log_probs), [0.75, 0.25, 0.5, 0.5, 0.5, 0.25, 0.125], rtol=1e-6)


def test_candidates_in_either_form_give_the_same_support() -> None:
    """In a dictionary the sampled token stands once, so that tokens have an uneven number of candidates."""
    uneven = [list(dict(pairs).items()) for pairs in ASKED]
    assert {len(pairs) for pairs in uneven} == {2, 3}
    by_id = [ASKED[0], [(3, np.log(0.5)), (0, np.log(0.5)), (3, np.log(0.5))], ASKED[2]]
    forms: list[Any] = [flat(by_id), flat(uneven), dictionaries(uneven)]
    for form in forms:
        support, left = ask(form)
        check(support)
        assert [[*row] for row in left] == [[token] for token in TOKENS]
        np.testing.assert_allclose(
            [row[token].logprob for row, token in zip(left, TOKENS, strict=True)], np.log([0.25, 0.5, 0.125])
        )


def test_fewer_and_more_candidates_than_asked() -> None:
    support, _ = ask(flat([ASKED[0][:2], ASKED[1][:2], [*ASKED[2], (8, np.log(0.0625))]]))
    assert support is not None
    assert support.ids.tolist() == [2, 7, 3, 1, 2, 5]
    assert support.counts.tolist() == [2, 1, 3]


@pytest.mark.parametrize("value", [-9999.0, float(np.finfo(np.float32).min), -np.inf])
def test_sampled_token_without_probability_has_the_lowest_that_travels(value: float) -> None:
    support, left = ask(flat([*ASKED[:2], [(5, value), *ASKED[2][1:]]]))
    assert support is not None
    assert support.log_probs[-1] == left[2][5].logprob == -128


@pytest.mark.parametrize(
    ("positions", "said"),
    [
        ([ASKED[0], [], ASKED[2]], "token 1 of 3 has no log-probabilities"),
        ([ASKED[0], ASKED[1][:1], ASKED[2]], "token 1 of 3 has no candidates"),
        (ASKED[:2], "3 tokens, log-probabilities of 2"),
        ([*ASKED[:2], ASKED[2][1:]], "token 2 of 3 is 5, its log-probability of 1"),
        ([*ASKED[:2], [(5, np.nan), *ASKED[2][1:]]], "a log-probability is NaN"),
    ],
)
@pytest.mark.parametrize("form", [flat, dictionaries])
def test_answer_without_the_candidates_is_refused_by_name(positions: list[Pairs], said: str, form: Any) -> None:
    with pytest.raises(ValueError, match=f"vLLM, request request-9, answered without .*: {said}"):
        ask(form(positions))


def test_one_candidate_that_is_the_sampled_token() -> None:
    support, _ = ask(dictionaries([[(7, -0.5), (7, -0.5)], [(3, -1.0), (2, -0.5)]]), [7, 3], k=1)
    assert support is not None
    assert (support.ids.tolist(), support.counts.tolist()) == ([7, 2, 3], [1, 2])


@pytest.mark.parametrize("nothing", [None, [], FlatLogprobs()])
def test_answer_without_tokens_has_no_support(nothing: Any) -> None:
    assert ask(nothing, tokens=[]) == (None, nothing)
