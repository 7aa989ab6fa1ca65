"""A vocabulary split over ranks: every rank gets a single process's result, and sends what the table says."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed import vocab_scenarios as scenarios
from tests.distributed.launch import run_ranks

# One test per layout with all its kinds of logits, one for all drawn cases, and one per other case.
GROUPS = {
    group: tuple(name for name in scenarios.CASES if name == group or name.startswith(f"{group}-"))
    for group in [*scenarios.LAYOUTS, "drawn", *scenarios.SINGLE_CASES]
}


@pytest.fixture(scope="module", params=(1, 2, 3, 4), ids=lambda ranks: f"{ranks}-ranks")
def by_rank(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """All cases in one group of ranks: starting a group costs more than running a case."""
    return run_ranks(scenarios.run_cases, request.param, (tuple(scenarios.CASES),))


def assert_passed(by_rank: list[dict[str, Any]], cases: tuple[str, ...]) -> None:
    failures = []
    for case in cases:
        for rank, result in enumerate(by_rank):
            failures += [f"{case}, rank {rank}: {failure}" for failure in result[case][0]]
        if len({result[case][1] for result in by_rank}) > 1:
            failures.append(f"{case}: ranks disagree in some bit of their results")
    assert not failures, f"{len(failures)} failed checks:\n" + "\n".join(failures[:12])


@pytest.mark.parametrize("group", GROUPS)
def test_every_rank_gets_what_a_single_process_gets(by_rank: list[dict[str, Any]], group: str) -> None:
    assert_passed(by_rank, GROUPS[group])


def test_equal_policies_have_ratio_one_on_eight_ranks() -> None:
    # With five or more addends, torch's order of summation depends on their memory layout and the number of rows.
    assert_passed(run_ranks(scenarios.run_cases, 8, (("equal-policies",),)), ("equal-policies",))


def test_every_case_is_run() -> None:
    assert sorted(name for names in GROUPS.values() for name in names) == sorted(scenarios.CASES)
