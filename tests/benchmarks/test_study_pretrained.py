"""The study's part on a pretrained model: its losses, its probe, its stages and its tables."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.workers.config import FSDPActorConfig

from benchmarks.study import names, pretrained, probe, results, survey, tables
from benchmarks.study.cells import LOSSES, PROBED_K, Cell
from benchmarks.study.losses import LOSSES as WITH_REGRESSION
from benchmarks.study.names import of_k
from benchmarks.study.tasks import NAMES, PRETRAINED, TASKS
from tests import oracle
from verl_troll.core.loss import BatchTerms, policy_terms
from verl_troll.core.support import select
from verl_troll.core.vocab import VocabLogits
from verl_troll.plugin.policy_loss import ProjectedTerms, projected_terms
from verl_troll.plugin.settings import TrollConfig

ROWS, VOCAB = 12, 20
SHAPE = (3, 4)


@pytest.fixture
def policies() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of an old and a new policy, some of whose tokens are outside the region, and the sampled ids."""
    random = torch.Generator().manual_seed(0)
    old = 2 * torch.randn(ROWS, VOCAB, generator=random, dtype=torch.float64)
    moved = torch.linspace(0, 1, ROWS, dtype=torch.float64)[:, None]
    new = old + moved * torch.randn(ROWS, VOCAB, generator=random, dtype=torch.float64)
    return old, new, torch.randint(VOCAB, (ROWS,), generator=random)


# --- losses -----------------------------------------------------------------------------------------------------------


