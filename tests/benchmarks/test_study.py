"""The study's grid, its results file and its choice rule; its trainer is tested in ``tests/trainer/test_study.py``."""

from __future__ import annotations

import dataclasses
import json
import math
import threading
from pathlib import Path
from typing import Any, ClassVar

import orjson
import pytest
from hydra import compose, initialize_config_module

from benchmarks.study import grid, pool, results
from benchmarks.study.__main__ import main
from benchmarks.study.cells import DEVICES, Cell
from benchmarks.study.pool import Pool, SessionError
from benchmarks.study.tables import by_arm, entropy_by_rate
from verl_troll.tools.report.metrics import DISTINCT_ANSWERS
from verl_troll.tools.report.read import read_runs

CELL = Cell("chain", "union", lr=2e-4, seed=0)


def line_of(cell: Cell, final: float) -> results.Record:
    """A result with the given final success."""
    success = [0.3, None, final, final]
    run = {"key": cell.key, "task": cell.task, "status": "finished", "seconds": 60.0, "cell": cell.to_json()}
    return {"run": run, "metrics": {"step": [0, 1, 2, 3], results.held_out_key(cell.task): success}}


# --- cells ------------------------------------------------------------------------------------------------------------


def test_a_cell_survives_the_file() -> None:
    cell = dataclasses.replace(CELL, settings=("troll.alpha=0.1",), staleness=2)
    again = Cell.from_json(json.loads(json.dumps(cell.to_json())))
    assert again == cell
    assert again.key == cell.key


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"lr": 3e-4},
        {"settings": ("troll.alpha=0",)},
        {"epochs": 2},
        {"prompts": 64},
        {"trainer": "separate_async"},
    ],
)
def test_different_cells_have_different_keys(change: dict[str, Any]) -> None:
    assert dataclasses.replace(CELL, **change).key != CELL.key


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"task": "chess"}, "task='chess'"),
        ({"loss": "trol"}, "loss='trol'"),
        ({"mini_batches": 3}, "mini_batches=3"),
        ({"mini_batches": 32}, "the 16 prompts of a step"),
        ({"prompts": 0}, "the 0 prompts of a step"),
        ({"old_policy": "old"}, "old_policy='old'"),
        ({"trainer": "mine"}, "trainer='mine'"),
        ({"lr": 0.0}, "lr must be above 0"),
    ],
)
def test_what_cannot_be_run_is_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        dataclasses.replace(CELL, **change)


