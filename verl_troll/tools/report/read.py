"""Reads runs from verl's file logger, from TensorBoard, or from a file of collected runs, one per line."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

INSTALL = "pip install 'verl_troll[report]'"

REWARDS = ("critic/score/mean", "critic/rewards/mean")
ENTROPY = "actor/entropy"
GRAD_NORM = "actor/grad_norm"
PPO_KL = "actor/ppo_kl"
KL_BEFORE, KL_BEFORE_MAX = "troll/kl_before", "troll/kl_before_max"
KL_AFTER, KL_AFTER_MAX = "troll/kl_after", "troll/kl_after_max"
PROJECTED_SHARE = "troll/projected_share"
SUPPORT_SIZE = "troll/support_size"
OLD_KEPT_MASS, NEW_KEPT_MASS = "troll/old_kept_mass", "troll/new_kept_mass"
STEP_SECONDS = "timing_s/step"
RESPONSE_LENGTH = "response_length/mean"
# Not one of verl's: a trainer logs it under a prefix of its own.
DISTINCT_ANSWERS = "distinct_answers"
READ = frozenset(
    (
        *REWARDS,
        ENTROPY,
        GRAD_NORM,
        PPO_KL,
        KL_BEFORE,
        KL_BEFORE_MAX,
        KL_AFTER,
        KL_AFTER_MAX,
        PROJECTED_SHARE,
        SUPPORT_SIZE,
        OLD_KEPT_MASS,
        NEW_KEPT_MASS,
        STEP_SECONDS,
        RESPONSE_LENGTH,
        DISTINCT_ANSWERS,
    )
)

_HELD_OUT = re.compile(r"val-core/(?P<source>.+?)(?:/(?P<variable>[^/]+))?/mean@(?P<samples>\d+)")
_SEED_IN_NAME = re.compile(r"(?:^|[-_. ])seed[-_=]?(\d+)(?=$|[-_. ])", re.IGNORECASE)
_RATE_IN_NAME = re.compile(r"(?:^|[-_ ])lr[-_=]?(\d+(?:\.\d+)?(?:e[-+]?\d+)?)(?=$|[-_ ])", re.IGNORECASE)
_NAMES_OF_NO_ARM = frozenset(("metrics", "tensorboard", "logs"))
_EVENT_FILE = "tfevents"

# verl's settings that distinguish arms, by their short name here.
_SETTINGS = {
    "loss_mode": "actor_rollout_ref.actor.policy_loss.loss_mode",
    "support": "actor_rollout_ref.actor.policy_loss.troll.support",
    "kl_bound": "actor_rollout_ref.actor.policy_loss.troll.kl_bound",
    "alpha": "actor_rollout_ref.actor.policy_loss.troll.alpha",
    "k": "actor_rollout_ref.actor.policy_loss.troll.k",
    "dropped_mass": "actor_rollout_ref.actor.policy_loss.troll.dropped_mass",
    "importance_ratio": "actor_rollout_ref.actor.policy_loss.troll.importance_ratio",
    "step_size_gradient": "actor_rollout_ref.actor.policy_loss.troll.step_size_gradient",
    "one_sided": "actor_rollout_ref.actor.policy_loss.troll.one_sided",
    "clip_ratio_low": "actor_rollout_ref.actor.clip_ratio_low",
    "clip_ratio_high": "actor_rollout_ref.actor.clip_ratio_high",
    "strategy": "actor_rollout_ref.actor.strategy",
    "loss_agg_mode": "actor_rollout_ref.actor.loss_agg_mode",
    "ppo_epochs": "actor_rollout_ref.actor.ppo_epochs",
    "ppo_mini_batch_size": "actor_rollout_ref.actor.ppo_mini_batch_size",
    "entropy_coeff": "actor_rollout_ref.actor.entropy_coeff",
    "use_kl_loss": "actor_rollout_ref.actor.use_kl_loss",
    "rollout": "actor_rollout_ref.rollout.name",
    "samples": "actor_rollout_ref.rollout.n",
    "train_batch_size": "data.train_batch_size",
    "adv_estimator": "algorithm.adv_estimator",
}

Warn = Callable[[str], None]


class ReportError(ValueError):
    """The inputs give no report; the message says why and what to do."""


@dataclass(frozen=True)
class Series:
    """One metric of one run; ``steps`` increase. Values may be NaN or infinite if they were logged so."""

    steps: tuple[int, ...] = ()
    values: tuple[float, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.steps)

    def finite(self) -> Series:
        """The points whose value is finite."""
        return _series(
            {step: value for step, value in zip(self.steps, self.values, strict=True) if math.isfinite(value)}
        )


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        task: what was trained on; empty if unknown.
        arm: the method, e.g. ``vanilla``.
        seed: None if unknown; such a run is never paired.
        lr: the actor's learning rate; None if unknown.
        status: ``diverged``, or another word for how it ended; empty if unknown.
        settings: other settings that distinguish the run, by name.
        metrics: by verl's metric name.
        section: what it is compared within; runs of different sections are never averaged.
        source: file or folder, as given.
        argument: the command-line argument that it was found under.
        kind: format of the source.
    """

    task: str
    arm: str
    seed: int | None
    lr: float | None
    status: str
    settings: Mapping[str, Any]
    metrics: Mapping[str, Series]
    section: str = ""
    source: str = ""
    argument: str = ""
    kind: str = ""
    _derived: dict[str, Series] = field(default_factory=dict, repr=False, compare=False)

    def metric(self, *names: str) -> Series:
        """The first named metric that the run has, else an empty series; a name without a prefix matches any."""
        found = (series for name in names for key, series in self.metrics.items() if name in _names(key))
        return next(found, Series())

    def held_out(self) -> Series:
        """Held-out success, averaged over data sources at the steps that measured all of them."""
        if "held_out" not in self._derived:
            self._derived["held_out"] = _average([self.metrics[key] for key in held_out_keys(self.metrics).values()])
        return self._derived["held_out"]

    def kl_bound(self) -> float | None:
        """The projection's KL bound per token, in nats; None for a run without one."""
        for name, value in self.settings.items():
            if name.split(".")[-1] == "kl_bound":
                return _as_float(value)
        return None


