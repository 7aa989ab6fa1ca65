"""The registered loss against the objective written token by token in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, get_policy_loss_fn
from verl.workers.config import ActorConfig

from verl_troll.core.loss import BatchLosses, BatchTerms
from verl_troll.plugin.policy_loss import ProjectedTerms, projected_terms, register, troll_policy_loss
from verl_troll.plugin.settings import TrollConfig

DOUBLE = torch.float64
# One response with a masked turn, one fully masked.
MASK = torch.tensor([[1, 1, 0, 1, 1], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 0]])
LIVE = MASK.bool()
# The mini-batch, on two data-parallel ranks, has more tokens and sequences than this micro-batch.
MINI_BATCH = {"dp_size": 2, "batch_num_tokens": 23, "global_batch_size": 10, "loss_scale_factor": 7}
AGGREGATIONS = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
ALPHA = 0.3


def draw(seed: int) -> Tensor:
    return torch.randn(MASK.shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def losses_of(terms: ProjectedTerms) -> BatchLosses:
    assert terms.losses is not None
    return terms.losses


class Inputs:
    """Arguments of the loss from verl and the update; masked positions hold poison."""

    def __init__(self, **settings: Any) -> None:
        poison = torch.tensor([math.nan, math.inf, -math.inf, 1e30, math.nan], dtype=DOUBLE)
        self.log_ratio = torch.where(LIVE, 0.4 * draw(1), poison).requires_grad_()
        self.regression_kl = torch.where(LIVE, draw(2).square(), 1e3).requires_grad_()
        self.old_log_prob = torch.where(LIVE, -2 + 0.5 * draw(3), poison)
        self.log_prob = torch.where(LIVE, -2 + 0.5 * draw(4), poison).requires_grad_()
        self.projected = torch.where(LIVE, (draw(5) > -0.3).double(), math.nan)
        self.advantages = torch.where(LIVE, draw(12), 1e3)
        self.weights = torch.where(LIVE, draw(7).square(), 1e3)
        self.settings = TrollConfig(alpha=ALPHA, **settings)

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.log_ratio, self.regression_kl, self.log_prob

    def terms(self) -> ProjectedTerms:
        return ProjectedTerms(
            self.settings, lambda shape: BatchTerms(self.log_ratio, self.regression_kl, self.projected)
        )

    def loss(
        self,
        mode: str = "token-mean",
        *,
        weighted: bool = False,
        mask: Tensor = MASK,
        batch: dict[str, int] = MINI_BATCH,
    ) -> tuple[Tensor, ProjectedTerms]:
        """Call the loss as verl does."""
        config = ActorConfig(strategy="fsdp2", rollout_n=1, use_dynamic_bsz=True)
        config.global_batch_info.update(batch)
        terms = self.terms()
        with projected_terms(terms):
            loss, metrics = troll_policy_loss(
                self.old_log_prob,
                self.log_prob,
                self.advantages,
                mask,
                mode,
                config,
                self.weights if weighted else None,
            )
        assert metrics == {}
        return loss, terms


def aggregated(mode: str, losses: list[list[Tensor]]) -> Tensor:
    """Aggregate the unmasked tokens' losses, by sequence, as verl documents its modes."""
    sums = [torch.stack(row).sum() for row in losses if row]
    ranks = MINI_BATCH["dp_size"]
    if mode == "token-mean":
        return torch.stack(sums).sum() * ranks / MINI_BATCH["batch_num_tokens"]
    if mode == "token-sum":
        return torch.stack(sums).sum() * ranks
    if mode == "seq-mean-token-mean":
        sums = [torch.stack(row).mean() for row in losses if row]
    scale = MINI_BATCH["loss_scale_factor"] if mode == "seq-mean-token-sum-norm" else 1
    return torch.stack(sums).sum() * ranks / MINI_BATCH["global_batch_size"] / scale


