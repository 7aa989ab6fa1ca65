"""``verl-troll report``: its statistics against references, what it reads, what it refuses, and the page."""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import os
import random
import re
import statistics as plain
import sys
import tempfile
import tracemalloc
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import bootstrap

from benchmarks.attack import launchers
from benchmarks.attack.report import KINDS, LEFT_OUT, NOTED, Kind, _event
from benchmarks.processes import run
from verl_troll.plugin.settings import TrollConfig
from verl_troll.tools import cli
from verl_troll.tools.report import statistics, tables
from verl_troll.tools.report.comparison import TaskComparison, compare, final_success
from verl_troll.tools.report.errors import ReportError
from verl_troll.tools.report.figures import PANELS, Picture, pictures, printable, rate_text
from verl_troll.tools.report.logs import description, json_lines, points
from verl_troll.tools.report.metrics import (
    DISTINCT_ANSWERS,
    ENTROPY,
    GRAD_NORM,
    KL_AFTER_MAX,
    KL_BEFORE,
    SHOWN,
    held_out_keys,
)
from verl_troll.tools.report.read import read_runs
from verl_troll.tools.report.runs import Run, Series
from verl_troll.tools.report.statistics import (
    area_under_curve,
    diverged,
    held_to,
    mean_curve,
    mean_interval,
    paired_difference,
    stable_range,
    steps_to,
    tail_mean,
    why_diverged,
)

HELD_OUT = "val-core/chain/acc/mean@8"
VALUES = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=12)


def make_run(arm: str = "union", seed: int | None = 0, lr: float | None = None, **fields: Any) -> Run:
    """A run whose held-out success is ``success``, measured every 5 steps."""
    success: Sequence[float] = fields.pop("success", (0.2, 0.5, 0.6))
    steps = tuple(5 * index for index in range(len(success)))
    metrics = {HELD_OUT: Series(steps, tuple(success)), **fields.pop("metrics", {})}
    base = {"task": "chain", "status": "", "settings": {}}
    return Run(arm=arm, seed=seed, lr=lr, metrics=metrics, **{**base, **fields})


def collected(
    arm: str, seed: Any, success: Sequence[float | None], metrics: Mapping[str, Any] | None = None, **run: Any
) -> str:
    """One line of a file of collected runs."""
    steps = list(range(0, 5 * len(success), 5))
    described = {"task": "chain", "arm": arm, "seed": seed, "status": "finished", "settings": {}, **run}
    return json.dumps({"run": described, "metrics": {"step": steps, HELD_OUT: list(success), **(metrics or {})}})


def logged(*steps: tuple[int, Mapping[str, Any]]) -> str:
    """Contents of verl's file logger."""
    return "".join(json.dumps({"step": step, "data": data}) + "\n" for step, data in steps)


def only(comparisons: Sequence[TaskComparison]) -> TaskComparison:
    """The single comparison."""
    (comparison,) = comparisons
    return comparison


def refuse_to_warn(text: str) -> None:
    """Fail on a warning, for complete logs."""
    raise AssertionError(text)