def _names(key: str) -> tuple[str, str]:
    """What a metric is found by: its name with and without prefix."""
    return key, key.rsplit("/", 1)[-1]


def held_out_keys(metrics: Mapping[str, Any]) -> dict[str, str]:
    """The held-out success metric of each data source: the one with most samples, then with the longest name."""
    found: dict[str, tuple[int, int, str]] = {}
    for key in metrics:
        match = _HELD_OUT.fullmatch(key)
        if match:
            rank = (int(match["samples"]), len(key), key)
            found[match["source"]] = max(rank, found.get(match["source"], rank))
    return {source: rank[2] for source, rank in sorted(found.items())}


def warn_on_stderr(text: str) -> None:
    """Print a warning."""
    print(f"verl-troll report: {text}", file=sys.stderr)


def read_runs(paths: Sequence[str | Path], warn: Warn = warn_on_stderr) -> list[Run]:
    """Every run under ``paths``, in order; of duplicates the later one.

    Args:
        paths: files, or folders to search; ``NAME=PATH`` sets the arm of every run under PATH.
        warn: called with what was left out: damaged last lines, duplicates, files without a run.

    Raises:
        ReportError: a path does not exist, a file is damaged before its last line, or there is no run.
    """
    runs = [run for argument in paths for run in _under(str(argument), warn)]
    if not runs:
        raise ReportError(
            f"no run in {', '.join(map(str, paths)) or 'no path'}: give metrics.jsonl of verl's file logger, "
            "TensorBoard event files, a file of collected runs, or a folder that holds any of them"
        )
    kept: dict[object, Run] = {}
    for number, run in enumerate(runs):
        key = number if run.seed is None else _description(run)
        if key in kept:
            warn(
                f"{run.source}: {_words(run)} was read before, from {kept.pop(key).source}; the later one counts. If "
                "the runs differ, give their arms different names with NAME=PATH"
            )
        kept[key] = run
    return list(kept.values())


def _description(run: Run) -> tuple[object, ...]:
    settings = json.dumps(run.settings, sort_keys=True, default=str)
    return run.task, run.section, run.arm, run.seed, run.lr, settings


def _words(run: Run) -> str:
    rate = "" if run.lr is None else f", learning rate {run.lr:g}"
    return f"arm {run.arm!r}, seed {run.seed}{rate}{f', task {run.task!r}' if run.task else ''}"


def _under(argument: str, warn: Warn) -> Iterator[Run]:
    name, path = None, Path(argument)
    if not path.exists() and "=" in argument:
        name, _, rest = argument.partition("=")
        path = Path(rest)
        if not name or not rest:
            raise ReportError(f"{argument!r}: an arm is named as NAME=PATH, with neither left out")
    if not path.exists():
        raise ReportError(f"{str(path)!r} does not exist: give a file or a folder of a run")
    for run in _in_folder(path, warn) if path.is_dir() else _in_file(path, warn, searched=False):
        yield dataclasses.replace(run, argument=argument, arm=run.arm if name is None else name)


def _in_folder(folder: Path, warn: Warn) -> Iterator[Run]:
    for parent, folders, files in os.walk(folder):
        folders.sort()
        if any(_EVENT_FILE in name for name in files):
            yield from _tensorboard(Path(parent), warn)
        for name in sorted(files):
            if name.endswith(".jsonl"):
                yield from _in_file(Path(parent) / name, warn, searched=True)


