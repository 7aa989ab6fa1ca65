"""The old policy's support, from the rollout engine to the sample's fields."""

from __future__ import annotations

import asyncio
import functools
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from tensordict import TensorDict
from transformers import PretrainedConfig
from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopOutput
from verl.workers.rollout import llm_server
from verl.workers.rollout.llm_server import FullyAsyncLLMServerClient, LLMServerClient
from verl.workers.rollout.replica import TokenOutput

from tests.rounding import last_place
from verl_troll.core.support import Selection, select
from verl_troll.core.vocab import VocabLogits
from verl_troll.plugin import carry
from verl_troll.plugin.rollout.agent_loops import RolloutSupportMixin
from verl_troll.plugin.rollout.client import Recorder, recording
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
    np.testing.assert_array_equal(mine.log_probs, np.array([-0.5, -1.0, -128.0, -0.5, -1.0], np.float32))
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


def test_versions_are_placed_as_the_tokens_are() -> None:
    """A resumed turn, a tool's response, and a turn that was cut."""
    logits, ids = policy(6, seed=3)
    response = [*ids.tolist()[:4], 7, 7, int(ids[4])]
    versions = np.array([3, 3, 4, 4, 5, 5], np.int32)
    support = support_of(logits, ids)
    fields = support.to_fields([5], response, [1] * 4 + [0] * 2 + [1], versions)
    assert fields[carry.VERSIONS].dtype == torch.int32
    assert fields[carry.VERSIONS].tolist() == [3, 3, 4, 4, -1, -1, 5]
    assert carry.VERSIONS not in support.to_fields([5], response, [1] * 4 + [0] * 2 + [1])


def test_request_needs_the_configuration_group() -> None:
    model = SimpleNamespace(hf_config=PretrainedConfig(vocab_size=100))
    config = OmegaConf.create({"custom": {"troll": {"k": 8, "dropped_mass": 1e-3}}})
    assert SupportRequest.of(config, model) == SupportRequest(8, 1e-3)
    config.custom.troll.k = 128
    assert SupportRequest.of(config, model).k == 100, "no more ids than the model has"
    with pytest.raises(ValueError, match=r"\+troll=rollout_support"):
        SupportRequest.of(OmegaConf.create({"custom": None}), model)


class _Remote:
    """Stands in for a method of a Ray actor."""

    def __init__(self, call: Any) -> None:
        self.remote = call


class Servers:
    """Stands in for verl's load balancer and its one server, which returns prepared outputs."""

    def __init__(self, outputs: list[TokenOutput]) -> None:
        self.outputs = outputs
        self.prompts: list[list[int]] = []
        self.params: list[dict[str, Any]] = []
        self.looked_up = 0
        self.acquire_server, self.release_server = _Remote(self._acquire), _Remote(lambda **_: None)
        self.require_acquire_fields, self.require_release_fields = _Remote(self._fields), _Remote(self._fields)

    async def _fields(self) -> list[str]:
        self.looked_up += 1
        return []

    async def _acquire(self, request_id: str) -> tuple[str, Any]:
        return "server", SimpleNamespace(generate=_Remote(self._generate))

    async def _generate(self, prompt_ids: list[int], sampling_params: dict[str, Any], **_: Any) -> TokenOutput:
        self.prompts.append(prompt_ids)
        self.params.append(sampling_params)
        return self.outputs.pop(0)


def client_of(kind: type[LLMServerClient], servers: Servers, engine: str = "vllm") -> LLMServerClient:
    rollout = {"name": engine, "response_length": 16, "temperature": 0.7, "top_p": 1.0, "top_k": -1}
    rollout["custom"] = {"troll": {"k": K, "dropped_mass": DROPPED_MASS}}
    config = OmegaConf.create({"actor_rollout_ref": {"rollout": rollout}})
    return kind(config=config, load_balancer_handle=servers)


class TwoTurns(AgentLoopBase):
    """An agent loop of two turns with a one-token tool response between them."""

    server_manager: Any

    def __init__(self, client: Any) -> None:
        self.server_manager = client

    async def run(self, sampling_params: dict[str, Any], **_: Any) -> AgentLoopOutput:
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


CLIENTS = (LLMServerClient, FullyAsyncLLMServerClient)
by_client = pytest.mark.parametrize("kind", CLIENTS, ids=["synchronous", "asynchronous"])


def run_loop(kind: type[LLMServerClient], outputs: list[TokenOutput]) -> dict[str, Any]:
    return dict(asyncio.run(TwoTurnsWithSupport(client_of(kind, Servers(outputs))).run({})).as_dict())


def reply(support: TokenSupport, version: int, reason: str = "completed") -> TokenOutput:
    fields = {FIELD: support, "global_steps": version}
    ids = support.tokens.tolist()
    return TokenOutput(token_ids=ids, log_probs=[-1.0] * len(ids), stop_reason=reason, extra_fields=fields)


@by_client
def test_an_agent_loop_hands_the_support_of_all_turns_on(kind: type[LLMServerClient]) -> None:
    supports = [support_of(*policy(3, seed)) for seed in (4, 5)]
    fields = run_loop(kind, [reply(support, 2) for support in supports])
    expected = TokenSupport.join(supports)
    assert carry.unpack_row(fields[carry.SUPPORT])[0].tolist() == expected.ids.tolist()
    assert fields[carry.COUNTS].tolist() == [*supports[0].counts, 0, *supports[1].counts]
    assert fields["extra_fields"]["global_steps"] == 2
    assert FIELD not in fields["extra_fields"]


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """verl waits a second before it resumes."""

    async def at_once(_: float) -> None: ...

    monkeypatch.setattr(llm_server.asyncio, "sleep", at_once)