class TestStatistics:
    def test_interval_is_scipys_percentile_bootstrap(self) -> None:
        values = [0.61, 0.58, 0.7, 0.66, 0.49]
        found = mean_interval(values)
        expected = bootstrap((values,), np.mean, n_resamples=9999, method="percentile", rng=0).confidence_interval
        assert found.mean == pytest.approx(plain.fmean(values))
        assert (found.low, found.high) == (expected.low, expected.high)
        assert found.count == 5
        assert found == mean_interval(values)

    @pytest.mark.parametrize("values", [[0.5], [0.5, 0.9]])
    def test_no_interval_with_fewer_than_three(self, values: list[float]) -> None:
        found = mean_interval(values)
        assert (found.low, found.high, found.count) == (None, None, len(values))
        assert not found.excludes(-1.0)

    def test_equal_values_have_an_interval_without_width(self, recwarn: pytest.WarningsRecorder) -> None:
        found = mean_interval([0.1] * 7)
        assert (found.mean, found.low, found.high) == (0.1, 0.1, 0.1)
        assert not recwarn.list

    @given(VALUES)
    @settings(max_examples=40, deadline=None)
    def test_interval_holds_the_mean_and_stays_within_the_values(self, values: list[float]) -> None:
        found = mean_interval(values)
        slack = 1e-9 * (1 + max(map(abs, values)))
        assert min(values) - slack <= found.mean <= max(values) + slack
        if found.low is not None and found.high is not None:
            assert min(values) - slack <= found.low <= found.high <= max(values) + slack

    def test_coverage_is_what_the_page_says(self) -> None:
        # The page says about 83 % for five normal values; over 300 repetitions one standard error is 2.2 %.
        rng = random.Random(0)
        covered = 0
        for _ in range(300):
            found = mean_interval([rng.gauss(0, 1) for _ in range(5)])
            covered += not found.excludes(0.0)
        assert 0.76 < covered / 300 < 0.90

    @pytest.mark.parametrize(("values", "message"), [([], "got none"), ([0.1, math.nan], "got nan")])
    def test_mean_refuses_what_it_cannot_average(self, values: list[float], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            mean_interval(values)

    def test_pairs_only_common_seeds(self) -> None:
        found = paired_difference({0: 0.5, 1: 0.7, 2: 0.6, 9: 100.0}, {0: 0.4, 1: 0.7, 2: 0.8, 7: -100.0})
        assert found.interval.mean == pytest.approx((0.1 + 0.0 - 0.2) / 3)
        assert found.interval.count == 3
        assert (found.wins, found.ties, found.losses) == (1, 1, 1)

    def test_pairs_need_a_common_seed(self) -> None:
        with pytest.raises(ValueError, match=r"no seed is common: \[0\] and \[1\]"):
            paired_difference({0: 0.5}, {1: 0.5})

    def test_pairs_of_one_sign_exclude_zero(self) -> None:
        better = paired_difference(dict(enumerate((0.5, 0.6, 0.7))), dict(enumerate((0.4, 0.3, 0.69))))
        mixed = paired_difference(dict(enumerate((0.5, 0.6, 0.7))), dict(enumerate((0.4, 0.8, 0.6))))
        assert better.interval.excludes(0.0)
        assert not mixed.interval.excludes(0.0)

    def test_area_by_hand(self) -> None:
        # (0 + 1) / 2 * 10 + (1 + 0.5) / 2 * 30 = 27.5 over 40 steps.
        assert area_under_curve([0, 10, 40], [0.0, 1.0, 0.5]) == pytest.approx(27.5 / 40)
        assert area_under_curve([7], [0.3]) == 0.3

    @settings(deadline=None)
    @given(st.lists(st.tuples(st.integers(1, 9), st.floats(0, 1)), min_size=2, max_size=9))
    def test_area_is_numpys_trapezoid(self, points: list[tuple[int, float]]) -> None:
        steps = np.cumsum([width for width, _ in points])
        values = [value for _, value in points]
        expected = np.trapezoid(values, steps) / (steps[-1] - steps[0])
        assert area_under_curve(steps.tolist(), values) == pytest.approx(expected)

    @pytest.mark.parametrize(
        ("steps", "values", "message"),
        [([0, 0], [1.0, 1.0], "increase"), ([0], [1.0, 2.0], "1 and 2"), ([], [], "none"), ([0], [math.inf], "inf")],
    )
    def test_area_refuses(self, steps: list[int], values: list[float], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            area_under_curve(steps, values)

    def test_steps_to_a_threshold(self) -> None:
        assert steps_to(0.5, [0, 5, 10], [0.2, 0.5, 0.4]) == 5
        assert steps_to(0.51, [0, 5, 10], [0.2, 0.5, 0.4]) is None

    @pytest.mark.parametrize(
        ("run", "reason"),
        [
            (make_run(status="diverged"), "status diverged"),
            (make_run(success=(0.4, 0.5, 0.19)), "held-out success fell from 0.400 to 0.190"),
            (make_run(success=(0.4, 0.1, 0.2)), ""),
            (make_run(success=(0.0, 0.0)), ""),
            (make_run(success=(0.3, math.nan, 0.3)), "held-out success not finite at step 5"),
            (
                make_run(metrics={GRAD_NORM: Series((1, 2), (1.0, math.inf))}),
                "actor/grad_norm not finite at step 2",
            ),
            (make_run(metrics={"rollout_corr/kl": Series((1,), (math.nan,))}), ""),
            (make_run(status="finished"), ""),
        ],
    )
    def test_diverged(self, run: Run, reason: str) -> None:
        assert why_diverged(run) == reason
        assert diverged(run) == bool(reason)

    def test_stable_range_by_hand(self) -> None:
        found = stable_range({1e-5: 0.80, 1e-4: 0.72, 1e-3: 0.719, 1e-6: 0.3})
        assert (found.best_rate, found.best_success, found.tested) == (1e-5, 0.80, 4)
        assert found.rates == (1e-5, 1e-4)
        assert found.ratio == pytest.approx(10)

    def test_stable_range_ends_at_a_gap(self) -> None:
        assert stable_range({1e-5: 0.8, 1e-4: 0.1, 1e-3: 0.8}).rates == (1e-5,)

    def test_stable_range_of_no_success_is_empty(self) -> None:
        found = stable_range({1e-5: 0.0, 1e-4: 0.0})
        assert (found.rates, found.ratio) == ((), 0.0)

    @settings(deadline=None)
    @given(st.dictionaries(st.floats(1e-7, 1e-1), st.floats(0, 1), min_size=1, max_size=6))
    def test_stable_range_holds_the_best_and_only_what_is_good_enough(self, success: dict[float, float]) -> None:
        found = stable_range(success)
        assert found.best_success == max(success.values())
        assert all(success[rate] >= 0.9 * found.best_success - 1e-9 for rate in found.rates)
        assert (found.best_rate in found.rates) == (found.best_success > 0)

    def test_tail_is_the_last_tenth(self) -> None:
        assert tail_mean([0.0] * 18 + [1.0, 3.0]) == 2.0
        assert tail_mean([4.0, 5.0]) == 5.0

    def test_curve_has_the_interval_of_each_step(self) -> None:
        runs = [Series((0, 1), (value, 2 * value)) for value in (0.1, 0.4, 0.2)] + [Series((1, 2), (0.5, math.nan))]
        curve = mean_curve(runs)
        first, second = mean_interval([0.1, 0.4, 0.2]), mean_interval([0.2, 0.8, 0.4, 0.5])
        assert curve.steps == (0, 1)
        assert curve.mean == pytest.approx((first.mean, second.mean))
        assert curve.low == pytest.approx((first.low, second.low))
        assert curve.high == pytest.approx((first.high, second.high))

    def test_run_that_ended_early_is_held_only_where_asked(self) -> None:
        runs = [Series((0, 5, 10), (0.0, 0.4, 0.6)), Series((0, 5), (0.0, 0.2))]
        assert mean_curve(runs).mean == pytest.approx((0.0, 0.3, 0.6))
        assert mean_curve(runs, hold=True).mean == pytest.approx((0.0, 0.3, 0.4))
        assert held_to(runs[1], 10) == Series((0, 5, 10), (0.0, 0.2, 0.2))


class TestReading:
    def test_file_logger_with_its_configuration(self, tmp_path: Path) -> None:
        folder = tmp_path / "some-name-seed4"
        (folder / "hydra" / ".hydra").mkdir(parents=True)
        (folder / "metrics.jsonl").write_text(
            logged(
                (0, {HELD_OUT: 0.2, "val-core/lists/acc/mean@8": 0.4}),
                (1, {"actor/entropy": 0.5, "actor/grad_norm": None, "note": "text"}),
                (2, {"actor/entropy": 0.4, HELD_OUT: 0.6}),
            )
        )
        (folder / "hydra" / ".hydra" / "config.yaml").write_text(
            'actor_rollout_ref:\n  rollout: {seed: 7, name: "${x}"}\n  actor:\n    optim: {lr: 1.0e-05}\n'
            "    policy_loss: {loss_mode: troll, troll: {kl_bound: 0.05, support: anchored}}\n"
            "data: {seed: 3}\n"
        )
        (run,) = read_runs([folder], refuse_to_warn)
        assert (run.arm, run.seed, run.lr, run.task) == ("troll anchored", 3, 1e-5, "chain, lists")
        assert run.kl_bound() == 0.05
        assert run.metric("actor/entropy") == Series((1, 2), (0.5, 0.4))
        assert math.isnan(run.metric("actor/grad_norm").values[0])
        assert diverged(run)
        # Step 2 has only one of the two data sources.
        assert run.held_out().steps == (0,)
        assert run.held_out().values == pytest.approx((0.3,))

    def test_clipping_has_no_bound_and_a_seed_in_the_path_beats_verls_default(self, tmp_path: Path) -> None:
        folder = tmp_path / "x-seed4"
        (folder / ".hydra").mkdir(parents=True)
        (folder / "metrics.jsonl").write_text(logged((1, {"actor/entropy": 0.5})))
        (folder / ".hydra" / "config.yaml").write_text(
            "actor_rollout_ref:\n  rollout: {seed: 42}\n"
            "  actor: {policy_loss: {loss_mode: vanilla, troll: {kl_bound: 1}}}\n"
            "data: {seed: null}\n"
        )
        (run,) = read_runs([folder / "metrics.jsonl"], refuse_to_warn)
        assert (run.arm, run.seed, run.lr, run.kl_bound()) == ("vanilla", 4, None, None)

    @pytest.mark.parametrize(
        ("path", "expected"),
        [
            ("union-lr1e-4-seed3/metrics.jsonl", ("union", 3, 1e-4)),
            ("anchored/seed_12/metrics.jsonl", ("anchored", 12, None)),
            ("lr0.001/none-seed0.jsonl", ("none", 0, 1e-3)),
            ("plain.jsonl", ("plain", None, None)),
        ],
    )
    def test_names_from_the_path(
        self, tmp_path: Path, path: str, expected: tuple[str, int | None, float | None]
    ) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(logged((1, {"actor/entropy": 0.5})))
        (run,) = read_runs([tmp_path / path], refuse_to_warn)
        if expected[2] is not None and path.startswith("lr"):
            # The arm is parsed before the folder with the rate.
            expected = (expected[0], expected[1], None)
        assert (run.arm, run.seed, run.lr) == expected

    def test_tensorboard(self, tmp_path: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(tmp_path / "union-seed2" / "tensorboard")) as writer:
            for step in range(0, 1200, 2):
                writer.add_scalar("actor/entropy", 1 / (step + 1), step)
            writer.add_scalar(HELD_OUT, 0.25, 0)
            writer.add_scalar("actor/grad_norm", math.nan, 4)
        (run,) = read_runs([tmp_path], refuse_to_warn)
        assert (run.arm, run.seed, run.kind) == ("union", 2, "TensorBoard")
        # Every point is kept, although TensorBoard itself samples.
        assert run.metric("actor/entropy").steps == tuple(range(0, 1200, 2))
        assert run.metric("actor/entropy").values[1] == pytest.approx(1 / 3)
        assert run.held_out() == Series((0,), (0.25,))
        assert why_diverged(run) == "actor/grad_norm not finite at step 4"

    def test_interrupted_tensorboard_keeps_what_was_written(self, tmp_path: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(tmp_path)) as writer:
            for step in range(10):
                writer.add_scalar("actor/entropy", step, step)
        (file,) = tmp_path.glob("*tfevents*")
        file.write_bytes(file.read_bytes()[:-7])
        said: list[str] = []
        (run,) = read_runs([f"union={file}"], said.append)
        assert run.metric("actor/entropy").steps == tuple(range(9))
        assert len(said) == 1
        assert said[0].startswith(f"{file}: the last record is incomplete")

    def test_collected_file(self, tmp_path: Path) -> None:
        file = tmp_path / "study.jsonl"
        extra = {"actor/entropy": [None, 0.5, math.nan]}
        run_settings = {"troll": {"kl_bound": 0.1}}
        line = collected("union", 3, (0.2, None, 0.6), extra, lr=1e-4, section="rates", settings=run_settings)
        file.write_text(f"{line}\n\n{collected('vanilla', 3, (0.2, 0.4))}\n")
        first, second = read_runs([file], refuse_to_warn)
        assert (first.task, first.arm, first.seed, first.lr) == ("chain", "union", 3, 1e-4)
        assert (first.section, first.status, first.kl_bound()) == ("rates", "finished", 0.1)
        assert first.held_out() == Series((0, 10), (0.2, 0.6))
        assert first.metric("actor/entropy").steps == (5, 10)
        assert why_diverged(first) == "actor/entropy not finite at step 10"
        assert second.arm == "vanilla"

    def test_distinct_answers_may_have_any_prefix(self, tmp_path: Path) -> None:
        file = tmp_path / "metrics.jsonl"
        file.write_text(logged((1, {"mine/distinct_answers": 0.5, "mine/actor/entropy": 0.1})))
        (run,) = read_runs([file], refuse_to_warn)
        assert run.metric(DISTINCT_ANSWERS) == Series((1,), (0.5,))
        assert not run.metric(ENTROPY)
        file.write_text(logged((1, {"mine/distinct_answers": "many"})))
        with pytest.raises(ReportError, match=r":1: mine/distinct_answers must be a number, got 'many'"):
            read_runs([file], refuse_to_warn)

    def test_folder_is_searched_and_other_files_are_left_out(self, tmp_path: Path) -> None:
        (tmp_path / "a-seed0").mkdir()
        (tmp_path / "a-seed0" / "metrics.jsonl").write_text(logged((1, {"actor/entropy": 0.5})))
        (tmp_path / "a-seed0" / "1.jsonl").write_text('{"input": "2+2", "output": "4"}\n')
        (tmp_path / "b-seed0").mkdir()
        (tmp_path / "b-seed0" / "metrics.jsonl").write_text("")
        said: list[str] = []
        (run,) = read_runs([tmp_path], said.append)
        assert run.arm == "a"
        assert len(said) == 2
        assert "1.jsonl is left out" in said[0]
        assert "holds no step" in said[1]

    def test_damaged_last_line_is_skipped_and_named(self, tmp_path: Path) -> None:
        file = tmp_path / "metrics.jsonl"
        file.write_text(logged((1, {"actor/entropy": 0.5})) + '{"step": 2, "data": {"actor/ent')
        said: list[str] = []
        (run,) = read_runs([file], said.append)
        assert run.metric("actor/entropy").steps == (1,)
        assert len(said) == 1
        assert said[0].startswith(f"{file}:2: the last line is damaged")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (logged((1, {})) + "{\n" + logged((3, {})), r":2: not JSON"),
            (logged((1, {})) + '{"step": "two", "data": {}}\n', r":2: expected \{'step'"),
            (logged((1, {"actor/entropy": "high"})), r":1: actor/entropy must be a number, got 'high'"),
            ('{"other": 1}\n', r":1: a line has either .* got \['other'\]"),
            (collected("union", 0, (0.1,)) + "\n" + logged((1, {})), r":2: expected \{'run'"),
            (collected("union", 0, (0.1,), {"x": [1, 2]}) + "\n", r":1: metrics\['x'\] .* 1 values.*got 2 values"),
            (collected("union", 0, (0.1,), {"x": ["1.0x"]}) + "\n", r":1: metrics\['x'\] at step 0 .* got '1.0x'"),
            (collected("union", 0, (0.1,), {"step": [1.5]}) + "\n", r":1: metrics.step"),
            (collected("", 0, (0.1,)) + "\n", r":1: run.arm must be a string, got ''"),
            (collected("union", "0", (0.1,)) + "\n", r":1: run.seed .* got '0'"),
            (collected("union", 0, (0.1,), lr=-1) + "\n", r":1: run.lr .* got -1"),
            (collected("union", 0, (0.1,), task=3) + "\n", r":1: run.task must be a string, got 3"),
        ],
    )
    def test_damage_elsewhere_names_file_and_line(self, tmp_path: Path, content: str, message: str) -> None:
        file = tmp_path / "metrics.jsonl"
        file.write_text(content)
        with pytest.raises(ReportError, match=re.escape(str(file)) + message):
            read_runs([file], refuse_to_warn)

    def test_name_given_to_an_arm(self, tmp_path: Path) -> None:
        file = tmp_path / "a=b-seed1.jsonl"
        file.write_text(logged((1, {"actor/entropy": 0.5})))
        assert read_runs([file], refuse_to_warn)[0].arm == "a=b"
        assert read_runs([f"mine={file}"], refuse_to_warn)[0].arm == "mine"
        with pytest.raises(ReportError, match="NAME=PATH"):
            read_runs([f"={file}"], refuse_to_warn)
        with pytest.raises(ReportError, match="'gone' does not exist"):
            read_runs(["mine=gone"], refuse_to_warn)

    def test_the_later_of_two_equal_descriptions_counts(self, tmp_path: Path) -> None:
        first, second = tmp_path / "1.jsonl", tmp_path / "2.jsonl"
        first.write_text(collected("union", 0, (0.1,)) + "\n" + collected("union", 0, (0.3,), lr=1.0) + "\n")
        second.write_text(
            collected("union", 0, (0.2,)) + "\n" + collected("union", 0, (0.4,), settings={"k": 1}) + "\n"
        )
        said: list[str] = []
        runs = read_runs([first, second], said.append)
        assert [run.held_out().values[0] for run in runs] == [0.3, 0.2, 0.4]
        assert len(said) == 1
        assert "arm 'union', seed 0, task 'chain' was read before" in said[0]
        assert str(first) in said[0] and str(second) in said[0]

    def test_equal_descriptions_in_one_file_are_not_told_to_name_their_paths(self, tmp_path: Path) -> None:
        file = tmp_path / "runs.jsonl"
        file.write_text(collected("union", 0, (0.1,)) + "\n" + collected("union", 0, (0.2,)) + "\n")
        said: list[str] = []
        read_runs([file], said.append)
        assert "give the fields that tell them apart" in said[0]
        assert "NAME=PATH" not in said[0]

    def test_most_samples_of_each_data_source(self) -> None:
        metrics = dict.fromkeys(
            (
                "val-core/openai/gsm8k/acc/mean@4",
                "val-core/openai/gsm8k/acc/mean@16",
                "val-core/chain/reward/mean@4",
                "val-core/chain/reward/best@4/mean",
                "val-aux/chain/score/mean@4",
            )
        )
        found = held_out_keys(metrics)
        assert found == {"chain": "val-core/chain/reward/mean@4", "openai/gsm8k": "val-core/openai/gsm8k/acc/mean@16"}


