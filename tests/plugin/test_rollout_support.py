"""The old policy's support, from the rollout engine to the sample's fields."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from transformers import PretrainedConfig
from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopOutput
from verl.workers.rollout.replica import TokenOutput

from tests.rounding import last_place
from verl_troll.core.support import Selection, select
from verl_troll.core.vocab import VocabLogits
from verl_troll.plugin import carry
from verl_troll.plugin.rollout.agent_loops import RolloutSupportMixin
from verl_troll.plugin.rollout.token_support import FIELD, SupportRequest, TokenSupport

K, DROPPED_MASS, VOCAB = 6, 1e-2, 40


def policy(tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random logits ``[tokens, VOCAB]`` and ids sampled from them."""
    torch.manual_seed(seed)
    logits = torch.randn(tokens, VOCAB) * 3
    return logits, torch.distributions.Categorical(logits=logits).sample()


def support_of(logits: torch.Tensor, ids: torch.Tensor) -> TokenSupport:
    """As an engine returns it: top log-probabilities and the sampled token's own."""
    log_probs = logits.log_softmax(-1)
    top, top_ids = log_probs.topk(K, dim=-1)
    own = log_probs.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    return TokenSupport.select(ids.tolist(), own, top_ids, top, DROPPED_MASS)


def test_selection_is_that_of_the_old_log_prob_pass() -> None:
    logits, ids = policy(200, seed=0)
    mine = support_of(logits, ids)
    dense = select(VocabLogits.of(logits, torch.arange(len(ids))), ids, Selection(K, DROPPED_MASS))
    used = dense.ids >= 0
    assert (used.sum(-1) == K + 1).any(), "the sampled id comes on top at some tokens"
    assert mine.counts.tolist() == used.sum(-1).tolist()
    assert mine.ids.tolist() == dense.ids[used].tolist()
    # Two ways to compute a log-probability; each rounds the normaliser and its subtraction.
    rounding = 2 * last_place(logits)
    torch.testing.assert_close(torch.tensor(mine.log_probs), dense.log_probs[used], rtol=0, atol=rounding)


WANTED = SupportRequest(K, DROPPED_MASS)
SOURCE = "the engine, request 7,"


def read(
    tokens: list[int], sampled: list[float], candidates: list[list[tuple[int, float]]], wanted: SupportRequest = WANTED
) -> TokenSupport:
    """:meth:`TokenSupport.read` on ``(id, log-probability)`` pairs of each token."""
    flat = [pair for token in candidates for pair in token]
    counts, ids, values = map(len, candidates), [token_id for token_id, _ in flat], [value for _, value in flat]
    return TokenSupport.read(tokens, sampled, list(counts), ids, values, wanted, SOURCE)


def answer(logits: torch.Tensor, ids: torch.Tensor) -> tuple[list[int], list[float], list[list[tuple[int, float]]]]:
    """An engine's answer: tokens, their log-probabilities and candidates, the most probable first."""
    log_probs = logits.log_softmax(-1)
    top = log_probs.topk(K, dim=-1)
    candidates = [list(zip(*row, strict=True)) for row in zip(top.indices.tolist(), top.values.tolist(), strict=True)]
    return ids.tolist(), log_probs.gather(-1, ids.unsqueeze(-1)).squeeze(-1).tolist(), candidates


def same(mine: TokenSupport, other: TokenSupport) -> bool:
    return all(np.array_equal(getattr(mine, name), getattr(other, name)) for name in TokenSupport.__annotations__)


@pytest.mark.parametrize(
    "form", ["as asked", "shuffled", "each twice", "sampled first", "sampled once", "more", "zeros"]
)
def test_candidates_in_any_form_give_the_same_support(form: str) -> None:
    logits, ids = policy(50, seed=0)
    tokens, sampled, candidates = answer(logits, ids)
    own = [(token, value) for token, value in zip(tokens, sampled, strict=True)]
    changed = {
        "as asked": candidates,
        "shuffled": [row[::-1] if place % 3 else row for place, row in enumerate(candidates)],
        "each twice": [row + row[: place % 3] for place, row in enumerate(candidates)],
        "sampled first": [[pair, *row] for pair, row in zip(own, candidates, strict=True)],
        # As vLLM's dictionaries: uneven, and the sampled id before more probable ones.
        "sampled once": [list(dict([pair, *row]).items()) for pair, row in zip(own, candidates, strict=True)],
        "more": [row + [(VOCAB + 1, row[-1][1] - 1)] * (place % 2) for place, row in enumerate(candidates)],
        "zeros": [
            [*row, (VOCAB + 1, value), (-1, -1.0)]
            for row, value in zip(candidates, [-9999.0, -3.4028235e38, -np.inf] * 20, strict=False)
        ],
    }[form]
    assert (
        form in ("as asked", "sampled first", "zeros") or len({len(row) for row in changed}) > 1 or form == "shuffled"
    )
    mine, expected = read(tokens, sampled, changed), support_of(logits, ids)
    assert same(mine, expected)