@pytest.mark.usefixtures("no_waiting")
def test_a_resumed_response_has_the_supports_of_the_versions_that_sampled_it() -> None:
    """An abort after two tokens, one before the first token, then the rest and another turn on later weights."""
    first, rest, other = (support_of(*policy(tokens, seed)) for tokens, seed in ((2, 4), (3, 5), (1, 6)))
    nothing = TokenOutput(token_ids=[], log_probs=None, stop_reason="aborted", extra_fields={"global_steps": 3})
    servers = Servers([reply(first, 3, "aborted"), nothing, reply(rest, 4), reply(other, 5)])
    recorder = Recorder()
    shared = client_of(FullyAsyncLLMServerClient, servers)
    loop = TwoTurnsWithSupport(shared)
    with mock.patch("verl_troll.plugin.rollout.agent_loops.Recorder", return_value=recorder):
        fields = dict(asyncio.run(loop.run({})).as_dict())
    assert [prompt[1:] for prompt in servers.prompts] == [[], *[first.tokens.tolist()] * 2, []]
    expected = TokenSupport.join([first, rest, other])
    ids, log_probs = carry.unpack_row(fields[carry.SUPPORT])
    assert ids.tolist() == expected.ids.tolist()
    torch.testing.assert_close(log_probs, torch.tensor(expected.log_probs), rtol=0, atol=2**-24)
    assert fields[carry.COUNTS].tolist() == [*first.counts, *rest.counts, 0, *other.counts]
    assert recorder.versions == [3, 4, 5]
    assert fields[carry.VERSIONS].tolist() == [3, 3, 4, 4, 4, -1, 5]
    assert ages_of(fields, trained=6) == [3, 3, 2, 2, 2, 1]
    # What one loop learned about the servers, all others know.
    assert servers.looked_up == 2
    asyncio.run(TwoTurnsWithSupport(client_of_same(shared, [reply(first, 5), reply(other, 5)])).run({}))
    assert servers.looked_up == 2


def ages_of(fields: dict[str, Any], trained: int) -> list[float]:
    """As the update finds them, in a batch of this sample."""
    names = ("responses", "response_mask", carry.VERSIONS)
    responses, mask, versions = (torch.as_tensor(fields[name]) for name in names)
    rows = functools.partial(torch.nested.as_nested_tensor, layout=torch.jagged)
    data = TensorDict(
        {
            "input_ids": rows([torch.cat([torch.tensor([1]), responses])]),
            "response_mask": rows([mask]),
            carry.VERSIONS: rows([versions]),
        },
        batch_size=[1],
    )
    ages = carry.token_ages(data, carry.response_tokens(data), trained)
    assert ages is not None
    return ages.tolist()


def test_a_server_without_a_version_leaves_it_open() -> None:
    recorder = Recorder()
    for number, version in enumerate((4, None)):
        output = reply(support_of(*policy(2, number)), 0)
        output.extra_fields["global_steps"] = version
        recorder.take(output)
    assert recorder.token_versions.tolist() == [4, 4, -1, -1]


def client_of_same(client: Any, outputs: list[TokenOutput]) -> Any:
    client._load_balancer.outputs = outputs
    return client


@by_client
def test_the_embedded_rollout_is_asked_for_candidates_of_requests_that_sample_the_policy(
    kind: type[LLMServerClient],
) -> None:
    logits, ids = policy(3, seed=7)
    log_probs = logits.log_softmax(-1)
    top, top_ids = log_probs.topk(K, dim=-1)
    own = log_probs.gather(-1, ids.unsqueeze(-1)).squeeze(-1).tolist()

    def output() -> TokenOutput:
        fields = {"global_steps": 1, "top_logprobs": (top_ids.numpy(), top.float().numpy())}
        return TokenOutput(token_ids=ids.tolist(), log_probs=own, stop_reason="completed", extra_fields=fields)

    servers = Servers([output(), output()])
    recorder = Recorder()
    client = recording(client_of(kind, servers, "hf"), recorder)
    asked: dict[str, Any] = {"temperature": 0.7, "top_p": 1.0, "top_k": -1, "logprobs": True}
    asyncio.run(client.generate("a", prompt_ids=[1], sampling_params=asked))
    assert servers.params[0]["logprobs"] == K
    assert asked["logprobs"] is True
    expected = support_of(logits, ids)
    assert recorder.attempts[0].ids.tolist() == expected.ids.tolist()
    for other in ({"temperature": 0.0}, {"top_p": 0.9}, {"logprobs": False}):
        servers.outputs = [TokenOutput(token_ids=[1], log_probs=[-1.0], stop_reason="completed")]
        asyncio.run(client.generate("a", prompt_ids=[1], sampling_params={**asked, **other}))
        assert servers.params[-1]["logprobs"] in (True, False)
    assert len(recorder.attempts) == 1 and recorder.without_support


def test_a_client_that_is_not_verls_is_refused() -> None:
    with pytest.raises(TypeError, match="not derived from verl's LLMServerClient"):
        recording(SimpleNamespace(), Recorder())


@by_client
def test_without_support_the_output_is_verls_own(kind: type[LLMServerClient]) -> None:
    outputs = [TokenOutput(token_ids=[1, 2], log_probs=[-1.0] * 2, extra_fields={"global_steps": 2}) for _ in range(2)]
    fields = run_loop(kind, outputs)
    assert carry.SUPPORT not in fields
    assert FIELD not in fields["extra_fields"]
