"""Compares the kernels with the torch forms on one engine."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from benchmarks.gpu.engines.hosts import Host
from benchmarks.gpu.engines.rows import EngineRow


def agreement(host: Host, setup: Any, troll: dict[str, Any], batch: Any, row: EngineRow) -> None:
    """Check one support rule on one engine: kernels against torch, log-probs against verl's, two updates.

    The first update is on the old policy's own weights, the second after a move. Both forms share the forward pass, so
    any difference is theirs.
    """
    from tests.distributed.batches import by_sample, with_old_policy
    from verl_troll.core import kernels

    bf16 = host.device.type == "cuda"
    forms: dict[str, dict[str, Tensor]] = {}
    for form in ("auto", "torch"):
        host.loss_function(setup, {**troll, "kernels": form})
        forms[form] = host.old_pass(batch, setup)
        row.facts[f"kernels, {form}"] = kernels.available(host.device)
    host.loss_function(setup, None)
    verls = host.old_pass(batch, setup)

    tokens = other_support = 0
    apart = alone = 0.0
    for ours, other in zip(*(by_sample(forms[form]) for form in ("auto", "torch")), strict=True):
        for policy, policy_torch in zip(*map(_by_token, (ours, other)), strict=True):
            tokens += 1
            both = policy.keys() & policy_torch.keys()
            mass = sum(math.exp(one[token]) for one in (policy, policy_torch) for token in one.keys() - both)
            apart = max(apart, *(abs(policy[token] - policy_torch[token]) for token in both))
            alone, other_support = max(alone, mass), other_support + (mass > 0)
    row.facts["tokens"] = tokens
    row.facts["tokens with another support"] = other_support
    row.facts["kept ids"] = forms["auto"]["troll_old_counts"].values().float().sum().item() / max(1, tokens)
    # Rounding can change which id is the last one kept.
    row.check("mass of ids that one form keeps alone", alone, 2e-5)
    row.check("log-probs of the support apart", apart, 1e-3)
    # In bfloat16, verl rounds its log-probs.
    values = forms["auto"]["log_probs"].values(), verls["log_probs"].values()
    inside = _response(batch)
    row.check("log-probs from verl's", (values[0] - values[1])[inside].abs().max().item(), 0.5 if bf16 else 1e-4)

    loss_function = host.loss_function(setup, {**troll, "kernels": "auto"})
    shard = with_old_policy(batch, forms["auto"])
    _, metrics, _ = host.loss(shard, setup, loss_function)
    row.facts["kl_before_max of the first update"] = metrics["troll/kl_before_max"]
    row.facts["ppo_kl of the first update"] = metrics["actor/ppo_kl"]
    row.facts["first update exact"] = metrics["troll/kl_before_max"] < 1e-12 and metrics["actor/ppo_kl"] == 0
    row.check("KL of the first update", metrics["troll/kl_before_max"], 1e-4 if bf16 else 1e-6)

    host.move(0.03)
    results = {}
    for form in ("auto", "torch"):
        loss_function = host.loss_function(setup, {**troll, "kernels": form})
        results[form] = host.loss(shard, setup, loss_function)
    (loss, metrics, gradient), (loss_torch, metrics_torch, gradient_torch) = results["auto"], results["torch"]
    row.facts["loss"], row.facts["loss, torch"] = loss, loss_torch
    row.facts |= {name: metrics[name] for name in ("troll/kl_before", "troll/kl_after_max", "troll/projected_share")}
    row.check("loss apart, relative", abs(loss - loss_torch) / max(1e-6, abs(loss_torch)), 1e-2 if bf16 else 1e-4)
    distance = (gradient - gradient_torch).norm() / gradient_torch.norm()
    row.check("gradient apart, relative", distance.item(), 2e-2 if bf16 else 1e-3)
    shares = "troll/projected_share"
    row.check("projected share apart", abs(metrics[shares] - metrics_torch[shares]), 2e-2)
    row.check("KL after projection", metrics["troll/kl_after_max"], 0.05 * (1 + 1e-5))
    row.check("no token was projected", float(metrics[shares] == 0), 0)


def _by_token(sample: dict[str, Tensor]) -> Iterator[dict[int, float]]:
    """Log-probs by id, for each token with a support."""
    counts = [int(count) for count in sample["troll_old_counts"].tolist() if count > 0]
    for ids, log_probs in zip(
        sample["troll_old_ids"].split(counts), sample["troll_old_log_probs"].split(counts), strict=True
    ):
        yield dict(zip(ids.tolist(), log_probs.tolist(), strict=True))


def _response(batch: Any) -> Tensor:
    """Positions in the packed batch whose logits predict a response token."""
    from verl_troll.plugin import carry

    return carry.response_tokens(batch).rows