def _in_file(path: Path, warn: Warn, searched: bool) -> Iterator[Run]:
    if _EVENT_FILE in path.name:
        yield from _tensorboard(path, warn)
        return
    lines = list(_json_lines(path, warn))
    if not lines:
        warn(f"{path} holds no step: the run ended before its first one")
        return
    first = lines[0][1]
    keys = set(first) if isinstance(first, dict) else set()
    if {"run", "metrics"} <= keys:
        for number, line in lines:
            yield _collected(line, f"{path}:{number}", path)
    elif {"step", "data"} <= keys:
        yield _file_logger(lines, path)
    elif searched:
        warn(f"{path} is left out: it is neither a log of verl's file logger nor a file of collected runs")
    else:
        raise ReportError(
            f"{path}:{lines[0][0]}: a line has either 'step' and 'data' (verl's file logger) or 'run' and 'metrics' "
            f"(collected runs), got {sorted(keys) if keys else type(first).__name__}"
        )


def _json_lines(path: Path, warn: Warn) -> Iterator[tuple[int, Any]]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ReportError(f"{path} cannot be read: {error.strerror}") from None
    lines = [(number, line) for number, line in enumerate(content.split(b"\n"), 1) if line.strip()]
    for number, line in lines:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number != lines[-1][0]:
                raise ReportError(
                    f"{path}:{number}: not JSON ({error}): only the last line of an interrupted run may be damaged; "
                    "fix or remove the line"
                ) from None
            warn(f"{path}:{number}: the last line is damaged and was skipped, as an interrupted run leaves it")
            return
        yield number, value


def _file_logger(lines: Sequence[tuple[int, Any]], path: Path) -> Run:
    points: dict[str, dict[int, float]] = {}
    for number, line in lines:
        where = f"{path}:{number}"
        if not isinstance(line, dict) or not isinstance(line.get("data"), dict) or not _whole(line.get("step")):
            raise ReportError(f"{where}: expected {{'step': whole number, 'data': {{metric: number}}}}")
        for key, value in line["data"].items():
            # verl's logger writes non-finite values as null.
            number_or_none = math.nan if value is None else _as_float(value)
            if number_or_none is not None:
                points.setdefault(key, {})[line["step"]] = number_or_none
            elif not READ.isdisjoint(_names(key)) or _HELD_OUT.fullmatch(key):
                raise ReportError(f"{where}: {key} must be a number, got {value!r}")
    return _described({key: _series(found) for key, found in points.items()}, path, "verl's file logger")


def _tensorboard(path: Path, warn: Warn) -> Iterator[Run]:
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError:
        raise ReportError(f"{path} holds TensorBoard events, and tensorboard is not installed: {INSTALL}") from None
    events = EventAccumulator(str(path), size_guidance={"scalars": 0})
    events.Reload()
    metrics = {
        key: _series({event.step: float(event.value) for event in events.Scalars(key)})
        for key in events.Tags()["scalars"]
    }
    if metrics:
        yield _described(metrics, path, "TensorBoard")
    else:
        warn(f"{path} holds no scalar: the run ended before its first step, or its events are damaged")


def _described(metrics: dict[str, Series], path: Path, kind: str) -> Run:
    """A run described by the configuration beside its log, or else by its path."""
    settings, seeds, rate = _configuration(path)
    named, named_seed, named_rate = _from_name(path)
    # verl's rollout.seed has a default, so a seed in the path takes precedence.
    data_seed, rollout_seed = seeds
    seed = next((value for value in (data_seed, named_seed, rollout_seed) if _whole(value)), None)
    if "loss_mode" in settings:
        arm = str(settings["loss_mode"])
        named = f"{arm} {settings['support']}" if arm == "troll" and "support" in settings else arm
    return Run(
        task=", ".join(held_out_keys(metrics)),
        arm=named,
        seed=seed,
        lr=named_rate if rate is None else rate,
        status="",
        settings=settings,
        metrics=metrics,
        source=str(path),
        kind=kind,
    )


