"""verl's vLLM replica, server and weight synchronisation in CPU mode, with and without the plugin."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from transformers import AutoModelForCausalLM
from verl.workers.rollout.replica import TokenOutput

from tests.trainer.run import ROOT, make_assets
from tests.vllm.replica import Served, configuration
from verl_troll.core.support import Selection, select
from verl_troll.core.vocab import VocabLogits

PROMPTS = [[3 + index, 40, 41 + index] for index in range(12)]
K, DROPPED_MASS = 8, 1e-3
SUPPORT = [
    "+troll=rollout_support",
    f"actor_rollout_ref.actor.policy_loss.troll.k={K}",
    f"actor_rollout_ref.actor.policy_loss.troll.dropped_mass={DROPPED_MASS}",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    # On CPUs vLLM's attention needs heads of size 32 or more.
    make_assets(folder, hidden_size=128)
    return folder / "model"


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    ray.init(
        address="local",
        num_cpus=8,
        num_gpus=1,
        include_dashboard=False,
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def stock(model: Path) -> dict[str, list[TokenOutput]]:
    """What verl's own replica answers, in processes without the plugin."""
    from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMReplica

    served = Served(configuration(model), vLLMReplica)
    try:
        served.update(model)
        sampled = served.generate(PROMPTS, in_turn=True, temperature=0.8)
        served.update(model, scale=0.5, step=2)
        after = served.generate(PROMPTS, temperature=0.8)
    finally:
        served.close()
    return {"sampled": sampled, "after": after}


@pytest.fixture(scope="module")
def observed(model: Path, stock: Any) -> Iterator[Served]:
    import verl_troll.plugin.rollout  # noqa: F401

    served = Served(configuration(model, *SUPPORT, "actor_rollout_ref.rollout.temperature=0.8"))
    try:
        served.update(model)
        yield served
    finally:
        served.close()


def dense_log_probs(model: Path, prompt: list[int], output: TokenOutput, scale: float = 1.0) -> torch.Tensor:
    """``[r, V]`` logits divided by the temperature, from transformers."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
        logits = network(torch.tensor([prompt + list(output.token_ids)])).logits[0, len(prompt) - 1 : -1]
    return logits / 0.8


def test_weights_reach_the_engine(model: Path, stock: dict[str, list[TokenOutput]]) -> None:
    for outputs, scale, step in ((stock["sampled"], 1.0, 1), (stock["after"], 0.5, 2)):
        for prompt, output in zip(PROMPTS, outputs, strict=True):
            expected = dense_log_probs(model, prompt, output, scale).log_softmax(-1)
            expected = expected.gather(-1, torch.tensor(output.token_ids).unsqueeze(-1)).squeeze(-1)
            torch.testing.assert_close(torch.tensor(output.log_probs), expected, rtol=0, atol=1e-4)
            assert output.extra_fields["global_steps"] == step
    assert [output.token_ids for output in stock["sampled"]] != [output.token_ids for output in stock["after"]]


def test_the_plugin_does_not_change_inference(stock: dict[str, list[TokenOutput]], observed: Served) -> None:
    sampled = observed.generate(PROMPTS, in_turn=True, temperature=0.8)
    assert [output.token_ids for output in sampled] == [output.token_ids for output in stock["sampled"]]
    assert [output.stop_reason for output in sampled] == [output.stop_reason for output in stock["sampled"]]
    for mine, theirs in zip(sampled, stock["sampled"], strict=True):
        np.testing.assert_allclose(mine.log_probs, theirs.log_probs, rtol=0, atol=1e-5)


def test_the_support_is_what_the_policy_itself_would_keep(model: Path, observed: Served) -> None:
    for prompt, output in zip(PROMPTS, observed.generate(PROMPTS, temperature=0.8), strict=True):
        support = output.extra_fields["troll_support"]
        logits = dense_log_probs(model, prompt, output)
        tokens = torch.tensor(output.token_ids)
        dense = select(VocabLogits.of(logits, torch.arange(len(tokens))), tokens, Selection(K, DROPPED_MASS))
        used = dense.ids >= 0
        assert support.tokens.tolist() == tokens.tolist()
        assert support.counts.tolist() == used.sum(-1).tolist()
        assert support.ids.tolist() == dense.ids[used].tolist()
        torch.testing.assert_close(torch.tensor(support.log_probs), dense.log_probs[used], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "other",
    [
        {"temperature": 0.0},
        {"temperature": 0.8, "top_p": 0.9},
        {"temperature": 0.8, "min_tokens": 3},
        {"temperature": 0.8, "logprobs": False},
    ],
)
def test_other_distributions_leave_no_support(observed: Served, other: dict[str, Any]) -> None:
    for output in observed.generate(PROMPTS[:2], **other):
        assert "troll_support" not in output.extra_fields


def test_generation_goes_on_after_an_abort(observed: Served) -> None:
    import asyncio

    async def interrupt() -> None:
        await observed.replica.abort_all_requests()
        await observed.replica.resume_generation()

    asyncio.run(interrupt())
    (output,) = observed.generate(PROMPTS[:1], temperature=0.8)
    assert len(output.extra_fields["troll_support"].counts) == len(output.token_ids) > 0


def test_requests_leave_nothing_behind(observed: Served) -> None:
    count: Callable[[Any], int] = lambda server: len(server.engine.supports)  # noqa: E731
    assert ray.get(observed.replica.server_handle.__ray_call__.remote(count)) == 0
