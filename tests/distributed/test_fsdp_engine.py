"""TROLL on verl's real FSDP2 engine: loss and gradient do not depend on how a mini-batch is cut, padded or spread."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from tests.distributed import batches
from tests.distributed import fsdp_scenarios as scenarios
from tests.distributed.fsdp_scenarios import Setup
from tests.distributed.launch import run_ranks
from tests.rounding import last_place

AGGREGATIONS = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
# Of a float32 between 64 and 128, where logits and their normaliser lie: verl's log-probabilities are rounded to this.
LAST_PLACE = last_place(64.0)
METHODS: dict[str, dict[str, Any]] = {
    "union": {"support": "union", "k": 16},
    "anchored": {"support": "anchored", "k": 16},
    # With no dropped mass, rounding cannot move an id across the edge of the support.
    "sequence": {"support": "anchored", "importance_ratio": "sequence", "k": 20, "dropped_mass": 0.0},
    "detached": {"support": "union", "step_size_gradient": "detached", "alpha": 0.3, "k": 20, "dropped_mass": 0.0},
}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return scenarios.write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def batch() -> TensorDict:
    return batches.make_batch()


def assert_same(result: dict[str, Any], reference: dict[str, Any], tolerance: float = 2e-5, skip: str = "-") -> None:
    """Loss, gradients (except of parameters whose name contains ``skip``) and TROLL metrics are equal.

    Gradient errors are relative to the largest entry of all.
    """
    assert result["loss"] == pytest.approx(reference["loss"], rel=tolerance, abs=tolerance)
    scale = max(grad.abs().max().item() for grad in reference["gradients"].values())
    assert scale > 1e-3
    assert result["gradients"].keys() == reference["gradients"].keys()
    for name, grad in reference["gradients"].items():
        if skip in name:
            continue
        torch.testing.assert_close(result["gradients"][name], grad, rtol=0, atol=tolerance * scale, msg=name)
    for name, value in reference["metrics"].items():
        if name.startswith("troll/"):
            assert result["metrics"][name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradient_do_not_depend_on_how_the_batch_is_cut(
    model_path: str, batch: TensorDict, method: str
) -> None:
    whole = Setup(model_path, METHODS[method], micro_batch_size=8)
    cuts = [
        replace(whole, micro_batch_size=2),
        replace(whole, micro_batch_size=1),
        replace(whole, use_dynamic_bsz=True, max_token_len=24),
        replace(whole, use_remove_padding=False, micro_batch_size=4),
    ]
    reference, *others = run_ranks(scenarios.each, 1, ([whole, *cuts], batch))[0]
    assert reference["engine"] == "TrollFSDPEngine"
    assert 0.05 < reference["metrics"]["troll/projected_share"] < 0.95
    for other in others:
        assert_same(other, reference)
    spread = [
        replace(whole, micro_batch_size=4),
        replace(whole, micro_batch_size=2, use_remove_padding=False),
        replace(whole, use_dynamic_bsz=True, max_token_len=24),
    ]
    for rank in run_ranks(scenarios.each, 2, (spread, batch)):
        for other in rank:
            assert_same(other, reference)


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_every_aggregation_mode_is_the_same_on_one_and_two_ranks(model_path: str, batch: TensorDict, mode: str) -> None:
    whole = Setup(
        model_path,
        METHODS["union"],
        loss_agg_mode=mode,
        loss_scale_factor=12 if mode.endswith("norm") else None,
        micro_batch_size=8,
        rollout_weights=True,
        use_kl_loss=True,
        entropy_coeff=0.01,
    )
    reference = run_ranks(scenarios.each, 1, ([whole], batch))[0][0]
    for rank in run_ranks(scenarios.each, 2, ([replace(whole, micro_batch_size=2)], batch)):
        assert_same(rank[0], reference)


@pytest.mark.parametrize("method", ["union", "anchored"])
def test_sequence_parallel_ranks_agree_with_one_rank(tmp_path: Path, batch: TensorDict, method: str) -> None:
    model_path = scenarios.write_model(tmp_path, attention=False)
    whole = Setup(model_path, METHODS[method], micro_batch_size=8)
    reference = run_ranks(scenarios.each, 1, ([whole], batch))[0][0]
    for rank in run_ranks(scenarios.each, 2, ([replace(whole, ulysses=2, micro_batch_size=4)], batch)):
        # What attention sees differs by rank, and so does the gradient of the weights that mask it out.
        assert_same(rank[0], reference, skip="self_attn")


def test_old_pass_gives_verls_log_probs_and_a_support_for_unmasked_response_tokens(
    model_path: str, batch: TensorDict
) -> None:
    stock, union, padded = run_ranks(
        scenarios.old_policies,
        1,
        (
            [
                Setup(model_path, None),
                Setup(model_path, METHODS["union"]),
                Setup(model_path, METHODS["union"], use_remove_padding=False),
            ],
            batch,
        ),
    )[0]
    assert set(stock) == {"log_probs", "entropy"}
    for ours in (union, padded):
        assert set(ours) == {"log_probs", "entropy", "troll_old_ids", "troll_old_log_probs", "troll_old_counts"}
        for sample, mask in enumerate(batch["response_mask"].unbind()):
            length = len(mask)
            window = slice(-length - 1, -1)
            torch.testing.assert_close(
                ours["log_probs"][sample][window], stock["log_probs"][sample][window], rtol=0, atol=2 * LAST_PLACE
            )
            torch.testing.assert_close(
                ours["entropy"][sample][window], stock["entropy"][sample][window], rtol=0, atol=2e-5
            )
            _check_support(ours, sample, batch, mask.bool(), stock["log_probs"][sample][window])


def _check_support(
    output: dict[str, list[Tensor]], sample: int, batch: TensorDict, mask: Tensor, log_probs: Tensor
) -> None:
    counts = output["troll_old_counts"][sample].long()
    assert counts.shape == mask.shape
    assert (counts[~mask] == 0).all()
    assert (counts[mask] >= 1).all()
    assert (counts[mask] <= 17).all()
    assert int(counts.sum()) == len(output["troll_old_ids"][sample]) == len(output["troll_old_log_probs"][sample])
    responses = batch["responses"].unbind()[sample]
    ids = output["troll_old_ids"][sample].long().split(counts.tolist())
    values = output["troll_old_log_probs"][sample].split(counts.tolist())
    for token in mask.nonzero().flatten().tolist():
        place = (ids[token] == responses[token]).nonzero()
        assert place.numel() == 1, "the sampled id is kept, once"
        assert values[token][place.item()].item() == pytest.approx(log_probs[token].item(), rel=0, abs=2 * LAST_PLACE)
        assert values[token].exp().sum() <= 1 + 1e-5


@pytest.mark.parametrize(("param_dtype", "temperature"), [("fp32", 0.8), ("bf16", 0.8), ("bf16", 1.0)])
def test_reusing_the_logits_changes_no_bit(
    model_path: str, batch: TensorDict, param_dtype: str, temperature: float
) -> None:
    """At temperature 1 verl passes the model's own tensor."""
    methods = [{**METHODS[name], "reuse_logits": reuse} for name in ("union", "anchored") for reuse in (True, False)]
    setups = [
        Setup(
            model_path,
            troll,
            entropy_coeff=0.01,
            param_dtype=param_dtype,
            use_remove_padding=packed,
            temperature=temperature,
        )
        for packed in (True, False)
        for troll in methods
    ]
    results = run_ranks(scenarios.each, 1, (setups, batch))[0]
    for reused, kept in zip(results[::2], results[1::2], strict=True):
        assert reused["loss"] == kept["loss"]
        assert reused["metrics"] == kept["metrics"]
        for name, gradient in kept["gradients"].items():
            assert torch.equal(reused["gradients"][name], gradient), name