def by_hand(inputs: Inputs, mode: str, *, weighted: bool) -> tuple[Tensor, Tensor]:
    """The policy-gradient part and the regression part."""
    losses: list[list[Tensor]] = []
    regressions: list[list[Tensor]] = []
    for b in range(MASK.shape[0]):
        places = [t for t in range(MASK.shape[1]) if MASK[b, t]]
        log_ratios = {}
        for t in places:
            plain = inputs.log_prob[b, t] - inputs.old_log_prob[b, t]
            against = inputs.projected[b, t] == 1 and float(inputs.advantages[b, t]) * float(plain.detach()) < 0
            log_ratios[t] = plain if inputs.settings.one_sided and against else inputs.log_ratio[b, t]
        row = []
        for t in places:
            ratio = log_ratios[t].exp()
            if inputs.settings.importance_ratio == "sequence":
                mean = math.fsum(float(log_ratios[other].detach()) for other in places) / len(places)
                ratio = math.exp(mean) * ratio / ratio.detach()
            weight = float(inputs.weights[b, t]) if weighted else 1.0
            row.append(-weight * ratio * float(inputs.advantages[b, t]))
        losses.append(row)
        regressions.append([inputs.regression_kl[b, t] for t in places])
    return aggregated(mode, losses), ALPHA * aggregated(mode, regressions)


