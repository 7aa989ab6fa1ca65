"""The study's trainer: matches verl's own, and no run depends on earlier runs in the same processes."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.processes import Tree
from benchmarks.study import names
from benchmarks.study.cells import Cell
from benchmarks.study.pool import SessionProcess, environment
from benchmarks.study.prepare import fill
from benchmarks.study.results import held_out_key
from benchmarks.study.tasks import TASKS

pytestmark = pytest.mark.trainer

CHANGES_WITH_TIME = ("timing", "perf/", "actor/perf/", "critic/perf/")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The task ``chain`` after part of its warm start."""
    folder = tmp_path_factory.mktemp("tasks") / "chain"
    folder.mkdir()
    fill(dataclasses.replace(TASKS["chain"], warm_start_steps=150), folder)
    return folder.parent


@pytest.fixture(scope="module")
def train(tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Cell], list[dict[str, Any]]]]:
    """Trains a cell in processes shared by all cells of its kind; returns one row per step."""
    scratch = tmp_path_factory.mktemp("cells")
    sessions: dict[Any, SessionProcess] = {}

    def run(cell: Cell) -> list[dict[str, Any]]:
        if cell.session not in sessions:
            sessions[cell.session] = SessionProcess(cell.session, scratch / f"session-{len(sessions)}.log")
        metrics = scratch / "metrics.jsonl"
        sessions[cell.session].run(cell, tasks, metrics)
        return read(metrics)

    yield run
    for session in sessions.values():
        session.end()


def read(metrics: Path) -> list[dict[str, Any]]:
    """Rows of verl's file logger, without clock-dependent values."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [
        {"step": row["step"]}
        | {name: value for name, value in row["data"].items() if not name.startswith(CHANGES_WITH_TIME)}
        for row in rows
    ]


def test_a_run_does_not_depend_on_those_before_it(train: Callable[[Cell], list[dict[str, Any]]]) -> None:
    cell = Cell("chain", "union", lr=1e-3, seed=0, steps=6)
    first = train(cell)
    other = train(Cell("chain", "anchored", lr=3e-3, seed=1, mini_batches=4, epochs=2, steps=3, staleness=1))
    assert other[1] != first[1]
    assert train(cell) == first
    assert any(row.get("troll/projected_share", 0) > 0 for row in first)


def test_equals_verl_own_trainer(train: Callable[[Cell], list[dict[str, Any]]], tasks: Path, tmp_path: Path) -> None:
    # One mini-batch, since verl orders samples within a batch at random.
    cell = Cell("chain", "clip", lr=1e-3, seed=0, mini_batches=1, steps=3)
    ours = train(cell)
    metrics = tmp_path / "metrics.jsonl"
    words = [word for word in cell.overrides(tasks) if not word.startswith("+study.")]
    log = tmp_path / "log"
    command = [sys.executable, "-m", "verl.trainer.main_ppo", f"hydra.run.dir={tmp_path / 'hydra'}", *words]
    variables = environment() | {"VERL_FILE_LOGGER_PATH": str(metrics)}
    with (
        log.open("wb") as stream,
        Tree(command, cwd=tmp_path, env=variables, stdout=stream, stderr=subprocess.STDOUT) as tree,
    ):
        assert tree.wait((log, metrics)) == 0, log.read_text(errors="replace")[-4000:]
    theirs = read(metrics)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    # verl's reward manager also calls the score "acc", and prefers that name.
    assert ours[0][held_out_key("chain")] == theirs[0]["val-core/chain/acc/mean@1"] > 0
    assert ours[1]["critic/score/mean"] == theirs[1]["critic/score/mean"] > 0
    for mine, reference in zip(ours[1:], theirs[1:], strict=True):
        for name in ("actor/entropy", "actor/grad_norm", "critic/score/mean", "response_length/mean"):
            assert mine[name] == pytest.approx(reference[name], rel=1e-3), name


def test_stale_samples(train: Callable[[Cell], list[dict[str, Any]]]) -> None:
    rows = {
        old_policy: train(Cell("chain", "union", lr=3e-3, seed=0, steps=5, staleness=2, old_policy=old_policy))[1:]
        for old_policy in ("rescored", "behaviour")
    }
    lag, gap = "training/off_policy/trajectory_staleness/mean", "training/rollout_probs_diff_max"
    for steps in rows.values():
        # The first samples generated ahead all come from the initial weights.
        assert [row[lag] for row in steps] == [0, 1, 2, 2, 2]
    # The old policy is either the one that sampled, or one whose weights have changed since.
    assert all(row[gap] < 1e-5 for row in rows["behaviour"])
    assert all(row[gap] > 1e-3 for row in rows["rescored"][1:])


def test_greedy_evaluation_and_the_probe_do_not_change_a_run(train: Callable[[Cell], list[dict[str, Any]]]) -> None:
    cell = Cell("chain", "union", lr=1e-3, seed=0, steps=6, staleness=1, old_policy="behaviour")
    rows = train(dataclasses.replace(cell, settings=("+study.greedy=True", "+study.probe=[4,64]")))
    own = {names.GREEDY, *names.probed((4, 64))}
    assert [{name: value for name, value in row.items() if name not in own} for row in rows] == train(cell)
    assert [row["step"] for row in rows if names.GREEDY in row] == [0, 5, 6]
    probed = [row for row in rows if names.KL in row]
    assert [row["step"] for row in probed] == [5, 6]
    for row in probed:
        assert own <= set(row)
        assert row[names.KL] > 0
        # The 64 most likely ids are nearly all of this task's mass.
        assert row[names.of_k(64, "kept_mass")] > 0.99
        for support in names.SUPPORTS:
            seen, false, missed = (row[names.of_k(64, what, support)] for what in ("projected", "false", "missed"))
            assert seen - false + missed == pytest.approx(row[names.OUTSIDE])


def test_the_regression_alone(train: Callable[[Cell], list[dict[str, Any]]]) -> None:
    # With one update per batch the new policy is the old one, and there is nothing to regress.
    once: dict[str, Any] = {"lr": 1e-3, "seed": 0, "mini_batches": 1, "steps": 2}
    clip, regressed = (train(Cell("chain", loss, **once))[1:] for loss in ("clip", "clip_regression"))
    for mine, reference in zip(regressed, clip, strict=True):
        assert mine["troll/regression_loss"] == 0
        for name in ("actor/entropy", "actor/grad_norm", "actor/pg_loss", "critic/score/mean"):
            assert mine[name] == pytest.approx(reference[name], rel=1e-3, abs=1e-6), name
    for loss in ("clip_regression", "dppo_kl_regression"):
        row = train(Cell("chain", loss, lr=3e-3, seed=0, mini_batches=2, epochs=4, steps=1))[1]
        assert row["troll/regression_loss"] > 0


@pytest.mark.slow
def test_a_critic_starts_over(train: Callable[[Cell], list[dict[str, Any]]]) -> None:
    cell = Cell("chain", "union", lr=1e-3, seed=0, estimator="ppo", steps=3)
    first = train(cell)
    assert train(cell) == first
    assert first[1]["critic/grad_norm"] > 0