def _configuration(path: Path) -> tuple[dict[str, Any], tuple[Any, Any], float | None]:
    folder = path if path.is_dir() else path.parent
    folders = [folder, folder.parent] if folder.name in _NAMES_OF_NO_ARM else [folder]
    candidates = [parent / part / "config.yaml" for parent in folders for part in (".hydra", "hydra/.hydra")]
    config = next((candidate for candidate in candidates if candidate.is_file()), None)
    if config is None:
        return {}, (None, None), None
    try:
        import yaml
    except ImportError:
        raise ReportError(f"{config} says what the run is, and PyYAML is not installed: {INSTALL}") from None
    try:
        tree = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise ReportError(f"{config} is not YAML: {error}") from None
    settings = {name: value for name, key in _SETTINGS.items() if (value := _select(tree, key)) is not None}
    if settings.get("loss_mode") != "troll":
        settings = {name: value for name, value in settings.items() if ".troll." not in _SETTINGS[name]}
    seeds = (_select(tree, "data.seed"), _select(tree, "actor_rollout_ref.rollout.seed"))
    return settings, seeds, _as_float(_select(tree, "actor_rollout_ref.actor.optim.lr"))


def _select(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return None if isinstance(tree, (dict, list)) else tree


def _from_name(path: Path) -> tuple[str, int | None, float | None]:
    """Arm, seed and learning rate from file and folder names such as ``union-lr1e-4/seed0/metrics.jsonl``."""
    seed: int | None = None
    rate: float | None = None
    parts = list(path.resolve().parts)
    if _EVENT_FILE in path.name:
        parts.pop()
    elif not path.is_dir():
        parts[-1] = path.stem
    for part in reversed(parts):
        if seed is None and (match := _SEED_IN_NAME.search(part)):
            seed = int(match[1])
        if rate is None and (match := _RATE_IN_NAME.search(part)):
            rate = float(match[1])
        rest = _RATE_IN_NAME.sub("", _SEED_IN_NAME.sub("", part)).strip("-_. ")
        if rest and rest not in _NAMES_OF_NO_ARM:
            return rest, seed, rate
    return path.stem, seed, rate


def _collected(line: Any, where: str, path: Path) -> Run:
    if not isinstance(line, dict) or not isinstance(line.get("run"), dict) or not isinstance(line.get("metrics"), dict):
        raise ReportError(f"{where}: expected {{'run': {{...}}, 'metrics': {{...}}}}")
    run, columns = line["run"], line["metrics"]
    if not isinstance(run.get("arm"), str) or not run["arm"]:
        raise ReportError(f"{where}: run.arm must be a string, got {run.get('arm')!r}")
    for key in ("task", "section", "status"):
        if not isinstance(run.get(key, ""), str):
            raise ReportError(f"{where}: run.{key} must be a string, got {run[key]!r}")
    if run.get("seed") is not None and not _whole(run["seed"]):
        raise ReportError(f"{where}: run.seed must be a whole number, got {run['seed']!r}")
    rate = _as_float(run.get("lr"))
    if run.get("lr") is not None and (rate is None or not 0 <= rate < math.inf):
        raise ReportError(f"{where}: run.lr must be a learning rate of at least 0, got {run['lr']!r}")
    settings = run.get("settings", {})
    if not isinstance(settings, dict):
        raise ReportError(f"{where}: run.settings must be a mapping, got {settings!r}")
    steps = columns.get("step")
    if not isinstance(steps, list) or not all(map(_whole, steps)) or sorted(set(steps)) != steps:
        raise ReportError(f"{where}: metrics.step must be a list of increasing whole numbers")
    return Run(
        task=run.get("task", ""),
        arm=run["arm"],
        seed=run.get("seed"),
        lr=rate,
        status=run.get("status", ""),
        settings=dict(_flat(settings)),
        metrics={name: _column(name, column, steps, where) for name, column in columns.items() if name != "step"},
        section=run.get("section", ""),
        source=str(path),
        kind="collected runs",
    )


def _column(name: str, column: Any, steps: list[int], where: str) -> Series:
    if not isinstance(column, list) or len(column) != len(steps):
        got = f"{len(column)} values" if isinstance(column, list) else type(column).__name__
        raise ReportError(f"{where}: metrics[{name!r}] must be a list of {len(steps)} values, one per step, got {got}")
    points: dict[int, float] = {}
    for step, value in zip(steps, column, strict=True):
        if value is not None:
            number = _as_float(value)
            if number is None:
                raise ReportError(f"{where}: metrics[{name!r}] at step {step} must be a number or null, got {value!r}")
            points[step] = number
    return _series(points)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _average(parts: Sequence[Series]) -> Series:
    if not parts:
        return Series()
    by_step = [dict(zip(part.steps, part.values, strict=True)) for part in parts]
    shared = set.intersection(*(set(values) for values in by_step))
    return _series({step: sum(values[step] for values in by_step) / len(by_step) for step in shared})


def _series(points: Mapping[int, float]) -> Series:
    steps = tuple(sorted(points))
    return Series(steps, tuple(points[step] for step in steps))


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _as_float(value: Any) -> float | None:
    try:
        return None if isinstance(value, (list, dict)) or value is None else float(value)
    except (ValueError, OverflowError):
        return None