def test_larger_steps_have_as_many_optimizer_steps_and_are_evaluated_as_often_per_prompt(tmp_path: Path) -> None:
    for prompts, steps, test_freq in ((16, 40, 5), (64, 10, 1), (128, 5, 1)):
        cell = dataclasses.replace(CELL, prompts=prompts, mini_batches=prompts // 2, steps=steps)
        overrides = cell.overrides(tmp_path)
        assert cell.steps * cell.mini_batches == 320
        for setting in (
            f"data.train_batch_size={prompts}",
            "actor_rollout_ref.actor.ppo_mini_batch_size=2",
            "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=16",
            f"actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu={8 * prompts}",
            f"trainer.test_freq={test_freq}",
        ):
            assert setting in overrides
        assert Cell.from_json(json.loads(json.dumps(cell.to_json()))) == cell
        assert (f"P{prompts}" in cell.regime) == (prompts != 16)


@pytest.mark.parametrize(
    ("loss", "group"),
    [("clip", "+baseline=vanilla"), ("union", "+troll=rollout_support"), ("anchored", "+troll=rollout_support")],
)
def test_the_asynchronous_trainer_takes_the_old_policy_that_sampled_in_bypass_mode(
    loss: str, group: str, tmp_path: Path
) -> None:
    cell = Cell("chain", loss, 2e-4, 0, staleness=4, old_policy="behaviour", trainer="separate_async")
    words = cell.overrides(tmp_path)
    assert group in words
    assert "algorithm.rollout_correction.bypass_mode=True" in words
    assert "trainer.v1.separate_async.num_warmup_batches=4" in words
    assert "+troll=rollout_support" not in dataclasses.replace(cell, old_policy="rescored").overrides(tmp_path)
    assert Cell.from_json(json.loads(json.dumps(cell.to_json()))) == cell
    # verl's task runner trains once per process.
    assert cell.session != dataclasses.replace(cell, seed=1).session


@pytest.mark.parametrize("device", DEVICES)
def test_verl_knows_every_setting(device: str, tmp_path: Path) -> None:
    cells = [Cell("chain", "union", 1e-4, 0), Cell("sums", "clip_regression", 1e-5, 0, prompts=8)]
    only_on_the_cpu = [
        Cell("chain", "clip", 1e-4, 0, estimator="ppo"),
        Cell("chain", "anchored", 1e-4, 0, staleness=2, old_policy="behaviour", trainer="separate_async"),
    ]
    with initialize_config_module("verl.trainer.config", version_base=None):
        for cell in cells + (only_on_the_cpu if device == "cpu" else []):
            config = compose("ppo_trainer", overrides=cell.overrides(tmp_path, device))
            assert config.trainer.device == {"cpu": "cpu", "cuda": "cuda"}[device]
            assert config.actor_rollout_ref.actor.strategy == "fsdp2"
            assert config.actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype == "fp32"
            assert config.actor_rollout_ref.rollout.dtype == "float32"
    for cell in only_on_the_cpu if device != "cpu" else []:
        with pytest.raises(ValueError, match="device='cuda'"):
            cell.overrides(tmp_path, device)


def test_the_device_is_recorded_where_it_is_not_the_cpu(tmp_path: Path) -> None:
    file = metrics_file(tmp_path / "m", [0.3])
    assert "device" not in results.record(CELL, file, seconds=1.0)["run"]
    assert results.record(CELL, file, 1.0, "A GPU")["run"]["device"] == "A GPU"


def test_published_runs_keep_their_keys() -> None:
    assert all(Cell.from_json(line["run"]["cell"]).key == key for key, line in results.read().items())


def test_runs_with_and_without_the_plugin_never_share_processes() -> None:
    kinds = {Cell("chain", loss, 1e-4, 0).session for loss in ("union", "anchored")}
    rivals = {Cell("chain", loss, 1e-4, 0).session for loss in ("clip", "none", *grid.RIVALS)}
    assert len(kinds) == len(rivals) == 1
    assert kinds != rivals


# --- grid -------------------------------------------------------------------------------------------------------------


def test_headline_seeds_took_no_part_in_the_choice() -> None:
    assert not set(grid.HEADLINE_SEEDS) & set(grid.SWEEP_SEEDS)
    assert len(grid.HEADLINE_SEEDS) >= 5
    assert all(len(rates) >= 4 for rates in (*grid.RATES.values(), grid.OVERUSED_RATES))


def test_no_rate_before_the_sweep_is_complete() -> None:
    sweep = [cell for cell in grid.sweep({}) if (cell.task, cell.loss) == ("chain", "clip")]
    done = {cell.key: line_of(cell, 0.5) for cell in sweep[:-1]}
    assert grid.best_rate(done, "chain", "clip") is None
    assert not list(grid.headline(done))
    done[sweep[-1].key] = line_of(sweep[-1], 0.5)
    # All rates tie: the lowest wins.
    assert grid.best_rate(done, "chain", "clip") == min(grid.RATES["chain"])


def test_the_rate_with_the_best_mean_is_chosen_and_trained_on_every_headline_seed() -> None:
    sweep = [cell for cell in grid.sweep({}) if (cell.task, cell.loss) == ("chain", "clip")]
    best = grid.RATES["chain"][2]
    # One lucky run at another rate does not make its mean better.
    final = {(cell.lr, cell.seed): 0.7 if cell.lr == best else 0.5 for cell in sweep}
    final[grid.RATES["chain"][0], grid.SWEEP_SEEDS[0]] = 0.8
    done = {cell.key: line_of(cell, final[cell.lr, cell.seed]) for cell in sweep}
    assert grid.best_rate(done, "chain", "clip") == best
    assert [(cell.lr, cell.seed) for cell in grid.headline(done)] == [(best, seed) for seed in grid.HEADLINE_SEEDS]


def test_every_cell_of_the_grid_can_be_built_and_sections_have_some() -> None:
    done = {cell.key: line_of(cell, 0.5) for sweep in (grid.sweep, grid.overused, grid.rivals) for cell in sweep({})}
    for name, section in grid.SECTIONS.items():
        assert list(section.cells(done)), name
    assert {cell.key for cell in grid.in_order({}, ["headline", "sweep"], ["programs"])} == {
        cell.key for cell in grid.sweep({}) if cell.task == "programs"
    }


# --- results ----------------------------------------------------------------------------------------------------------


def metrics_file(path: Path, success: list[float], grad_norm: float = 1.0) -> Path:
    rows = [
        {"step": step, "data": {results.held_out_key("chain"): value, "actor/grad_norm": grad_norm, "unknown": 1}}
        for step, value in enumerate(success)
    ]
    # Like verl's file logger, which writes non-finite values as null.
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    return path


def test_a_record_keeps_curves_and_leaves_the_rest(tmp_path: Path) -> None:
    line = results.record(CELL, metrics_file(tmp_path / "m", [0.3, 31 / 256], grad_norm=1.23456789), seconds=12.0)
    assert line["metrics"]["step"] == [0, 1]
    # Success is compared with half of its first value: after rounding, a tie would look like a drop.
    assert results.held_out(line) == [0.3, 31 / 256]
    assert line["metrics"]["actor/grad_norm"] == [1.2346, 1.2346]
    assert "unknown" not in line["metrics"]
    assert Cell.from_json(line["run"]["cell"]) == CELL
    assert line["run"]["seconds"] == 12.0
    assert line["run"]["settings"] == {"kl_bound": 0.05}


def test_success_has_another_name_where_verls_reward_loop_scored(tmp_path: Path) -> None:
    file = metrics_file(tmp_path / "m", [0.3, 0.5])
    file.write_text(file.read_text().replace("/reward/mean@1", "/acc/mean@1"))
    assert results.held_out(results.record(CELL, file, seconds=1.0)) == [0.3, 0.5]


def test_a_changed_setting_is_told_to_the_report(tmp_path: Path) -> None:
    cell = dataclasses.replace(CELL, settings=("troll.kl_bound=0.01", "troll.step_size_gradient=detached"))
    line = results.record(cell, metrics_file(tmp_path / "m", [0.3]), seconds=12.0)
    assert line["run"]["settings"] == {"kl_bound": 0.01, "step_size_gradient": "detached"}


def test_the_published_results_are_runs_that_the_report_reads() -> None:
    def refuse(text: str) -> None:
        raise AssertionError(text)

    runs = read_runs([results.FILE], refuse)
    assert len(runs) == len(results.read())
    assert all(run.held_out() for run in runs)
    # verl's asynchronous trainer counts no answers.
    assert all(run.metric(DISTINCT_ANSWERS) or " ahead" in run.section for run in runs)


@pytest.mark.parametrize(
    ("success", "grad_norm", "expected"),
    [
        ([0.4, 0.2], 1.0, "finished"),
        ([0.4, 0.19], 1.0, "diverged"),
        ([0.4, 0.9], math.nan, "diverged"),
        ([0.4, 0.9], math.inf, "diverged"),
    ],
)
def test_diverged_is_a_lost_number_or_half_of_the_success(
    tmp_path: Path, success: list[float], grad_norm: float, expected: str
) -> None:
    line = results.record(CELL, metrics_file(tmp_path / "m", success, grad_norm), seconds=1.0)
    assert line["run"]["status"] == expected
    # Strict JSON, since other programs read the file.
    json.dumps(line, allow_nan=False)


def test_a_cut_off_line_is_left_out_and_mended(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "results.jsonl"
    first, second = line_of(CELL, 0.5), line_of(dataclasses.replace(CELL, seed=1), 0.6)
    results.append(first, file)
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"run": {"key"')
    assert list(results.read(file).values()) == [first]
    results.append(second, file)
    assert list(results.read(file).values()) == [first, second]


# --- pool -------------------------------------------------------------------------------------------------------------


class StandIn:
    """Replaces a session with Ray and verl: writes a metrics file, or fails."""

    failing: ClassVar[set[str]] = set()
    started: ClassVar[list[tuple[Any, ...]]] = []
    trained: ClassVar[list[Cell]] = []
    lock = threading.Lock()

    def __init__(self, kind: tuple[Any, ...], log: Path, device: str) -> None:
        self.kind = kind
        self.device = device
        self.started.append(kind)

    def run(self, cell: Cell, tasks: Path, metrics: Path) -> tuple[float, str]:
        with self.lock:
            self.trained.append(cell)
        if cell.key in self.failing:
            raise SessionError("no numbers")
        rows = [{"step": step, "data": {results.held_out_key(cell.task): 0.4}} for step in range(2)]
        metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return 1.0, self.device

    def end(self) -> None:
        """Nothing to end."""


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[StandIn]:
    monkeypatch.setattr(pool, "SessionProcess", StandIn)
    monkeypatch.setattr(pool, "SCRATCH", tmp_path / "scratch")
    (tmp_path / "scratch").mkdir()
    for store in (StandIn.failing, StandIn.started, StandIn.trained):
        store.clear()
    return StandIn


def test_the_pool_trains_each_cell_once_and_resumes(stand_in: type[StandIn], tmp_path: Path) -> None:
    cells = [Cell("chain", loss, 1e-4, seed) for seed in range(3) for loss in ("clip", "union")]
    file = tmp_path / "results.jsonl"
    said: list[str] = []
    assert Pool(lambda done: cells[:4], file, say=said.append).run(2, math.inf) == []
    assert Pool(lambda done: cells, file, say=said.append).run(2, math.inf) == []
    assert sorted(cell.key for cell in stand_in.trained) == sorted(cell.key for cell in cells)
    assert len(results.read(file)) == len(said) == 6
    assert not list((tmp_path / "scratch").iterdir())


def test_one_worker_keeps_its_processes_for_cells_of_their_kind(stand_in: type[StandIn], tmp_path: Path) -> None:
    cells = [Cell("chain", loss, 1e-4, seed) for seed in range(3) for loss in ("clip", "union")]
    Pool(lambda done: cells, tmp_path / "results.jsonl", say=lambda text: None).run(1, math.inf)
    assert len(stand_in.started) == 2


def test_a_failing_cell_is_tried_again_named_and_does_not_stop_the_others(
    stand_in: type[StandIn], tmp_path: Path
) -> None:
    cells = [Cell("chain", "clip", 1e-4, seed) for seed in range(3)]
    stand_in.failing.add(cells[1].key)
    said: list[str] = []
    file = tmp_path / "results.jsonl"
    assert Pool(lambda done: cells, file, say=said.append).run(1, math.inf) == [cells[1].key]
    assert results.read(file).keys() == {cells[0].key, cells[2].key}
    assert sum("FAILED" in text and "no numbers" in text for text in said) == pool.ATTEMPTS


def test_an_error_of_our_own_ends_the_run(
    stand_in: type[StandIn], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = [Cell("chain", "clip", 1e-4, seed) for seed in range(50)]

    def broken(cell: Cell, metrics: Path, seconds: float, device: str) -> results.Record:
        if cell.seed == 1:
            raise OSError("no space")
        return record(cell, metrics, seconds, device)

    record = results.record
    monkeypatch.setattr(results, "record", broken)
    with pytest.raises(OSError, match="no space"):
        Pool(lambda done: cells, tmp_path / "results.jsonl", say=lambda text: None).run(2, math.inf)
    assert len(stand_in.trained) < len(cells)


def test_the_grid_grows_with_the_results(stand_in: type[StandIn], tmp_path: Path) -> None:
    def wanted(done: results.Results) -> list[Cell]:
        return [dataclasses.replace(CELL, seed=seed) for seed in range(len(done) + 1 if len(done) < 3 else 3)]

    file = tmp_path / "results.jsonl"
    Pool(wanted, file, say=lambda text: None).run(2, math.inf)
    assert len(results.read(file)) == 3


def test_no_run_begins_when_time_is_up(stand_in: type[StandIn], tmp_path: Path) -> None:
    Pool(lambda done: [CELL], tmp_path / "results.jsonl", say=lambda text: None).run(1, 0.0)
    assert not stand_in.trained


# --- tables -----------------------------------------------------------------------------------------------------------


def test_an_arm_is_compared_with_clipping_under_its_own_estimator(tmp_path: Path) -> None:
    success = {("grpo", "clip"): 0.5, ("grpo", "union"): 0.625, ("ppo", "clip"): 0.25, ("ppo", "union"): 0.75}
    lines = [
        results.record(
            Cell("chain", loss, 1e-4, seed, estimator=estimator),
            metrics_file(tmp_path / "m", [0.25, value, value]),
            seconds=1.0,
        )
        for (estimator, loss), value in success.items()
        for seed in range(3)
    ]
    text = "\n".join(by_arm(lines))
    rows = [row.split("|") for row in text.splitlines() if "| union |" in row]
    assert [(row[1].strip(), row[6].strip()) for row in rows] == [
        ("grpo, M8 E1", "**+0.125 (+0.125 to +0.125)**"),
        ("ppo, M8 E1", "**+0.500 (+0.500 to +0.500)**"),
    ]


def test_a_changed_setting_is_compared_with_its_loss_and_a_loss_with_its_clipping(tmp_path: Path) -> None:
    detached = ("troll.step_size_gradient=detached",)
    arms: list[tuple[str, tuple[str, ...], float]] = [
        ("clip", (), 0.25),
        ("union", (), 0.5),
        ("union", detached, 0.75),
        ("gspo", (), 0.375),
        ("union_sequence", (), 0.5),
    ]
    lines = [
        results.record(
            Cell("chain", loss, 1e-4, seed, settings=settings),
            metrics_file(tmp_path / "m", [0.25, value, value]),
            seconds=1.0,
        )
        for loss, settings, value in arms
        for seed in range(3)
    ]
    rows = [row.split("|") for row in "\n".join(by_arm(lines)).splitlines() if row.startswith("| ")][2:]
    assert {row[1].strip(): row[5].strip() for row in rows} == {
        "clip": "",
        "union": "**+0.250 (+0.250 to +0.250)**",
        "union, step_size_gradient=detached": "**+0.250 (+0.250 to +0.250)**",
        "gspo": "**+0.125 (+0.125 to +0.125)**",
        "union_sequence": "**+0.125 (+0.125 to +0.125)**",
    }
    rows = [row.split("|") for row in "\n".join(by_arm(lines, "union")).splitlines() if row.startswith("| ")][2:]
    assert {row[1].strip(): row[5].strip() for row in rows if row[1].strip() in ("clip", "union")} == {
        "clip": "**-0.250 (-0.250 to -0.250)**",
        "union": "",
    }


def test_half_done_rates_are_not_compared_with_each_other(tmp_path: Path) -> None:
    cells = [("clip", 1e-4), ("clip", 2e-4), ("union", 2e-4), ("union", 4e-4)]
    lines = [
        results.record(Cell("chain", loss, lr, seed), metrics_file(tmp_path / "m", [0.25, 0.5, 0.5]), seconds=1.0)
        for loss, lr in cells
        for seed in range(3)
    ]
    rows = [row.split("|") for row in "\n".join(by_arm(lines)).splitlines() if row.startswith("| union")]
    assert [(row[2].strip(), bool(row[5].strip())) for row in rows] == [("2e-4", True), ("4e-4", False)]


def test_entropy_is_that_of_the_last_step_at_each_rate() -> None:
    lines = []
    for loss, lr, entropy in (("clip", 1e-4, 0.5), ("clip", 2e-4, 0.25), ("union", 1e-4, 1.5)):
        for seed in (100, 101):
            line = line_of(Cell("chain", loss, lr, seed), 0.5)
            line["run"] |= {"arm": loss, "lr": lr, "section": "grpo, M8 E1", "settings": {}}
            line["metrics"]["actor/entropy"] = [2.0, 1.0, entropy + seed - 100.5, None]
            lines.append(line)
    rows = [row for row in entropy_by_rate(lines) if row.startswith("| ")]
    assert rows[0] == "| arm | 1e-4 | 2e-4 |"
    assert rows[1:] == ["| --- | --- | --- |", "| clip | 0.50 | 0.25 |", "| union | 1.50 | - |"]


# --- command line -----------------------------------------------------------------------------------------------------


def test_list_and_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "results.jsonl", tmp_path / "part.jsonl"
    first, second = list(grid.sweep({}))[:2]
    for cell, final in ((first, 0.5), (second, 0.5), (dataclasses.replace(first, loss="union"), 0.75)):
        line = results.record(cell, metrics_file(tmp_path / "metrics.jsonl", [0.25, final, final]), seconds=1.0)
        results.append(line, file)
    assert main(["list", "--results", str(file)]) == 0
    assert "3 of" in capsys.readouterr().out
    for baseline, difference in (("clip", "+0.250"), ("union", "-0.250")):
        assert main(["tables", "sweep", "--baseline", baseline, "--results", str(file)]) == 0
        assert difference in capsys.readouterr().out
    assert main(["export", "sweep", str(out), "--results", str(file)]) == 0
    assert len(out.read_text().splitlines()) == 3
    assert main(["export", "staleness", str(out), "--results", str(file)]) == 1
    assert "no run of the section staleness" in capsys.readouterr().err
