"""Metrics against direct sums and maxima, and their aggregation over micro-batches and ranks."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from verl.utils.metric import AggregationType, Metric

from verl_troll.core.kernels.constants import STATISTICS
from verl_troll.plugin import metrics
from verl_troll.plugin.metrics import age_statistics, as_metrics, token_statistics

BOUND = 0.05
KL_BEFORE, KL_AFTER = STATISTICS.index("kl_before"), STATISTICS.index("kl_after")
UNCONVERGED = STATISTICS.index("unconverged")
STEP_SIZE = STATISTICS.index("step_size")
# Youngest and oldest of each share.
SHARES = {"0": (0, 0), "1": (1, 1), "2": (2, 2), "3_4": (3, 4), "5_8": (5, 8), "above_8": (9, math.inf)}


def statistics_of(tokens: int, seed: int = 0) -> Tensor:
    """``[12, tokens]``, as in the policy terms."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(len(STATISTICS), tokens, generator=generator, dtype=torch.float64)
    values[KL_AFTER] *= BOUND
    values[UNCONVERGED] = (values[UNCONVERGED] < 0.2).double()
    return values


def ages_of(tokens: int, seed: int = 0) -> Tensor:
    """``[tokens]``, from 0 to 12."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 13, (tokens,), generator=generator).float()


def sums_and_maxima(statistics: Tensor, ages: Tensor | None = None) -> tuple[list[float], list[float]]:
    terms: Any = SimpleNamespace(statistics=statistics)
    sums, maxima = (values.tolist() for values in token_statistics(terms))
    if ages is not None:
        own, oldest = (values.tolist() for values in age_statistics(ages))
        sums, maxima = sums + own, maxima + oldest
    return sums, maxima


def unusual(statistics: Tensor) -> list[float]:
    """Counts that add up over tokens, in the place of the loss's."""
    return [float((statistics[row] > 0.6).sum()) for row in (KL_BEFORE, STEP_SIZE)]


def metrics_of(
    statistics: Tensor, batch_num_tokens: int, dp_size: int = 1, ages: Tensor | None = None
) -> dict[str, Metric]:
    return as_metrics(*sums_and_maxima(statistics, ages), unusual(statistics), batch_num_tokens, dp_size, BOUND)


def values_of(statistics: Tensor, batch_num_tokens: int, ages: Tensor | None = None) -> dict[str, float]:
    return {name: metric.aggregate() for name, metric in metrics_of(statistics, batch_num_tokens, ages=ages).items()}


def direct_ages(ages: Tensor) -> dict[str, float]:
    own = ages.tolist()
    shares = {name: sum(low <= age <= high for age in own) / len(own) for name, (low, high) in SHARES.items()}
    return {
        "troll/age": math.fsum(own) / len(own),
        "troll/age_max": max(own),
        **{f"troll/age_{name}_share": share for name, share in shares.items()},
    }


def direct(statistics: Tensor) -> dict[str, float]:
    """All metrics over all tokens, by loops."""
    rows = dict(zip(STATISTICS, statistics.tolist(), strict=True))
    means = {f"troll/{name}": math.fsum(row) / len(row) for name, row in rows.items()}
    return {
        **means,
        "troll/unconverged": math.fsum(rows["unconverged"]),
        "troll/ratio_limited": sum(value > 0.6 for value in rows["kl_before"]),
        "troll/nonfinite": sum(value > 0.6 for value in rows["step_size"]),
        "troll/kl_before_max": max(rows["kl_before"]),
        "troll/kl_after_max": max(rows["kl_after"]),
        "troll/violation_max": max(0.0, max(rows["kl_after"]) / BOUND - 1),
    }


def test_sums_and_maxima_are_those_of_the_tokens() -> None:
    statistics = statistics_of(40)
    sums, (before, after) = sums_and_maxima(statistics)
    assert sums == pytest.approx([math.fsum(row) for row in statistics.tolist()], rel=1e-12)
    assert (before, after) == (max(statistics[KL_BEFORE].tolist()), max(statistics[KL_AFTER].tolist()))


