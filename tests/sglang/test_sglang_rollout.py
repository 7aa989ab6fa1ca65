"""verl's SGLang replica, server and weight synchronisation in CPU mode, with and without the plugin."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from transformers import AutoModelForCausalLM
from verl.workers.rollout.replica import TokenOutput
from verl.workers.rollout.sglang_rollout.async_sglang_server import SGLangReplica

from tests.sglang.replica import STOCK, SUPPORT, Served, configuration
from tests.trainer.run import ROOT, make_assets
from verl_troll.core.support import Selection, select
from verl_troll.core.vocab import VocabLogits
from verl_troll.plugin.rollout.sglang import SglangSupportReplica

PROMPTS = [[3 + index, 40, 41 + index] for index in range(12)]
TEMPERATURE, K, DROPPED_MASS = 0.8, 8, 1e-3
WITH_SUPPORT = [
    "+troll=rollout_support",
    SUPPORT,
    f"actor_rollout_ref.rollout.temperature={TEMPERATURE}",
    f"actor_rollout_ref.actor.policy_loss.troll.k={K}",
    f"actor_rollout_ref.actor.policy_loss.troll.dropped_mass={DROPPED_MASS}",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    make_assets(folder)
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


def sample(served: Served) -> dict[str, list[TokenOutput]]:
    """Requests whose tokens depend on the seed, their order and the weights, and greedy requests."""
    return {
        "sampled": served.generate_in_turn(PROMPTS, temperature=TEMPERATURE),
        "greedy": served.generate_in_turn(PROMPTS, temperature=0.0),
    }


@pytest.fixture(scope="module")
def stock(model: Path) -> dict[str, list[TokenOutput]]:
    """What verl's own replica answers."""
    served = Served(configuration(model, STOCK), SGLangReplica)
    try:
        served.update(model)
        outputs = sample(served)
        served.update(model, scale=0.5, step=2)
        outputs["after"] = served.generate(PROMPTS, temperature=TEMPERATURE)
    finally:
        served.close()
    return outputs


@pytest.fixture(scope="module")
def observed(model: Path) -> Iterator[tuple[Served, dict[str, list[TokenOutput]]]]:
    """The replica with the plugin, and its first answers."""
    served = Served(configuration(model, *WITH_SUPPORT), SglangSupportReplica)
    try:
        served.update(model)
        yield served, sample(served)
    finally:
        served.close()


def dense_logits(model: Path, prompt: list[int], output: TokenOutput, scale: float = 1.0) -> torch.Tensor:
    """``[r, V]`` logits divided by the temperature, from transformers."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
        logits = network(torch.tensor([prompt + list(output.token_ids)])).logits[0, len(prompt) - 1 : -1]
    return logits / TEMPERATURE


def test_weights_reach_the_engine(model: Path, stock: dict[str, list[TokenOutput]]) -> None:
    for outputs, scale, step in ((stock["sampled"], 1.0, 1), (stock["after"], 0.5, 2)):
        for prompt, output in zip(PROMPTS, outputs, strict=True):
            expected = dense_logits(model, prompt, output, scale).log_softmax(-1)
            expected = expected.gather(-1, torch.tensor(output.token_ids).unsqueeze(-1)).squeeze(-1)
            torch.testing.assert_close(torch.tensor(output.log_probs), expected, rtol=0, atol=1e-4)
            assert output.extra_fields["global_steps"] == step


@pytest.mark.parametrize("kind", ["sampled", "greedy"])
def test_the_plugin_does_not_change_inference(
    kind: str, stock: dict[str, list[TokenOutput]], observed: tuple[Served, dict[str, list[TokenOutput]]]
) -> None:
    mine, theirs = observed[1][kind], stock[kind]
    assert [output.token_ids for output in mine] == [output.token_ids for output in theirs]
    assert [output.stop_reason for output in mine] == [output.stop_reason for output in theirs]
    for output, other in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(output.log_probs, other.log_probs, rtol=0, atol=1e-6)
    # Otherwise equal tokens would not show that the random stream is the same.
    assert [output.token_ids for output in stock["sampled"]] != [output.token_ids for output in stock["greedy"]]


def test_the_support_is_what_the_policy_itself_would_keep(
    model: Path, observed: tuple[Served, dict[str, list[TokenOutput]]]
) -> None:
    for outputs in (observed[1]["sampled"], observed[0].generate(PROMPTS, temperature=TEMPERATURE)):
        for prompt, output in zip(PROMPTS, outputs, strict=True):
            support = output.extra_fields["troll_support"]
            logits = dense_logits(model, prompt, output)
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
        {"temperature": 1.0},
        {"temperature": TEMPERATURE, "top_p": 0.9},
        {"temperature": TEMPERATURE, "top_k": 5},
        {"temperature": TEMPERATURE, "repetition_penalty": 1.1},
        {"temperature": TEMPERATURE, "logprobs": False},
    ],
    ids=lambda other: "-".join(f"{name}={value}" for name, value in other.items()),
)
def test_other_distributions_leave_no_support(
    observed: tuple[Served, dict[str, list[TokenOutput]]], other: dict[str, Any]
) -> None:
    for output in observed[0].generate(PROMPTS[:2], **other):
        assert len(output.token_ids) > 0
        assert "troll_support" not in output.extra_fields


def test_generation_goes_on_after_an_abort(observed: tuple[Served, dict[str, list[TokenOutput]]]) -> None:
    async def interrupt() -> None:
        await observed[0].replica.abort_all_requests()
        await observed[0].replica.resume_generation()

    asyncio.run(interrupt())
    (output,) = observed[0].generate(PROMPTS[:1], temperature=TEMPERATURE)
    assert len(output.extra_fields["troll_support"].counts) == len(output.token_ids) > 0


def test_requests_leave_nothing_behind(observed: tuple[Served, dict[str, list[TokenOutput]]]) -> None:
    count: Callable[[Any], int] = lambda server: len(server.tokenizer_manager.supports)  # noqa: E731
    assert ray.get(observed[0].replica.server_handle.__ray_call__.remote(count)) == 0