def test_ratio_is_exactly_one_before_the_first_update(model_path: str, batch: TensorDict) -> None:
    setups = [
        Setup(model_path, METHODS[name], micro_batch_size=4, temperature=temperature)
        for name in ("union", "anchored")
        for temperature in (0.8, 1.0)
    ]
    for result in run_ranks(scenarios.each, 1, (setups, batch, 0.0))[0]:
        metrics = result["metrics"]
        assert metrics["troll/kl_before_max"] == 0
        assert metrics["troll/projected_share"] == 0
        assert metrics["troll/regression_loss"] == 0
        assert metrics["actor/ppo_kl"] == pytest.approx(0, abs=1e-7)
        batches.assert_loss_at_ratio_one(metrics["actor/pg_loss"], batch)


def test_reference_kl_and_entropy_come_from_the_unprojected_policy(model_path: str, batch: TensorDict) -> None:
    troll = Setup(model_path, METHODS["union"], use_kl_loss=True, entropy_coeff=0.01)
    ours, vanilla = run_ranks(scenarios.each, 1, ([troll, replace(troll, troll=None)], batch))[0]
    assert vanilla["engine"] == "TrollFSDPEngine", "inert without settings, but in place"
    assert not any(name.startswith("troll/") for name in vanilla["metrics"])
    assert ours["metrics"]["troll/projected_share"] > 0.05
    for name in ("kl_loss", "actor/entropy_loss", "actor/ppo_kl"):
        assert ours["metrics"][name] == pytest.approx(vanilla["metrics"][name], rel=1e-4), name


def test_kl_after_projection_never_exceeds_the_bound(model_path: str, batch: TensorDict) -> None:
    for bound in (0.005, 0.05, 0.25):
        setup = Setup(model_path, {"support": "union", "kl_bound": bound}, micro_batch_size=8)
        metrics = run_ranks(scenarios.each, 1, ([setup], batch, 0.1))[0][0]["metrics"]
        assert metrics["troll/kl_before_max"] > bound
        assert metrics["troll/kl_after_max"] <= bound * (1 + 1e-5)
        assert metrics["troll/violation_max"] <= 1e-5
        assert metrics["troll/unconverged"] == 0