def test_statistics_carry_no_gradient() -> None:
    terms: Any = SimpleNamespace(statistics=statistics_of(3).requires_grad_())
    assert not any(values.requires_grad for values in token_statistics(terms))


def test_one_micro_batch_is_the_direct_computation() -> None:
    statistics = statistics_of(40)
    assert values_of(statistics, 40) == pytest.approx(direct(statistics), rel=1e-12)


def test_ages_are_beside_the_others() -> None:
    statistics, ages = statistics_of(40), ages_of(40)
    expected = {**direct(statistics), **direct_ages(ages)}
    assert all(expected[f"troll/age_{name}_share"] > 0 for name in SHARES)
    assert values_of(statistics, 40, ages) == pytest.approx(expected, rel=1e-12)


def test_a_token_of_unknown_age_is_in_no_share() -> None:
    ages = ages_of(40)
    ages[7] = math.nan
    seen = values_of(statistics_of(40), 40, ages)
    assert math.isnan(seen["troll/age"]) and math.isnan(seen["troll/age_max"])
    shares = {name: sum(low <= age <= high for age in ages.tolist()) / 40 for name, (low, high) in SHARES.items()}
    assert {name: seen[f"troll/age_{name}_share"] for name in SHARES} == pytest.approx(shares)
    assert sum(shares.values()) == pytest.approx(39 / 40)


def test_every_metric_is_described() -> None:
    table = re.findall(r"^    (\w+(?:, \w+)*)  ", metrics.__doc__ or "", re.MULTILINE)
    described = {f"troll/{name}" for names in table for name in names.split(", ")}
    assert described == set(values_of(statistics_of(1), 1, ages_of(1)))


def test_a_micro_batch_without_tokens_adds_nothing() -> None:
    empty, ages = statistics_of(0), ages_of(0)
    assert {value for values in sums_and_maxima(empty, ages) for value in values} == {0.0}
    for batch_num_tokens in (0, 40):
        assert set(values_of(empty, batch_num_tokens, ages).values()) == {0.0}


def test_micro_batches_and_ranks_add_up_to_the_mini_batch() -> None:
    statistics, ages = statistics_of(37, seed=1), ages_of(37, seed=1)
    sizes = [9, 0, 11, 4, 13, 0]
    cuts = list(zip(statistics.split(sizes, dim=1), ages.split(sizes), strict=True))
    ranks = []
    for own in (cuts[:3], cuts[3:]):
        first, *others = (metrics_of(cut, 37, dp_size=2, ages=part) for cut, part in own)
        for other in others:
            for name, metric in other.items():
                first[name].extend(metric)
        ranks.append(first)
    whole = {name: Metric.aggregate_dp([rank[name] for rank in ranks]) for name in ranks[0]}
    assert whole == pytest.approx({**direct(statistics), **direct_ages(ages)}, rel=1e-12)


def test_maxima_are_taken_and_the_rest_is_added() -> None:
    for name, metric in metrics_of(statistics_of(3), 3, ages=ages_of(3)).items():
        assert metric.aggregation is (AggregationType.MAX if name.endswith("_max") else AggregationType.SUM), name


@pytest.mark.parametrize(("excess", "expected"), [(-0.5, 0.0), (0.0, 0.0), (0.2, 0.2)])
def test_a_violation_is_the_excess_over_the_bound(excess: float, expected: float) -> None:
    statistics = statistics_of(5)
    statistics[KL_AFTER] = 0.4 * BOUND
    statistics[KL_AFTER, 2] = BOUND * (1 + excess)
    assert values_of(statistics, 5)["troll/violation_max"] == pytest.approx(expected, abs=1e-12)


def test_nan_stays_visible() -> None:
    statistics = statistics_of(5)
    statistics[[KL_BEFORE, KL_AFTER], 3] = math.nan
    seen = metrics_of(statistics, 10)
    for name, metric in metrics_of(statistics_of(5, seed=2), 10).items():
        seen[name].extend(metric)
    lost = {name for name, metric in seen.items() if math.isnan(metric.aggregate())}
    assert lost == {
        "troll/kl_before",
        "troll/kl_after",
        "troll/kl_before_max",
        "troll/kl_after_max",
        "troll/violation_max",
    }
