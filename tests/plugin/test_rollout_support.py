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