@pytest.mark.parametrize("mode", AGGREGATIONS)
@pytest.mark.parametrize("importance_ratio", ["token", "sequence"])
@pytest.mark.parametrize("one_sided", [False, True], ids=["projected", "one-sided"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_both_parts_and_their_gradients_are_those_of_the_objective(
    mode: str, importance_ratio: str, one_sided: bool, weighted: bool
) -> None:
    inputs = Inputs(importance_ratio=importance_ratio, one_sided=one_sided)
    loss, terms = inputs.loss(mode, weighted=weighted)
    expected = by_hand(inputs, mode, weighted=weighted)
    assert terms.losses is not None
    for actual, reference in zip((loss, terms.losses.regression), expected, strict=True):
        torch.testing.assert_close(actual, reference, rtol=1e-7, atol=0)
        ours = torch.autograd.grad(actual, inputs.leaves, retain_graph=True, allow_unused=True)
        theirs = torch.autograd.grad(reference, inputs.leaves, retain_graph=True, allow_unused=True)
        for own, other in zip(ours, theirs, strict=True):
            own, other = (torch.zeros_like(MASK, dtype=DOUBLE) if x is None else x for x in (own, other))
            torch.testing.assert_close(own, other, rtol=1e-7, atol=0)


def test_some_tokens_left_against_their_advantage_and_some_did_not() -> None:
    inputs = Inputs()
    against = (inputs.projected == 1) & (inputs.advantages * (inputs.log_prob - inputs.old_log_prob) < 0)
    assert 0 < int(against[LIVE].sum()) < int(inputs.projected[LIVE].sum()) < int(LIVE.sum())


def test_the_regression_is_weighted_by_alpha_alone() -> None:
    """Advantages and rollout weights do not affect it."""
    plain, weighted = (losses_of(Inputs().loss(weighted=value)[1]).regression for value in (False, True))
    expected = ALPHA * Inputs().regression_kl[LIVE].sum() * 2 / 23
    assert plain.item() == weighted.item() == pytest.approx(expected.item(), rel=1e-12)


def test_the_shift_is_taken_over_the_tokens_that_take_part() -> None:
    inputs = Inputs()
    shift = losses_of(inputs.loss()[1]).shift
    assert not shift.requires_grad
    moved = (inputs.old_log_prob - inputs.log_prob.detach())[LIVE].tolist()
    share = inputs.projected[LIVE].tolist()
    assert shift.tolist() == pytest.approx([math.fsum(x) / len(x) for x in (moved, share)], rel=1e-12)


@pytest.mark.parametrize("importance_ratio", ["token", "sequence"])
@pytest.mark.parametrize("one_sided", [False, True], ids=["projected", "one-sided"])
def test_extreme_log_ratios_are_limited_and_counted(importance_ratio: str, one_sided: bool) -> None:
    inputs = Inputs(importance_ratio=importance_ratio, one_sided=one_sided, max_log_ratio=5.0)
    with torch.no_grad():
        inputs.log_ratio[0, 1], inputs.log_ratio[3, 0] = 119.0, -6.0
        inputs.projected[0, 1] = inputs.projected[3, 0] = 0
    inputs.advantages[0, 1] = 0.0
    loss, terms = inputs.loss()
    assert losses_of(terms).unusual.tolist() == [2, 0]
    (gradient,) = torch.autograd.grad(loss, inputs.log_ratio)
    assert math.isfinite(loss.item()) and bool(gradient.isfinite().all())
    assert gradient[0, 1] == gradient[3, 0] == 0


@pytest.mark.parametrize("name", ["advantages", "regression_kl", "log_ratio"])
def test_tokens_whose_loss_is_not_finite_are_counted(name: str) -> None:
    inputs = Inputs()
    with torch.no_grad():
        getattr(inputs, name)[0, 1] = getattr(inputs, name)[2, 0] = math.nan
    assert losses_of(inputs.loss()[1]).unusual.tolist() == [0, 2]


def test_a_micro_batch_without_a_token_that_takes_part_is_zero() -> None:
    loss, terms = Inputs().loss(mask=torch.zeros_like(MASK))
    losses = losses_of(terms)
    assert (loss.item(), losses.regression.item(), losses.shift.tolist()) == (0, 0, [0, 0])


def test_micro_batches_add_up() -> None:
    whole = Inputs()
    loss, terms = whole.loss("seq-mean-token-mean", weighted=True)
    parts = []
    for rows in (slice(0, 1), slice(1, 4)):
        part = Inputs()
        for name in ("log_ratio", "regression_kl", "old_log_prob", "log_prob", "projected", "advantages", "weights"):
            setattr(part, name, getattr(part, name)[rows])
        own, own_terms = part.loss("seq-mean-token-mean", weighted=True, mask=MASK[rows])
        parts.append((own.item(), losses_of(own_terms).regression.item()))
    assert loss.item() == pytest.approx(sum(own for own, _ in parts), rel=1e-12)
    assert losses_of(terms).regression.item() == pytest.approx(sum(own for _, own in parts), rel=1e-12)


def test_equal_policies_have_the_plain_policy_gradient() -> None:
    inputs = Inputs()
    inputs.log_ratio = torch.zeros_like(inputs.log_ratio)
    loss, _ = inputs.loss()
    assert loss.item() == pytest.approx(-inputs.advantages[LIVE].sum().item() * 2 / 23, rel=1e-12)


# --- the path to the loss ---------------------------------------------------------------------------------------------


def call(inputs: Inputs, config: ActorConfig | None) -> None:
    troll_policy_loss(inputs.old_log_prob, inputs.log_prob, inputs.advantages, MASK, config=config)


def test_without_projected_terms_it_refuses() -> None:
    inputs = Inputs()
    config = ActorConfig(strategy="fsdp2", rollout_n=1, use_dynamic_bsz=True)
    with pytest.raises(RuntimeError, match=r"does not run on a TROLL engine.*verl-troll doctor"):
        call(inputs, config)
    with projected_terms(inputs.terms()), pytest.raises(RuntimeError, match="does not run on a TROLL engine"):
        call(inputs, None)


def test_terms_are_handed_to_the_loss_inside_only() -> None:
    inputs = Inputs()
    config = ActorConfig(strategy="fsdp2", rollout_n=1, use_dynamic_bsz=True)
    outer, inner = inputs.terms(), inputs.terms()
    with projected_terms(outer):
        with pytest.raises(ArithmeticError), projected_terms(inner):
            raise ArithmeticError
        call(inputs, config)
    assert outer.losses is not None and inner.losses is None
    with pytest.raises(RuntimeError, match="without projected terms"):
        call(inputs, config)


def test_it_is_registered_once_under_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(POLICY_LOSS_REGISTRY, "troll", raising=False)
    for _ in range(2):
        register()
        assert get_policy_loss_fn("troll") is troll_policy_loss


def test_a_name_that_another_package_took_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def foreign() -> None: ...

    monkeypatch.setitem(POLICY_LOSS_REGISTRY, "troll", foreign)
    with pytest.raises(RuntimeError, match=f"already has a policy loss 'troll' from {__name__}"):
        register()
    assert POLICY_LOSS_REGISTRY["troll"] is foreign