@pytest.mark.parametrize("dropped_mass", [0.0, DROPPED_MASS])
def test_fewer_candidates_than_asked_are_those_that_there_are(dropped_mass: float) -> None:
    logits, ids = policy(50, seed=1)
    tokens, sampled, candidates = answer(logits, ids)
    fewer = [row[: 1 + place % K] for place, row in enumerate(candidates)]
    mine = read(tokens, sampled, fewer, SupportRequest(K, dropped_mass))
    expected = [
        read([token], [value], [row], SupportRequest(len(row), dropped_mass))
        for token, value, row in zip(tokens, sampled, fewer, strict=True)
    ]
    assert same(mine, TokenSupport.join(expected))
    assert mine.counts.min() == 1
    fields = mine.to_fields([5], tokens, [1] * len(tokens))
    assert carry.unpack_row(fields[carry.SUPPORT])[0].tolist() == mine.ids.tolist()


@pytest.mark.parametrize("value", [-128.5, -9999.0, -3.4028235e38, -np.inf])
@pytest.mark.parametrize("among", [True, False])
def test_sampled_id_without_probability_has_the_lowest_that_travels(value: float, among: bool) -> None:
    candidates = [(3, -0.5), (4, -1.0), *([(9, value)] if among and value <= -9999 else [])]
    mine = read([9, 3], [value, -0.5], [candidates, candidates])
    assert mine.ids.tolist() == [3, 4, 9, 3, 4]
    np.testing.assert_array_equal(mine.log_probs, np.float32([-0.5, -1.0, -128.0, -0.5, -1.0]))
    fields = mine.to_fields([5], [9, 3], [1, 1])
    _, log_probs = carry.unpack_row(fields[carry.SUPPORT])
    assert -128.0 < log_probs[2] < -127.99
    assert bool(log_probs.isfinite().all())


def test_id_with_two_values_counts_once_with_the_larger() -> None:
    assert read([3], [-0.5], [[(3, -2.0), (4, -1.0), (3, -0.5)]]).ids.tolist() == [3, 4]


@pytest.mark.parametrize(
    ("tokens", "sampled", "candidates", "said"),
    [
        ([1, 2], [-1.0, -1.0], [[(1, -1.0)], []], "token 1 of 2 has no candidates"),
        ([1, 2], [-1.0, -1.0], [[(1, -1.0)]], "2 tokens, 2 log-probabilities of these, candidates for 1"),
        ([1, 2], [-1.0], [[(1, -1.0)]] * 2, "2 tokens, 1 log-probabilities of these, candidates for 2"),
        ([1], [np.nan], [[(1, -1.0)]], "a log-probability is NaN"),
        ([1], [None], [[(1, -1.0)]], "a log-probability is NaN"),
        ([1], [-1.0], [[(1, np.nan)]], "a log-probability is NaN"),
    ],
)
def test_answer_without_the_candidates_is_refused_by_name(
    tokens: list[int], sampled: list[float], candidates: list[list[tuple[int, float]]], said: str
) -> None:
    with pytest.raises(ValueError, match=rf"the engine, request 7, answered without .*: {said}\. .*\+troll=default"):
        read(tokens, sampled, candidates)