@pytest.mark.parametrize("support", ["union", "anchored"])
def test_one_sided_changes_tokens_that_left_against_their_advantage(
    model_path: str, batch: TensorDict, support: str
) -> None:
    troll = {"support": support, "kl_bound": 0.005}
    setups = [Setup(model_path, {**troll, "one_sided": value}, micro_batch_size=8) for value in (False, True)]
    both, one = run_ranks(scenarios.each, 1, (setups, batch, 0.1))[0]
    assert one["metrics"]["troll/projected_share"] == both["metrics"]["troll/projected_share"] > 0
    # Each plain ratio is worse than the projected one, which lies between it and 1.
    assert one["metrics"]["actor/pg_loss"] > both["metrics"]["actor/pg_loss"]
    assert one["metrics"]["troll/regression_loss"] == both["metrics"]["troll/regression_loss"]


def test_regression_pulls_the_network_back_into_the_region(model_path: str, batch: TensorDict) -> None:
    still = batch.clone()
    still["advantages"] = torch.nested.nested_tensor_from_jagged(
        torch.zeros_like(batch["advantages"].values()), batch["advantages"].offsets()
    )
    setup = Setup(model_path, {"support": "anchored", "alpha": 1.0}, micro_batch_size=8, lr=5e-3)
    moved = run_ranks(scenarios.train_steps_after_move, 1, (setup, still, 8))[0]
    assert moved[-1]["troll/kl_before"] < 0.5 * moved[0]["troll/kl_before"]


def test_lora_reference_pass_leaves_the_old_policy_alone(model_path: str, batch: TensorDict) -> None:
    result = run_ranks(scenarios.lora_passes, 1, (Setup(model_path, METHODS["union"], lora_rank=4), batch))[0]
    assert "troll_old_support" in result["old_fields"]
    assert result["reference_fields"] == ["log_probs"]
    assert result["moved"] > 1e-2
    assert all("lora" in name for name in result["trained"])
    assert result["grad_norm"] > 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_rank_takes_a_step_whose_loss_is_not_finite(model_path: str, batch: TensorDict, value: float) -> None:
    """The last rank alone sees the broken token."""
    setup = Setup(model_path, METHODS["union"])
    broken, whole = (batches.with_broken_advantage(batch, one) for one in (value, 1.0))
    for row in run_ranks(scenarios.broken_step, 2, (setup, broken)):
        assert row["moved"] == 0 and row["troll/nonfinite"] == 1 and math.isnan(row["grad_norm"])
    for row in run_ranks(scenarios.broken_step, 2, (setup, whole)):
        assert row["moved"] > 0 and row["troll/nonfinite"] == 0 and row["grad_norm"] > 0


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_a_mini_batch_without_a_token_is_as_with_verls_loss(model_path: str, batch: TensorDict, mode: str) -> None:
    setups = [Setup(model_path, troll, loss_agg_mode=mode, loss_scale_factor=16) for troll in (METHODS["union"], None)]
    ours, verls = run_ranks(scenarios.broken_steps, 1, (setups, batches.all_masked(batch)))[0]
    assert ours["troll/nonfinite"] == 0
    for name in ("moved", "grad_norm", "loss", "actor/pg_loss"):
        assert ours[name] == pytest.approx(verls[name], nan_ok=True), name


def test_half_precision_runs_and_stays_in_the_region(model_path: str, batch: TensorDict) -> None:
    for method in ("union", "anchored"):
        setup = Setup(model_path, METHODS[method], param_dtype="bf16", lr=1e-2)
        history = run_ranks(scenarios.train_steps, 2, (setup, batch, 3))[0]
        assert all(torch.isfinite(torch.tensor(list(step.values()))).all() for step in history)
        assert history[-1]["troll/kl_before"] > 0.05
        assert history[-1]["troll/kl_after_max"] <= 0.05 * (1 + 1e-5)


def test_update_without_the_support_says_what_is_missing(model_path: str, batch: TensorDict) -> None:
    error = run_ranks(scenarios.update_without_support, 1, (Setup(model_path), batch))[0]
    assert error.startswith("MissingSupportError")
    assert "old-log-prob pass did not compute" in error


def test_stock_engine_under_the_troll_loss_refuses_to_train(model_path: str, batch: TensorDict) -> None:
    error = run_ranks(scenarios.troll_loss_on_stock_engine, 1, (Setup(model_path), batch))[0]
    assert "does not run on a TROLL engine" in error
    assert "doctor" in error


@pytest.mark.parametrize("ranks", [1, 2])
def test_snapshots_of_an_asynchronous_step_are_two_policies(model_path: str, batch: TensorDict, ranks: int) -> None:
    for found in run_ranks(scenarios.snapshots, ranks, (Setup(model_path, METHODS["union"]), batch)):
        assert (found["after"] - found["before"]).abs().max() > 0.1
        torch.testing.assert_close(found["restored before"], found["before"], rtol=0, atol=0)
        torch.testing.assert_close(found["restored after"], found["after"], rtol=0, atol=0)