def clip_losses(log_ratio: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    ratio = log_ratio.exp()
    clipped = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    return torch.where(advantages < 0, torch.minimum(clipped, -3.0 * advantages), clipped)


def dppo_losses(log_ratio: torch.Tensor, advantages: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    q, p = old.exp(), (old + log_ratio).exp()
    kl = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
    kept = (kl <= 0.05) | torch.where(advantages > 0, p <= q, p >= q)
    return -advantages * log_ratio.exp().detach() * (old + log_ratio) * kept.detach()


@pytest.mark.parametrize("name", WITH_REGRESSION)
def test_a_loss_with_regression_equals_a_dense_computation(
    name: str, policies: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> None:
    old, new, sampled = policies
    advantages = torch.linspace(-1, 1, ROWS, dtype=torch.float64).view(SHAPE)
    mask = torch.ones(SHAPE)
    # All ids are kept, so that both supports are the vocabulary.
    settings = TrollConfig(k=VOCAB, dropped_mass=0.0)
    limits = {"vanilla": (0.2, 3.0), "dppo_kl": (0.05, 1e4)}[WITH_REGRESSION[name]]
    config = FSDPActorConfig(
        strategy="fsdp2",
        rollout_n=1,
        use_dynamic_bsz=True,
        clip_ratio_low=limits[0],
        clip_ratio_high=limits[0],
        clip_ratio_c=limits[1],
    )

    logits = new.clone().requires_grad_()
    support = select(VocabLogits.of(old), sampled, settings.selection)
    terms = policy_terms("union", VocabLogits.of(logits), support, settings.selection, kl_bound=settings.kl_bound)
    padded = BatchTerms(*(value.view(SHAPE) for value in (terms.log_ratio, terms.regression_kl, terms.projected)))
    handed = ProjectedTerms(settings, lambda shape: padded)
    with projected_terms(handed):
        policy, _ = get_policy_loss_fn(name)(
            support.sampled_log_probs.view(SHAPE), terms.sampled_log_probs.view(SHAPE), advantages, mask, config=config
        )
    assert handed.losses is not None
    loss = policy + handed.losses.regression
    (gradient,) = torch.autograd.grad(loss, logits)

    dense = new.clone().requires_grad_()
    log_q, log_p = old.log_softmax(-1), dense.log_softmax(-1)
    log_pi = oracle.project(log_p.detach(), log_q, settings.kl_bound)
    q, p = (values.gather(-1, sampled[:, None]).view(SHAPE) for values in (log_q, log_p))
    plain = clip_losses(p - q, advantages) if name == "vanilla_regression" else dppo_losses(p - q, advantages, q)
    expected = plain.mean() + oracle.kl(log_p, log_pi).mean()
    (reference,) = torch.autograd.grad(expected, dense)
    assert 0.2 < terms.projected.mean() < 0.9
    assert handed.losses.regression > 0.01
    torch.testing.assert_close(loss, expected, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(gradient, reference, rtol=1e-6, atol=1e-8)


def test_arms_with_regression_have_the_support_of_the_default() -> None:
    for name in ("clip_regression", "dppo_kl_regression"):
        assert LOSSES[name][0] == "+troll=default"
        assert not any("policy_loss.troll" in word for word in LOSSES[name])
        assert Cell("sums", name, 1e-5, 0).session == Cell("sums", "union", 1e-5, 0).session


# --- probe ------------------------------------------------------------------------------------------------------------


def test_the_probe_sees_all_with_the_whole_vocabulary(
    policies: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    old, new, sampled = policies
    seen = probe.compare_policies(old, new, sampled, (VOCAB,))
    kl = oracle.kl(new.log_softmax(-1), old.log_softmax(-1))
    assert seen[names.KL] == pytest.approx(kl.mean().item())
    assert seen[names.OUTSIDE] == pytest.approx((kl > probe.KL_BOUND).double().mean().item())
    assert 0 < seen[names.OUTSIDE] < 1
    for support in names.SUPPORTS:
        assert seen[of_k(VOCAB, "projected", support)] == seen[names.OUTSIDE]
        assert seen[of_k(VOCAB, "false", support)] == seen[of_k(VOCAB, "missed", support)] == 0
    assert seen[of_k(VOCAB, "kept_mass")] == pytest.approx(1, abs=1e-4)
    assert seen[of_k(VOCAB, "cap_hits")] == 0
    assert set(names.probed((VOCAB,))) == set(seen)


def test_union_projects_falsely_where_the_policies_differ_only_in_what_is_kept() -> None:
    # Flat policies: the most likely ids of each are others, but neither has moved.
    flat = torch.zeros(ROWS, 1000, dtype=torch.float64)
    old, new = flat.clone(), flat.clone()
    old[:, :16] += 0.01
    new[:, -16:] += 0.01
    seen = probe.compare_policies(old, new, torch.full((ROWS,), 500), (16,))
    assert seen[names.OUTSIDE] == 0
    assert seen[of_k(16, "projected", "union")] == seen[of_k(16, "false", "union")] == 1
    assert seen[of_k(16, "projected", "anchored")] == 0
    assert seen[of_k(16, "cap_hits")] == 1


def test_anchored_misses_what_moves_among_the_rest() -> None:
    old = torch.zeros(ROWS, 1000, dtype=torch.float64)
    old[:, :16] += 1
    new = old.clone()
    new[:, 16:500] += 0.9
    new[:, 500:] -= 5
    new[:, :16] += (old[:, 16:].logsumexp(-1) - new[:, 16:].logsumexp(-1)).mul(-1)[:, None]
    seen = probe.compare_policies(old, new, torch.zeros(ROWS, dtype=torch.long), (16,))
    assert seen[names.OUTSIDE] == seen[of_k(16, "missed", "anchored")] == 1


# --- tasks and cells --------------------------------------------------------------------------------------------------


def test_tasks_have_names_of_their_own() -> None:
    assert len(NAMES) == len(TASKS) + len(PRETRAINED)
    assert set(pretrained.TASKS) <= set(PRETRAINED)


def test_a_pretrained_cell_trains_in_small_pieces() -> None:
    words = Cell("sums", "clip", 1e-5, 0, mini_batches=2, steps=12).overrides()
    last = dict(word.split("=", 1) for word in words)
    assert last["actor_rollout_ref.rollout.n"] == "8"
    assert last["actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu"] == "16"
    assert last["trainer.test_freq"] == "4"
    assert not any(word.startswith("+study.probe") for word in Cell("chain", "clip", 1e-4, 0).overrides())


# --- stages -----------------------------------------------------------------------------------------------------------


def line_of(cell: Cell, reward: float) -> results.Record:
    """A run whose samples, and held-out answers, are right this often after the start."""
    steps = range(4)
    metrics: dict[str, Any] = {"step": list(steps), "critic/score/mean": [None, 0.1, reward, reward]}
    metrics[results.held_out_key(cell.task)] = [0.1, None, reward, reward]
    metrics[names.GREEDY] = [0.2, None, reward, reward]
    metrics["actor/entropy"] = [None, 2.0, 1.5, 1.0]
    for name in names.probed(PROBED_K):
        metrics[name] = [None, None, 0.25, 0.75]
    run = {"key": cell.key, "task": cell.task, "arm": cell.loss, "status": "finished", "seconds": 600.0}
    run |= {"lr": cell.lr, "seed": cell.seed, "section": cell.regime, "cell": cell.to_json()}
    run["settings"] = {"kl_bound": 0.05} if cell.uses_troll else {}
    return {"run": run, "metrics": metrics}


def sweep(loss: str, rewards: dict[float, float]) -> results.Results:
    cells = [Cell(pretrained.TASK, loss, lr, pretrained.SWEEP_SEED, **pretrained.ONCE) for lr in rewards]
    return {cell.key: line_of(cell, rewards[cell.lr]) for cell in cells}


def test_no_rate_before_the_sweep_is_complete() -> None:
    low, middle, high = pretrained.RATES
    assert pretrained.best_rate(sweep("clip", {low: 0.3, middle: 0.5}), "clip", pretrained.ONCE) is None
    done = sweep("clip", {low: 0.3, middle: 0.5, high: 0.4})
    assert pretrained.best_rate(done, "clip", pretrained.ONCE) == middle
    assert [cell.lr for cell in pretrained.SECTIONS["pretrained_once"].cells(done)] == [middle] * 5


@pytest.mark.parametrize(("end", "next_to"), [(0, 0.5), (2, 2.0)])
def test_a_best_rate_at_the_end_of_the_range_extends_it(end: int, next_to: float) -> None:
    rates = pretrained.RATES
    rewards = {lr: 0.5 if lr == rates[end] else 0.3 for lr in rates}
    done = sweep("union", rewards)
    more = rates[end] * next_to
    assert pretrained.best_rate(done, "union", pretrained.ONCE) is None
    cells = pretrained.SECTIONS["pretrained_rates"].cells(done)
    assert [cell.lr for cell in cells if cell.loss == "union" and cell.key not in done] == [more]
    assert pretrained.best_rate(sweep("union", {**rewards, more: 0.4}), "union", pretrained.ONCE) == rates[end]


def test_the_extension_has_limits() -> None:
    rewards = {lr: lr for lr in pretrained.RATES}
    while (lr := max(rewards) * 2) <= pretrained.LIMITS[1]:
        rewards[lr] = lr
    assert pretrained.best_rate(sweep("none", rewards), "none", pretrained.ONCE) == max(rewards)


def test_main_seeds_took_no_part_in_the_choice_and_every_stage_has_cells() -> None:
    assert pretrained.SWEEP_SEED not in pretrained.SEEDS
    planned = pretrained.planned({})
    assert list(planned) == list(pretrained.SECTIONS)
    for name, cells in planned.items():
        assert cells, name
        assert len({cell.key for cell in cells}) == len(cells), name
        assert all(pretrained.seconds(cell, {}) > 0 for cell in cells)
    once = planned["pretrained_once"]
    assert {loss: sum(cell.loss == loss for cell in once) for loss in pretrained.ARMS} == {
        loss: 5 if loss in pretrained.FIVE_SEEDS else 3 for loss in pretrained.ARMS
    }
    assert {cell.old_policy for cell in planned["pretrained_stale"]} == {"behaviour", "rescored"}


def test_expected_time_is_that_of_runs_like_it() -> None:
    cell = Cell(pretrained.TASK, "clip", 1e-5, 0, **pretrained.ONCE)
    done = {cell.key: line_of(cell, 0.5)}
    assert pretrained.seconds(dataclasses.replace(cell, seed=1), done) == 600
    assert pretrained.seconds(Cell(pretrained.TASK, "clip", 1e-5, 0, **pretrained.OVERUSED), done) != 600


# --- tables and survey ------------------------------------------------------------------------------------------------


def test_take_off_is_the_first_step_with_enough_right_samples() -> None:
    line = line_of(Cell("sums", "clip", 1e-5, 0), 0.5)
    assert tables.take_off(line) == 2
    line["metrics"]["critic/score/mean"] = [None, 0.1, 0.1, 0.29]
    assert tables.take_off(line) is None


def test_tables_show_every_arm() -> None:
    lines = [line_of(Cell("sums", loss, 1e-5, s), 0.5 + 0.1 * s) for loss in ("clip", "union") for s in range(3)]
    text = "\n".join(tables.pretrained(lines))
    assert text.count("| union | 1e-5 |") == 3 + len(PROBED_K)
    assert "| clip | 1e-5 | 3 | .600 (.500 to .700) |" in text
    assert "2.00 1.50 1.00" in text
    assert "| union | 1e-5 | 64 | - | 50.00 |" in text


def test_tables_of_a_sweep_compare_at_equal_rates_in_their_order() -> None:
    rewards = {"clip": {1e-5: 0.4, 2e-5: 0.5}, "union": {1e-5: 0.6, 2e-5: 0.6, 5e-6: 0.3}}
    lines = [line for loss, found in rewards.items() for line in sweep(loss, found).values()]
    rows = [row.split(" | ") for row in tables.pretrained(lines) if row.startswith(("| clip", "| union"))]
    assert [row[1] for row in rows[:5]] == ["1e-5", "2e-5", "5e-6", "1e-5", "2e-5"]
    assert [row[4].strip() for row in rows[:5]] == ["", "", "", "+0.200", "+0.100"]


def test_mixed_groups_of_fewer_samples() -> None:
    assert survey.mixed_share([0, 8, 4, 1], 8, 8) == 0.5
    # Of 8 samples with one right, a group of 4 holds it half of the time.
    assert survey.mixed_share([1], 8, 4) == pytest.approx(0.5)
    assert survey.mixed_share([4], 8, 4) == pytest.approx(1 - 2 / math.comb(8, 4))


def test_survey_table() -> None:
    row = {"name": "sums, small", "form": "last number", "prompts": 32, "success": 0.126, "greedy": 0.5, "mixed": 0.6}
    row |= {"mixed_of_group": 0.4, "prompt_length": 16.2, "response_length": 15.1}
    row |= {"entropy": 2.345, "kept_mass": 0.9355}
    assert list(survey.table([{**row, "prompts": 8}, row]))[-1] == (
        "| sums, small | last number | 32 | 0.13 | 0.50 | 0.60 | 0.40 | 16 | 15 | 2.35 | 0.935 |"
    )