class TestHostileFiles:
    @pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
    def test_each_is_left_out_noted_or_read(self, tmp_path: Path, kind: Kind) -> None:
        (tmp_path / "good.jsonl").write_text(collected("good", 0, (0.1, 0.2)) + "\n")
        (tmp_path / "hostile").mkdir()
        hostile = tmp_path / "hostile" / kind.file
        kind.make(hostile)
        notes, faults = list[str](), list[str]()
        runs = read_runs([tmp_path], notes.append, faults.append)
        assert runs[0].arm == "good"
        assert len(faults) == (kind.expected == LEFT_OUT)
        assert len(notes) >= (kind.expected == NOTED)
        assert all(str(tmp_path / "hostile") in text for text in notes + faults)
        assert all(len(text) < 1000 and text.isprintable() for text in notes + faults)
        if faults:
            with pytest.raises(ReportError) as error:
                read_runs([hostile], notes.append)
            # How the parser words that it is too deep depends on where it was called.
            if "RecursionError" not in faults[0]:
                assert str(error.value).replace("'", "") == faults[0].replace("'", "")

    def test_damage_is_on_the_page_and_in_the_exit_status(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = study(tmp_path, ["vanilla"], rates=[1e-4])
        damaged = tmp_path / "damaged.jsonl"
        damaged.write_text("{\n" + logged((1, {})))
        out = tmp_path / "report.html"
        long = "x" * 5000
        assert cli.main(["report", str(file), str(damaged), "gone", "", long, f"{long}=", "--out", str(out)]) == 1
        said = capsys.readouterr()
        words = "".join(Page(out.read_text(encoding="utf-8")).words)
        assert "Left out, because it could not be read: 5 inputs" in words
        for text in (f"{damaged}:1: not JSON", "'gone' does not exist", "File name too long", "NAME=PATH"):
            assert text in said.err
            assert text in words
        assert "5 left out" in said.out
        assert max(map(len, said.err.splitlines())) < 1000

    def test_long_name_of_an_arm(self, tmp_path: Path) -> None:
        file = study(tmp_path, ["vanilla"])
        assert {run.arm for run in read_runs([f"{'x' * 5000}={file}"], refuse_to_warn)} == {"x" * 5000}

    def test_what_may_not_be_read_as_another_user(self, tmp_path: Path) -> None:
        if os.geteuid() != 0:
            pytest.skip("needs root to become another user")
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            folder.chmod(0o755)
            (folder / "good.jsonl").write_text(collected("good", 0, (0.1,)) + "\n")
            for part, make in (("secret.jsonl", Path.touch), ("closed", Path.mkdir), ("run/.hydra", Path.mkdir)):
                (folder / part).parent.mkdir(exist_ok=True)
                make(folder / part)
                (folder / part).chmod(0)
            (folder / "run" / "metrics.jsonl").write_text(logged((0, {HELD_OUT: 0.5})))
            faults: list[str] = []
            os.seteuid(65534)
            try:
                (found,) = read_runs([folder], refuse_to_warn, faults.append)
            finally:
                os.seteuid(0)
        assert found.arm == "good"
        for part in ("secret.jsonl cannot be read", "closed cannot be searched", "config.yaml cannot be read"):
            assert any(f"{part}: Permission denied" in fault for fault in faults)

    def test_a_page_that_cannot_be_written(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        file = study(tmp_path, ["vanilla"], rates=[1e-4])
        with launchers.small_disk(tmp_path / "disk", 64 * 1024) as disk:
            if disk is None:
                pytest.skip("needs the right to mount")
            assert cli.main(["report", str(file), "--out", str(disk / "report.html")]) == 2
        assert "cannot be written: No space left on device" in capsys.readouterr().err
        (tmp_path / "taken-figures").touch()
        assert cli.main(["report", str(file), "--out", str(tmp_path / "taken.html")]) == 2
        assert "taken-figures' cannot be written: File exists" in capsys.readouterr().err

    def test_a_name_that_is_not_utf8(self, tmp_path: Path) -> None:
        study(tmp_path, ["vanilla"], rates=[1e-4])
        program = "import sys; from verl_troll.tools import cli; sys.exit(cli.main(sys.argv[1:]))"
        folder = Path(os.fsdecode(bytes(tmp_path) + b"/\xff"))
        folder.mkdir()
        done = run(
            [sys.executable, "-c", program, "report", tmp_path / "study.jsonl", "--out", folder / "report.html"],
            env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
        )
        assert done.returncode == 0, done.stderr
        assert "\\udcff" in done.stdout

    def test_more_arms_than_a_page_can_show(self) -> None:
        with pytest.raises(ReportError, match=r"^501 arms, .* 500 of a page"):
            compare([make_run(f"arm {number}") for number in range(501)])

    def test_restarted_tensorboard_drops_what_it_replaces(self, tmp_path: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(tmp_path)) as writer:
            for step in range(10):
                writer.add_scalar(HELD_OUT, 0.1, step, new_style=step % 2 == 0)
        with SummaryWriter(str(tmp_path), purge_step=5, filename_suffix=".later") as writer:
            writer.add_scalar(HELD_OUT, 0.2, 5, new_style=True)
        (found,) = read_runs([tmp_path], refuse_to_warn)
        assert found.held_out().steps == tuple(range(6))
        assert found.held_out().values == pytest.approx([0.1] * 5 + [0.2])

    def test_the_other_event_files_of_a_folder_are_read(self, tmp_path: Path) -> None:
        (tmp_path / "events.out.tfevents.1").write_bytes(_event(0, HELD_OUT, 0.5))
        (tmp_path / "events.out.tfevents.2").symlink_to("gone")
        faults: list[str] = []
        (found,) = read_runs([tmp_path], refuse_to_warn, faults.append)
        assert found.held_out() == Series((0,), (0.5,))
        assert faults == [f"{tmp_path}/events.out.tfevents.2 is a link to what does not exist"]

    def test_resumed_log_keeps_the_later_value_of_a_step(self, tmp_path: Path) -> None:
        file = tmp_path / "metrics.jsonl"
        steps = ((0, 0.1), (5, 0.2), (10, 0.3), (5, 0.4), (7, 0.5))
        file.write_text(logged(*((step, {HELD_OUT: value}) for step, value in steps)))
        (found,) = read_runs([file], refuse_to_warn)
        assert found.held_out() == Series((0, 5, 7, 10), (0.1, 0.4, 0.5, 0.3))


def scalars(
    folder: Path, steps: Sequence[int], value: float, *, at: float, suffix: str = "", name: str = HELD_OUT
) -> str:
    """Write an event file, one step a second from ``at`` on; returns its name."""
    from torch.utils.tensorboard import SummaryWriter

    before = set(folder.glob("*tfevents*"))
    with mock.patch("time.time", return_value=at), SummaryWriter(str(folder), filename_suffix=suffix) as writer:
        for number, step in enumerate(steps):
            writer.add_scalar(name, value, step, walltime=at + number)
    (file,) = set(folder.glob("*tfevents*")) - before
    return file.name


def values(run: Run) -> list[float]:
    """Held-out success, step after step."""
    return [round(value, 3) for value in run.held_out().values]


class TestSeveralRunsInOnePlace:
    def test_two_runs_in_a_tensorboard_folder_are_two(self, tmp_path: Path) -> None:
        folder = tmp_path / "union-seed2"
        files = [scalars(folder, range(5), 0.1, at=1000), scalars(folder, range(3), 0.2, at=2000)]
        said: list[str] = []
        first, second = read_runs([folder], said.append)
        assert (first.arm, values(first)) == ("union, earlier run", [0.1] * 5)
        assert (second.arm, values(second)) == ("union", [0.2] * 3)
        assert (first.seed, second.seed) == (2, 2)
        assert first.source.endswith(files[0])
        assert len(said) == 1
        assert f"{folder} holds 2 runs: {files[0]}; {files[1]}." in said[0]
        # A name for the folder does not make them one again.
        assert [run.arm for run in read_runs([f"mine={folder}"], said.append)] == ["mine, earlier run", "mine"]

    @pytest.mark.parametrize("start", [6, 10], ids=["inside the former's range", "right after it"])
    def test_a_resumed_run_is_one(self, tmp_path: Path, start: int) -> None:
        scalars(tmp_path, range(10), 0.1, at=1000)
        scalars(tmp_path, range(start, 14), 0.2, at=2000)
        (run,) = read_runs([tmp_path], refuse_to_warn)
        assert values(run) == [0.1] * start + [0.2] * (14 - start)

    def test_a_run_resumed_twice_from_an_earlier_checkpoint_is_one(self, tmp_path: Path) -> None:
        scalars(tmp_path, range(10), 0.1, at=1000)
        scalars(tmp_path, range(5, 9), 0.2, at=2000)
        scalars(tmp_path, range(5, 12), 0.3, at=3000)
        (run,) = read_runs([tmp_path], refuse_to_warn)
        assert values(run) == [0.1] * 5 + [0.3] * 7

    def test_concurrent_runs_are_two_whatever_their_steps(self, tmp_path: Path) -> None:
        # The second was started from a checkpoint of the first, which went on.
        scalars(tmp_path, range(10), 0.1, at=1000)
        scalars(tmp_path, range(5, 12), 0.2, at=1003)
        first, second = read_runs([tmp_path], lambda text: None)
        assert (values(first), values(second)) == ([0.1] * 10, [0.2] * 7)

    def test_a_resumption_of_either_of_two_runs_is_refused_by_name(self, tmp_path: Path) -> None:
        scalars(tmp_path, range(10), 0.1, at=1000, suffix=".a")
        scalars(tmp_path, range(10), 0.2, at=1001, suffix=".b")
        name = scalars(tmp_path, range(6, 14), 0.3, at=2000)
        with pytest.raises(ReportError, match=rf"{name} may resume the run of .*\.a or .*\.b"):
            read_runs([tmp_path], refuse_to_warn)

    def test_of_runs_one_after_the_other_the_last_is_resumed(self, tmp_path: Path) -> None:
        files = [
            scalars(tmp_path, steps, 0.1 * number, at=1000.0 * number)
            for number, steps in enumerate((range(10), range(3), range(10), range(8, 12)), 1)
        ]
        said: list[str] = []
        runs = read_runs([tmp_path], said.append)
        assert [values(run) for run in runs] == [[0.1] * 10, [0.2] * 3, [0.3] * 8 + [0.4] * 4]
        assert [run.arm for run in runs][:2] == [f"{runs[2].arm}, earlier run {number}" for number in (1, 2)]
        assert f"holds 3 runs: {files[0]}; {files[1]}; {files[2]}, {files[3]}." in said[0]

    def test_a_crashed_start_without_steps_is_no_run(self, tmp_path: Path) -> None:
        scalars(tmp_path, (), 0.1, at=1000)
        scalars(tmp_path, range(3), 0.2, at=2000)
        scalars(tmp_path, (), 0.3, at=3000)
        scalars(tmp_path, range(3, 5), 0.4, at=4000)
        (run,) = read_runs([tmp_path], refuse_to_warn)
        assert values(run) == [0.2] * 3 + [0.4] * 2

    def test_what_was_not_written_before_a_crash_is_named(self, tmp_path: Path) -> None:
        scalars(tmp_path, range(5), 0.1, at=1000)
        scalars(tmp_path, range(8, 10), 0.2, at=2000)
        said: list[str] = []
        (run,) = read_runs([tmp_path], said.append)
        assert run.held_out().steps == (0, 1, 2, 3, 4, 8, 9)
        assert len(said) == 1
        assert "begins at step 8" in said[0] and "ends at step 4" in said[0]

    def test_steps_of_metrics_that_are_not_shown_count(self, tmp_path: Path) -> None:
        scalars(tmp_path, range(5), 0.1, at=1000)
        scalars(tmp_path, range(5, 20), 0.1, at=2000, name="timing_s/other")
        scalars(tmp_path, (20,), 0.2, at=3000)
        (run,) = read_runs([tmp_path], refuse_to_warn)
        assert run.held_out().steps == (*range(5), 20)

    def test_joined_logs_are_two_runs(self, tmp_path: Path) -> None:
        file = tmp_path / "union-seed1.jsonl"
        rows = [(step, {HELD_OUT: 0.1}) for step in range(4)] + [(step, {HELD_OUT: 0.2}) for step in range(3)]
        file.write_text(logged(*rows))
        said: list[str] = []
        first, second = read_runs([file], said.append)
        assert (first.arm, values(first)) == ("union, earlier run", [0.1] * 4)
        assert (second.arm, values(second)) == ("union", [0.2] * 3)
        assert len(said) == 1
        assert f"{file} holds 2 runs" in said[0]

    def test_a_joined_run_may_begin_with_another_metric_or_step(self, tmp_path: Path) -> None:
        file = tmp_path / "metrics.jsonl"
        rows = [(step, {"actor/entropy": 0.1}) for step in (1, 2, 3)]
        file.write_text(logged(*rows, (0, {HELD_OUT: 0.2}), (1, {"actor/entropy": 0.2})))
        first, second = read_runs([file], lambda text: None)
        assert not first.held_out()
        assert second.held_out() == Series((0,), (0.2,))
        assert second.metric("actor/entropy") == Series((1,), (0.2,))

    def test_several_lines_of_a_step_are_one_run(self, tmp_path: Path) -> None:
        # As verl's fully asynchronous trainer writes them.
        file = tmp_path / "metrics.jsonl"
        rows: list[tuple[int, Mapping[str, Any]]] = []
        for step in range(5):
            rows += [(step, {"timing_s/step": 1.0}), (step, {"actor/entropy": 0.5}), (step, {HELD_OUT: 0.5})]
        file.write_text(logged(*rows))
        (run,) = read_runs([file], refuse_to_warn)
        assert run.held_out().steps == tuple(range(5))

    def test_two_runs_that_write_to_one_log_are_refused(self, tmp_path: Path) -> None:
        file = tmp_path / "metrics.jsonl"
        file.write_text(logged(*((step, {HELD_OUT: value}) for step in range(9) for value in (0.1, 0.2))))
        with pytest.raises(ReportError, match="two runs wrote to it at once"):
            read_runs([file], refuse_to_warn)


DUMP = {"input": "2+2", "output": "4", "gts": "4", "score": 1.0, "step": 1}
FOREIGN = {
    "a rollout dump": (json.dumps(DUMP) + "\n").encode() * 5,
    "a dump with fields of verl's names": (json.dumps({"step": 1, "data": DUMP}) + "\n").encode() * 5,
    "a dump of numbers": b'{"step": 1, "data": {"score": 1.0, "length": 7}}\n' * 5,
    "a dump of named steps": b'{"step": "warm-up", "data": {"score": 1.0}}\n' * 5,
    "a dump of text": b'{"step": 1, "data": "2+2"}\n' * 5,
    "another tool's runs": b'{"run": "x7", "metrics": {"loss": 1}}\n' * 5,
    "rows of a list": b"[1, 2]\n" * 5,
    "JSON over several lines": json.dumps([DUMP, DUMP], indent=1).encode(),
    "a table": b"step,score\n1,0.5\n2,0.5\n",
    "binary": bytes(range(256)) * 40,
}


class TestForeignFiles:
    @pytest.mark.parametrize("content", FOREIGN.values(), ids=list(FOREIGN))
    def test_each_is_skipped_with_a_line_that_names_it(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "metrics.jsonl").write_text(logged((1, {HELD_OUT: 0.5})))
        foreign = tmp_path / "1.jsonl"
        foreign.write_bytes(content)
        for arguments in ([tmp_path], [tmp_path / "metrics.jsonl", foreign]):
            said: list[str] = []
            faults: list[str] = []
            (run,) = read_runs(arguments, said.append, faults.append)
            assert run.source.endswith("metrics.jsonl")
            assert not faults
            assert [text for text in said if text.startswith(f"{foreign} is left out")] == said
            assert len(said) == 1
        with pytest.raises(ReportError, match=re.escape(str(foreign))):
            read_runs([foreign], refuse_to_warn)

    def test_the_exit_status_is_0(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        file = study(tmp_path, ["vanilla"], rates=[1e-4])
        files = [tmp_path / name for name in ("1.jsonl", "validation.json", "samples.csv")]
        for foreign in files:
            foreign.write_text(json.dumps(DUMP) + "\n")
        out = tmp_path / "report.html"
        assert cli.main(["report", str(file), *map(str, files), "--out", str(out)]) == 0
        said = capsys.readouterr().err
        assert all(f"{foreign} is left out" in said for foreign in files)

    @pytest.mark.parametrize("line", [DUMP, {"step": 1, "data": {"score": 1.0}}], ids=["dump", "numbers"])
    def test_a_long_one_is_not_read_as_a_whole(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: Mapping[str, Any]
    ) -> None:
        foreign = tmp_path / "1.jsonl"
        foreign.write_text((json.dumps(line) + "\n") * 5000)
        parsed = 0
        loads = json.loads

        def counted(text: bytes) -> Any:
            nonlocal parsed
            parsed += 1
            return loads(text)

        monkeypatch.setattr(json, "loads", counted)
        with pytest.raises(ReportError, match="a line has either"):
            read_runs([foreign], refuse_to_warn)
        assert parsed <= json_lines.HEAD_LINES

    def test_a_first_line_that_is_too_long_is_foreign_unless_it_begins_as_a_log(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(json_lines, "MAX_LINE_BYTES", 1000)
        (tmp_path / "good.jsonl").write_text(logged((1, {HELD_OUT: 0.5})))
        for name, content in (("a.jsonl", json.dumps([DUMP] * 100)), ("b.jsonl", logged((1, {"m" * 2000: 0.5})))):
            (tmp_path / name).write_text(content)
        said: list[str] = []
        faults: list[str] = []
        read_runs([tmp_path], said.append, faults.append)
        assert [text.split(" is left out")[0] for text in said] == [str(tmp_path / "a.jsonl")]
        assert len(faults) == 1
        assert "b.jsonl:1: a line of more than" in faults[0]

    def test_many_in_a_folder_are_named_in_one_line(self, tmp_path: Path) -> None:
        (tmp_path / "metrics.jsonl").write_text(logged((1, {HELD_OUT: 0.5})))
        (tmp_path / "rollouts").mkdir()
        for step in range(1, 31):
            (tmp_path / "rollouts" / f"{step:02}.jsonl").write_text(json.dumps(DUMP) + "\n")
        said: list[str] = []
        read_runs([tmp_path], said.append)
        assert len(said) == 1
        assert said[0].startswith(f"{tmp_path / 'rollouts'}: 01.jsonl, 02.jsonl, 03.jsonl and 27 more are left out")

    def test_a_log_without_a_metric_of_the_report_is_no_run(self, tmp_path: Path) -> None:
        (tmp_path / "metrics.jsonl").write_text(logged((1, {HELD_OUT: 0.5})))
        other = tmp_path / "other.jsonl"
        other.write_text(logged((1, {"timing_s/part": 0.5})))
        said: list[str] = []
        (run,) = read_runs([tmp_path], said.append)
        assert run.source.endswith("metrics.jsonl")
        assert said == [f"{other} holds no metric that the report shows"]


class TestLargeFiles:
    def test_memory_does_not_grow_with_what_is_not_shown(self, tmp_path: Path) -> None:
        file = tmp_path / "metrics.jsonl"
        other = {f"timing_s/part{number}": 0.123456789 for number in range(500)}
        file.write_text(logged(*((step, {HELD_OUT: 0.5, **other}) for step in range(1000))))
        size = file.stat().st_size
        tracemalloc.start()
        try:
            (found,) = read_runs([file], refuse_to_warn)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert len(found.held_out().steps) == 1000
        assert size > 10 * 2**20
        assert peak < size / 10

    def test_a_line_without_an_end_is_not_read_as_a_whole(self, tmp_path: Path) -> None:
        file = tmp_path / "metrics.jsonl"
        with file.open("wb") as stream:
            stream.truncate(2**40)
        with pytest.raises(ReportError, match=r":1: a line of more than 32 MiB is not read"):
            read_runs([file], refuse_to_warn)

    @pytest.mark.parametrize(
        ("module", "limit", "message"),
        [(points, "MAX_VALUES", "values of the metrics"), (json_lines, "MAX_RUNS", "runs")],
    )
    def test_limits_of_a_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: ModuleType, limit: str, message: str
    ) -> None:
        file = tmp_path / "runs.jsonl"
        file.write_text("".join(collected("a", seed, (0.1, 0.2)) + "\n" for seed in range(5)))
        monkeypatch.setattr(module, limit, 3)
        with pytest.raises(ReportError, match=f"has more than 3 {message}"):
            read_runs([file], refuse_to_warn)

    def test_long_curves_are_drawn_at_some_steps_and_keep_the_largest(self) -> None:
        steps = tuple(range(5000))
        spike = tuple(9.0 if step == 1234 else 0.1 for step in steps)
        runs = [
            make_run(seed=seed, metrics={name: Series(steps, spike) for name in (ENTROPY, KL_AFTER_MAX)})
            for seed in range(3)
        ]
        found = drawn(only(compare(runs)))
        (curve, *_) = found["entropy"].figure.axes[0].lines
        assert (len(curve.get_xdata()), curve.get_xdata()[0], curve.get_xdata()[-1]) == (1000, 0, 4999)
        (largest, *_) = found["kl-largest"].figure.axes[0].lines
        assert len(largest.get_xdata()) == 1000
        assert max(largest.get_ydata()) == 9.0

    def test_intervals_in_parts_are_the_same(self, monkeypatch: pytest.MonkeyPatch) -> None:
        dice = random.Random(0)
        runs = [Series(tuple(range(20)), tuple(dice.random() for _ in range(20))) for _ in range(4)]
        whole = mean_curve(runs)
        monkeypatch.setattr(statistics, "_MAX_RESAMPLED", 4 * statistics.RESAMPLES)
        assert mean_curve(runs) == whole


class TestComparison:
    def test_best_rate_baseline_and_threshold(self) -> None:
        runs = [
            make_run(arm, seed, rate, success=(0.2, top - 0.1, top + 0.01 * seed))
            for arm, rate, top in (("union", 1e-4, 0.6), ("union", 1e-3, 0.8), ("clip", 1e-4, 0.5), ("clip", 1e-3, 0.3))
            for seed in range(3)
        ]
        comparison = only(compare(runs))
        assert comparison.baseline == "clip"
        assert {arm: cell.rate for arm, cell in comparison.best.items()} == {"clip": 1e-4, "union": 1e-3}
        assert comparison.threshold == pytest.approx((0.2 + 0.81) / 2)
        assert comparison.stable_ranges()["union"].rates == (1e-3,)
        (pairing,) = comparison.at_best_rates()
        assert pairing.final is not None
        assert pairing.final.interval.mean == pytest.approx(0.3)
        assert [pairing.cell.rate for pairing in comparison.at_equal_rates()] == [1e-4, 1e-3]

    def test_runs_that_never_reach_the_threshold_are_counted(self) -> None:
        runs = [make_run(seed=seed, success=(0.1, 0.2, top)) for seed, top in enumerate((0.9, 0.8, 0.3))]
        table = tables.success(only(compare(runs, threshold=0.7)))
        assert table is not None
        row = dict(zip(table.headings, table.rows[0], strict=True))
        assert row["Reached it"].text == "2 of 3"
        assert row["Steps to 0.700"].text == "10.0"
        assert row["Final"].text == "0.667"

    def test_run_that_ended_early_keeps_its_last_value(self) -> None:
        comparison = only(compare([make_run(success=(0.2, 0.4, 0.6)), make_run(seed=1, success=(0.2, 0.4))]))
        assert comparison.area(comparison.runs[0]) == pytest.approx(0.4)
        assert comparison.area(comparison.runs[1]) == pytest.approx(0.35)
        assert [run.seed for run in comparison.ended_early()] == [1]

    def test_settings_tell_arms_apart_and_sections_are_not_mixed(self) -> None:
        runs = [
            make_run(settings={"kl_bound": 0.05}),
            make_run(settings={"kl_bound": 0.1}),
            make_run("vanilla", settings={"kl_bound": 1}),
        ]
        assert list(only(compare(runs)).best) == ["vanilla", "union, kl_bound=0.05", "union, kl_bound=0.1"]
        parts = compare([make_run(section="rates"), make_run(section="main")])
        assert [(part.section, len(part.runs)) for part in parts] == [("rates", 1), ("main", 1)]

    def test_unknown_baseline(self) -> None:
        with pytest.raises(ReportError, match="--baseline 'clip' is no arm of these runs: give one of 'union'"):
            compare([make_run()], baseline="clip")

    def test_runs_without_a_seed_are_averaged_but_not_paired(self) -> None:
        comparison = only(compare([make_run(seed=None), make_run(seed=None), make_run("vanilla")]))
        assert len(comparison.best["union"].runs) == 2
        assert tables.paired(comparison) is None

    def test_paired_table_marks_what_excludes_zero(self) -> None:
        runs = [
            make_run(arm, seed, success=(0.2, top + 0.01 * seed * seed))
            for arm, top in (("vanilla", 0.5), ("union", 0.6))
            for seed in range(4)
        ]
        runs += [make_run("none", seed, success=(0.2, 0.5 + 0.1 * (-1) ** seed)) for seed in range(4)]
        table = tables.paired(only(compare(runs)))
        assert table is not None
        assert {row[0].text: (row[2].strong, "excludes 0" in row[2].below) for row in table.rows} == {
            "union": (True, True),
            "none": (False, False),
        }
        assert table.rows[0][3].text == "4 / 0 / 0"
        assert any("no correction for multiple comparisons" in note for note in table.notes)


def full_metrics(seed: int, bounded: bool) -> dict[str, list[float]]:
    """All metrics that the report reads, at three steps."""
    rng = random.Random(seed)
    names = [*SHOWN, HELD_OUT]
    metrics = {name: [rng.uniform(0.1, 0.9) for _ in range(3)] for name in names}
    metrics[KL_AFTER_MAX] = [0.049] * 3
    if not bounded:
        metrics = {name: values for name, values in metrics.items() if not name.startswith("troll/")}
    return metrics


def study(folder: Path, arms: Sequence[str], seeds: int = 3, rates: Sequence[float] = (1e-4, 3e-4)) -> Path:
    """A file of collected runs with every metric."""
    lines = []
    for arm in arms:
        for rate in rates:
            for seed in range(seeds):
                bounded = arm != "vanilla"
                metrics = full_metrics(seed, bounded)
                success = metrics.pop(HELD_OUT)
                run_settings = {"kl_bound": 0.05} if bounded else {}
                lines.append(collected(arm, seed, success, metrics, lr=rate, settings=run_settings))
    file = folder / "study.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return file


class Page(HTMLParser):
    """Parses what the tests need from a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def drawn(comparison: TaskComparison) -> dict[str, Picture]:
    """Pictures by name."""
    return {picture.name: picture for group in pictures(comparison)[0].values() for picture in group}


class TestFigures:
    def test_bound_is_drawn_and_said(self, tmp_path: Path) -> None:
        comparison = only(compare(read_runs([study(tmp_path, ["vanilla", "union"])], refuse_to_warn)))
        found = drawn(comparison)
        for name in ("kl-largest", "kl-mean"):
            (axes,) = found[name].figure.axes
            levels = [tuple(line.get_ydata()) for line in axes.lines]
            assert levels.count((0.05, 0.05)) == 1
            low, high = axes.get_ylim()
            assert low < 0.05 < high
            assert axes.get_yscale() == "log"
            assert "bound of 0.05 nats" in found[name].caption
        assert "union" in found["kl-largest"].gist and "0.0490 after" in found["kl-largest"].gist

    def test_no_bound_where_none_is_known(self) -> None:
        comparison = only(compare([make_run(metrics={KL_BEFORE: Series((1, 2), (0.1, 0.2))})]))
        picture = drawn(comparison)["kl-mean"]
        (axes,) = picture.figure.axes
        assert len(axes.lines) == 1
        assert "no bound" in picture.gist

    def test_arms_differ_in_colour_line_and_marker(self, tmp_path: Path) -> None:
        arms = ["vanilla", "none", "union", "anchored", "e"]
        comparison = only(compare(read_runs([study(tmp_path, arms, rates=[1e-4])], refuse_to_warn)))
        (axes,) = drawn(comparison)["held-out-success"].figure.axes
        for look in ("get_color", "get_marker"):
            assert len({getattr(line, look)() for line in axes.lines}) == len(arms)
        assert len({str(line._unscaled_dash_pattern) for line in axes.lines}) == len(arms)
        assert len(axes.collections) == len(arms)

    def test_every_panel_is_drawn_or_named_absent(self, tmp_path: Path) -> None:
        comparison = only(compare(read_runs([study(tmp_path, ["vanilla", "union"])], refuse_to_warn)))
        assert set(drawn(comparison)) == {panel.name for panel in PANELS}
        groups, absent = pictures(only(compare([make_run()])))
        assert [picture.name for group in groups.values() for picture in group] == ["held-out-success"]
        assert absent == [panel.needs for panel in PANELS if panel.name != "held-out-success"]

    @pytest.mark.parametrize(
        ("text", "shown"),
        [
            ("union", "union"),
            ("_hidden", " _hidden"),
            ("a\nb\x00", "a b?"),
            ("\u6f22", "?"),
            ("$x^{", "$x^{"),
            ("é", "é"),
        ],
    )
    def test_labels(self, text: str, shown: str) -> None:
        assert printable(text) == shown

    def test_long_labels_keep_both_ends(self) -> None:
        assert len(printable("a" * 200 + "z")) <= 52
        assert printable("a" * 200 + "z").endswith("z")

    def test_rates(self) -> None:
        assert [rate_text(rate) for rate in (1e-4, 3e-5, 2.5e-3, 0.0, 1.0)] == ["1e-4", "3e-5", "2.5e-3", "0", "1e0"]


class TestPage:
    def test_end_to_end(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        study(tmp_path, ["vanilla", "union"])
        monkeypatch.chdir(tmp_path)
        assert cli.main(["report", "study.jsonl", "--out", "page.html", "--threshold", "0.5"]) == 0
        assert "12 runs; 14 pictures in page-figures" in capsys.readouterr().out
        text = Path("page.html").read_text(encoding="utf-8")
        page = Page(text)
        assert page.all("html") == [{"lang": "en"}]
        words = "".join(page.words)
        assert "vanilla vs. union" in words
        assert "Command: verl-troll report study.jsonl --out page.html --threshold 0.5" in words
        assert "Steps to 0.500" in words
        assert str(tmp_path) not in text
        images = page.all("img")
        assert len(images) == 14
        assert len(page.all("caption")) == len(page.all("table")) >= 6
        files = {file.read_bytes() for file in Path("page-figures").glob("*.png")}
        for image in images:
            source, alternative = image["src"], image["alt"]
            assert source is not None and alternative is not None
            head, _, data = source.partition(",")
            assert head == "data:image/png;base64"
            assert base64.b64decode(data) in files
            assert re.search(r"\d", alternative)
        # The same runs produce the same page.
        assert cli.main(["report", "study.jsonl", "--out", "page.html", "--threshold", "0.5"]) == 0
        assert Path("page.html").read_text(encoding="utf-8") == text

    def test_page_is_self_contained(self, tmp_path: Path) -> None:
        out = tmp_path / "report.html"
        assert cli.main(["report", str(study(tmp_path, ["vanilla", "union"])), "--out", str(out)]) == 0
        text = out.read_text(encoding="utf-8")
        page = Page(text)
        assert not re.search(r"https?:|@import|url\(", text)
        assert not [tag for tag, _ in page.tags if tag in ("script", "link", "iframe", "object", "base", "form")]
        for _, attributes in page.tags:
            assert (attributes.get("src") or "data:").startswith("data:")
            assert (attributes.get("href") or "#").startswith("#")
            assert not [name for name in attributes if name.startswith("on") or name == "srcset"]

    def test_hostile_names_are_text(self, tmp_path: Path) -> None:
        arms = [
            "<script>alert(1)</script>",
            '"><img src=http://x onerror=y>',
            "$\\frac{$",
            "_private",
            "{{ 7*7 }}",
            "\ud800 \u6f22\n%s",
            "x" * 300,
            "&amp;",
        ]
        out = tmp_path / "report.html"
        file = study(tmp_path, arms, rates=[1e-4])
        lines = file.read_text().replace('"task": "chain"', '"task": "<b>task</b>\\u202e"')
        file.write_text(lines)
        assert cli.main(["report", str(file), "--out", str(out)]) == 0
        page = Page(out.read_text(encoding="utf-8"))
        assert not page.all("script") and not page.all("b")
        assert all((image["src"] or "").startswith("data:") for image in page.all("img"))
        words = "".join(page.words)
        for arm in arms[:5]:
            assert arm in words
        assert "&amp;" in page.words

    def test_missing_metrics_and_single_runs(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        file = tmp_path / "alone.jsonl"
        file.write_text(logged((1, {"timing_s/step": 2.0}), (2, {"timing_s/step": 3.0})))
        out = tmp_path / "report.html"
        assert cli.main(["report", str(file), "--out", str(out)]) == 0
        words = "".join(Page(out.read_text(encoding="utf-8")).words)
        assert "held-out success (val-core/*/mean@*)" in words
        assert "paired differences (there is only one arm)" in words
        assert "No interval for fewer than three runs: alone." in words
        assert "1 run, 1 arm." in words

    def test_what_was_left_out_is_on_the_page_and_on_stderr(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = study(tmp_path, ["vanilla"])
        file.write_text(file.read_text() + '{"run": {"ar')
        out = tmp_path / "report.html"
        assert cli.main(["report", str(file), "--out", str(out)]) == 0
        note = f"{file}:7: the last line is damaged"
        assert note in capsys.readouterr().err
        assert note in "".join(Page(out.read_text(encoding="utf-8")).words)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["gone.jsonl"], "'gone.jsonl' does not exist"),
            (["."], "no run in ."),
            (["study/study.jsonl", "--baseline", "ppo"], "--baseline 'ppo' is no arm"),
            (["study/study.jsonl", "--out", "study"], "--out 'study' is a folder"),
            (["study/study.jsonl", "--out", "gone/report.html"], "'gone' does not exist"),
        ],
    )
    def test_refusals(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        arguments: list[str],
        message: str,
    ) -> None:
        if arguments != ["."]:
            (tmp_path / "study").mkdir()
            study(tmp_path / "study", ["vanilla"])
        monkeypatch.chdir(tmp_path)
        assert cli.main(["report", *arguments]) == 2
        assert message in capsys.readouterr().err
        assert not Path("report.html").exists()

    def test_threshold_must_be_a_number(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            cli.main(["report", "x", "--threshold", "nan"])
        assert "'nan' is not a finite number" in capsys.readouterr().err

    def test_missing_package_says_what_to_install(self, tmp_path: Path) -> None:
        program = (
            "import sys; sys.modules['scipy'] = sys.modules['matplotlib'] = None\n"
            "import importlib.util as u; real = u.find_spec\n"
            "u.find_spec = lambda name: None if name in ('scipy', 'matplotlib') else real(name)\n"
            "from verl_troll.tools import cli; sys.exit(cli.main(['report', 'x']))"
        )
        done = run([sys.executable, "-c", program])
        assert done.returncode == 2
        assert "scipy, matplotlib not installed: pip install 'verl_troll[report]'" in done.stderr

    def test_command_line_stays_light(self) -> None:
        program = (
            "import sys; from verl_troll.tools import cli\n"
            "print([m for m in ('matplotlib', 'scipy', 'pandas', 'tensorboard', 'jinja2', 'yaml') if m in sys.modules])"
        )
        done = run([sys.executable, "-c", program], check=True)
        assert done.stdout.strip() == "[]"


def test_final_success_is_the_last_finite_one() -> None:
    assert final_success(make_run(success=(0.2, 0.6, math.nan))) == 0.6
    assert statistics.CONFIDENCE == 0.95


def test_every_setting_that_changes_what_is_learned_tells_arms_apart() -> None:
    changes_nothing = {"_target_", "reuse_logits", "kernels", "host"}
    assert {field.name for field in dataclasses.fields(TrollConfig)} - changes_nothing <= description.SETTINGS.keys()