def test_turns_are_placed_where_the_response_mask_is_set() -> None:
    first, second = (policy(tokens, seed) for tokens, seed in ((4, 1), (3, 2)))
    joined = TokenSupport.join([support_of(*first), support_of(*second)])
    tool = [7, 7]
    response = [*first[1].tolist(), *tool, *second[1].tolist()[:2]]
    mask = [1] * 4 + [0] * 2 + [1] * 2
    fields = joined.to_fields([5, 6], response, mask)
    counts = fields[carry.COUNTS]
    assert counts.dtype == torch.int16
    assert counts[4:6].tolist() == [0, 0]
    assert (counts[np.asarray(mask, bool)] > 0).all()
    ids, log_probs = carry.unpack_row(fields[carry.SUPPORT])
    assert len(ids) == len(log_probs) == int(counts.sum())
    assert ids.tolist() == joined.ids[: int(counts.sum())].tolist()
    torch.testing.assert_close(log_probs, torch.tensor(joined.log_probs[: len(ids)]), rtol=0, atol=2**-24)


@pytest.mark.parametrize("change", ["other token", "more tokens", "one left out"])
def test_tokens_that_are_not_the_engines_are_refused(change: str) -> None:
    logits, ids = policy(5, seed=3)
    response = ids.tolist()
    if change == "other token":
        response[2] = (response[2] + 1) % VOCAB
    elif change == "more tokens":
        response.append(1)
    else:
        response = [token for place, token in enumerate([*response]) if place != 1]
        response[1] = (ids[1].item() + 1) % VOCAB
    with pytest.raises(ValueError, match="not, in order, those of the rollout engine"):
        support_of(logits, ids).to_fields([5], response, [1] * len(response))


def test_request_needs_the_configuration_group() -> None:
    model = SimpleNamespace(hf_config=PretrainedConfig(vocab_size=100))
    config = OmegaConf.create({"custom": {"troll": {"k": 8, "dropped_mass": 1e-3}}})
    assert SupportRequest.of(config, model) == SupportRequest(8, 1e-3)
    config.custom.troll.k = 128
    assert SupportRequest.of(config, model).k == 100, "no more ids than the model has"
    with pytest.raises(ValueError, match=r"\+troll=rollout_support"):
        SupportRequest.of(OmegaConf.create({"custom": None}), model)


class FakeClient:
    """Stands in for verl's client of the rollout servers; returns prepared outputs."""

    def __init__(self, outputs: list[TokenOutput]) -> None:
        self.outputs = outputs
        self.address = "kept"

    async def generate(self, **_: Any) -> TokenOutput:
        return self.outputs.pop(0)


class TwoTurns(AgentLoopBase):
    """An agent loop of two turns with a one-token tool response between them."""

    server_manager: Any

    def __init__(self, client: FakeClient) -> None:
        self.server_manager = client

    async def run(self, sampling_params: dict[str, Any], **_: Any) -> AgentLoopOutput:
        assert self.server_manager.address == "kept"
        first = await self.server_manager.generate(request_id="a", prompt_ids=[1], sampling_params=sampling_params)
        second = await self.server_manager.generate(request_id="a", prompt_ids=[1], sampling_params=sampling_params)
        return AgentLoopOutput(
            prompt_ids=[1],
            response_ids=[*first.token_ids, 9, *second.token_ids],
            response_mask=[1] * len(first.token_ids) + [0] + [1] * len(second.token_ids),
            metrics={},
            extra_fields=first.extra_fields,
        )


class TwoTurnsWithSupport(RolloutSupportMixin, TwoTurns):
    """The same with the mixin, as a user would write it."""


def run_loop(outputs: list[TokenOutput]) -> dict[str, Any]:
    return dict(asyncio.run(TwoTurnsWithSupport(FakeClient(outputs)).run({})).as_dict())


def test_an_agent_loop_hands_the_support_of_all_turns_on() -> None:
    supports = [support_of(*policy(3, seed)) for seed in (4, 5)]
    outputs = [TokenOutput(token_ids=s.tokens.tolist(), extra_fields={FIELD: s, "global_steps": 2}) for s in supports]
    fields = run_loop(outputs)
    expected = TokenSupport.join(supports)
    assert carry.unpack_row(fields[carry.SUPPORT])[0].tolist() == expected.ids.tolist()
    assert fields[carry.COUNTS].tolist() == [*supports[0].counts, 0, *supports[1].counts]
    assert fields["extra_fields"]["global_steps"] == 2
    assert FIELD not in fields["extra_fields"]


def test_without_support_the_output_is_verls_own() -> None:
    fields = run_loop([TokenOutput(token_ids=[1, 2], extra_fields={"global_steps": 2}) for _ in range(2)])
    assert carry.SUPPORT not in fields
    assert FIELD not in fields["extra_fields"]
