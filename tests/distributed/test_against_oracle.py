"""Loss and parameter gradients of verl's engine under TROLL, compared with a token-by-token float64 reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor
from transformers import Qwen2ForCausalLM

from tests import oracle
from tests.distributed import batches
from tests.distributed import fsdp_scenarios as scenarios
from tests.distributed.fsdp_scenarios import Setup
from tests.distributed.launch import run_ranks

NOISE = 0.006
SCALE_FACTOR = 12
# With no dropped mass, rounding cannot move an id across the edge of the support.
SUPPORT: dict[str, Any] = {"k": 20, "dropped_mass": 0.0}


def reference_model(path: str, noise: float) -> Qwen2ForCausalLM:
    """The scenario's model in float64, perturbed as ``scenarios.perturb`` perturbs the engine's."""
    model = Qwen2ForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for index, (_, parameter) in enumerate(sorted(model.named_parameters())):
            step = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1 + index)) * noise
            parameter.add_(step * (parameter != 0))
    return model.double()


def response_logits(model: Qwen2ForCausalLM, batch: TensorDict) -> list[Tensor]:
    """Temperature-scaled logits ``[r, V]`` that predict each sample's response, one sample at a time."""
    scaled = []
    for prompt, response in zip(batch["prompts"].unbind(), batch["responses"].unbind(), strict=True):
        logits = model(torch.cat([prompt, response])[None]).logits[0] / batches.TEMPERATURE
        scaled.append(logits[len(prompt) - 1 : len(prompt) - 1 + len(response)])
    return scaled


def token_losses(setup: Setup, batch: TensorDict, new: list[Tensor], old: list[Tensor]) -> list[list[Tensor]]:
    """``-w ratio A + alpha KL(p || pi)`` for every token that takes part, by sample."""
    assert setup.troll is not None
    losses = []
    for sample, mask in enumerate(batch["response_mask"].unbind()):
        places = mask.nonzero().flatten().tolist()
        log_ratios, regressions = [], []
        for t in places:
            row = oracle.outcomes(
                setup.troll["support"],
                new[sample][t],
                old[sample][t],
                int(batch["responses"].unbind()[sample][t]),
                vocab_size=batches.VOCAB,
                **SUPPORT,
            )
            log_pi = oracle.project(row.log_p[None], row.log_q[None], 0.05)[0]
            log_ratios.append(log_pi[row.place] - row.log_q[row.place])
            regressions.append(oracle.kl(row.log_p, log_pi.detach()))
        if setup.troll.get("importance_ratio") == "sequence" and places:
            mean = torch.stack(log_ratios).detach().mean()
            log_ratios = [mean + own - own.detach() for own in log_ratios]
        weights = batch["rollout_is_weights"].unbind()[sample]
        advantages = batch["advantages"].unbind()[sample]
        losses.append(
            [
                -float(weights[t]) * log_ratio.exp() * float(advantages[t]) + regression
                for t, log_ratio, regression in zip(places, log_ratios, regressions, strict=True)
            ]
        )
    return losses


def aggregate(mode: str, losses: list[list[Tensor]], batch_size: int) -> Tensor:
    """verl's aggregation modes, applied to the whole mini-batch."""
    filled = [torch.stack(row) for row in losses if row]
    if mode == "token-mean":
        return torch.cat(filled).mean()
    if mode == "token-sum":
        return torch.cat(filled).sum()
    if mode == "seq-mean-token-mean":
        return torch.stack([row.mean() for row in filled]).sum() / batch_size
    sums = torch.stack([row.sum() for row in filled]).sum() / batch_size
    return sums / SCALE_FACTOR if mode == "seq-mean-token-sum-norm" else sums


@pytest.mark.parametrize(
    ("mode", "method"),
    [
        ("token-mean", {"support": "union"}),
        ("token-mean", {"support": "anchored"}),
        ("token-sum", {"support": "anchored"}),
        ("seq-mean-token-sum", {"support": "union"}),
        ("seq-mean-token-mean", {"support": "anchored", "importance_ratio": "sequence"}),
        ("seq-mean-token-sum-norm", {"support": "union"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value.values()),
)
def test_engine_on_two_ranks_agrees_with_the_reference(tmp_path: Path, mode: str, method: dict[str, str]) -> None:
    path = scenarios.write_model(tmp_path)
    batch = batches.make_batch()
    setup = Setup(
        path,
        {**method, **SUPPORT},
        loss_agg_mode=mode,
        loss_scale_factor=SCALE_FACTOR if mode.endswith("norm") else None,
        micro_batch_size=2,
        rollout_weights=True,
    )
    result = run_ranks(scenarios.loss_and_gradient, 2, (setup, batch, NOISE))[0]

    with torch.no_grad():
        old = response_logits(reference_model(path, 0.0), batch)
    model = reference_model(path, NOISE)
    losses = token_losses(setup, batch, response_logits(model, batch), old)
    loss = aggregate(mode, losses, len(losses))
    loss.backward()

    assert result["loss"] == pytest.approx(loss.item(), rel=1e-4, abs=1e-5)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    scale = max(grad.abs().max().item() for grad in gradients.values() if grad is not None)
    for name, grad in gradients.items():
        assert grad is not None
        # The engine's step sizes are accurate to 1e-3 of the bound.
        torch.testing.assert_close(result["gradients"][name].double(), grad, rtol=0, atol=1e-3 * scale, msg=name)
