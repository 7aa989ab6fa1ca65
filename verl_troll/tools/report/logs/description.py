"""What a run is, from the configuration beside its log, or else from its path."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import Any

from verl_troll.tools.report.errors import INSTALL, ReportError, shown_path
from verl_troll.tools.report.logs.files import EVENT_FILE, opened
from verl_troll.tools.report.metrics import held_out_keys
from verl_troll.tools.report.runs import Run, Series
from verl_troll.tools.report.values import as_rate, as_setting, is_rate, is_whole

MAX_CONFIG_BYTES = 16 * 2**20
_SEED_IN_NAME = re.compile(r"(?:^|[-_. ])seed[-_=]?(\d+)(?=$|[-_. ])", re.IGNORECASE)
_RATE_IN_NAME = re.compile(r"(?:^|[-_ ])lr[-_=]?(\d+(?:\.\d+)?(?:e[-+]?\d+)?)(?=$|[-_ ])", re.IGNORECASE)
_NAMES_OF_NO_ARM = frozenset(("metrics", "tensorboard", "logs"))
# verl's settings that distinguish arms, by their short name here.
SETTINGS = {
    "loss_mode": "actor_rollout_ref.actor.policy_loss.loss_mode",
    "support": "actor_rollout_ref.actor.policy_loss.troll.support",
    "kl_bound": "actor_rollout_ref.actor.policy_loss.troll.kl_bound",
    "alpha": "actor_rollout_ref.actor.policy_loss.troll.alpha",
    "k": "actor_rollout_ref.actor.policy_loss.troll.k",
    "dropped_mass": "actor_rollout_ref.actor.policy_loss.troll.dropped_mass",
    "max_log_ratio": "actor_rollout_ref.actor.policy_loss.troll.max_log_ratio",
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


def described(metrics: dict[str, Series], path: Path, kind: str) -> Run:
    """A run described by the configuration beside its log, or else by its path."""
    settings, seeds, rate = _configuration(path)
    named, named_seed, named_rate = _from_name(path)
    # verl's rollout.seed has a default, so a seed in the path takes precedence.
    data_seed, rollout_seed = seeds
    seed = next((value for value in (data_seed, named_seed, rollout_seed) if is_whole(value)), None)
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


def earlier_name(index: int, count: int) -> str:
    """The end of the name of an arm, for one of ``count`` runs in one place; the last has none."""
    if index == count - 1:
        return ""
    return ", earlier run" if count == 2 else f", earlier run {index + 1}"


def several_runs(path: Path, count: int, why: str) -> str:
    """What to say of several runs in one place."""
    return (
        f"{shown_path(path)} holds {count} runs: {why}. The last has the arm's name; an earlier one is an arm of its "
        "own, '..., earlier run', described by the same configuration or path. Give each run a folder of its own"
    )


def _configuration(path: Path) -> tuple[dict[str, Any], tuple[Any, Any], float | None]:
    folder = path if path.is_dir() else path.parent
    folders = [folder, folder.parent] if folder.name in _NAMES_OF_NO_ARM else [folder]
    candidates = [parent / part / "config.yaml" for parent in folders for part in (".hydra", "hydra/.hydra")]
    config = next(filter(_is_there, candidates), None)
    if config is None:
        return {}, (None, None), None
    shown = shown_path(config)
    try:
        import yaml
    except ImportError:
        raise ReportError(f"{shown} says what the run is, and PyYAML is not installed: {INSTALL}") from None
    with opened(config) as stream:
        content = stream.read(MAX_CONFIG_BYTES + 1)
    if len(content) > MAX_CONFIG_BYTES:
        raise ReportError(f"{shown} has more than {MAX_CONFIG_BYTES / 2**20:g} MiB")
    try:
        tree = yaml.safe_load(content.decode("utf-8"))
    # What it raises depends on the tag: IndexError for an empty `!!int`, KeyError for a `!!bool` that is none.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ReportError(f"{shown} is not YAML that can be read: {type(error).__name__}: {reason}") from None
    settings = {
        name: as_setting(value, shown) for name, key in SETTINGS.items() if (value := _select(tree, key)) is not None
    }
    if settings.get("loss_mode") != "troll":
        settings = {name: value for name, value in settings.items() if ".troll." not in SETTINGS[name]}
    seeds = (_select(tree, "data.seed"), _select(tree, "actor_rollout_ref.rollout.seed"))
    return settings, seeds, as_rate(_select(tree, "actor_rollout_ref.actor.optim.lr"), f"{shown}: the actor's optim.lr")


def _is_there(path: Path) -> bool:
    """Whether something has that name, a link to nothing included; what cannot be looked at counts."""
    try:
        os.lstat(path)
    except OSError as error:
        return error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)
    return True


def _select(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return None if isinstance(tree, (dict, list)) else tree


def _from_name(path: Path) -> tuple[str, int | None, float | None]:
    """Arm, seed and learning rate from file and folder names such as ``union-lr1e-4/seed0/metrics.jsonl``."""
    seed: int | None = None
    rate: float | None = None
    parts = list(path.resolve().parts)
    if EVENT_FILE in path.name:
        parts.pop()
    elif not path.is_dir():
        parts[-1] = path.stem
    for part in reversed(parts):
        if seed is None and (match := _SEED_IN_NAME.search(part)):
            seed = int(match[1])
        if rate is None and (match := _RATE_IN_NAME.search(part)) and is_rate(float(match[1])):
            rate = float(match[1])
        rest = _RATE_IN_NAME.sub("", _SEED_IN_NAME.sub("", part)).strip("-_. ")
        if rest and rest not in _NAMES_OF_NO_ARM:
            return rest, seed, rate
    return path.stem, seed, rate
