"""Says what verl would train with, given the arguments of ``python -m verl.trainer.main_ppo``, as one line of JSON.

``verl-troll doctor -- ARGUMENTS`` runs it. verl's own entry point composes the configuration, and verl's own checks are
run on it, up to where a run would start Ray.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import runpy
import sys
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from verl.trainer import main_ppo
from verl.trainer.ppo.utils import need_reference_policy
from verl.utils.config import omega_conf_to_dataclass, validate_config
from verl.utils.device import auto_set_device

import verl_troll
from verl_troll.plugin.actor_config import TrollPolicyLossConfig
from verl_troll.plugin.settings import LOSS_MODE

_LOSS_MODE_KEY = "actor_rollout_ref.actor.policy_loss.loss_mode"
# What the groups `baseline` write beside verl's own keys.
_BASELINE_KEY = "baseline_loss"
# The method's name in a key, but not in `controller`.
_NAMED = re.compile(rf"(?<![a-z]){LOSS_MODE}", re.IGNORECASE)
# Least likeness of a misspelt word to the right one, from 0 to 1.
_LIKENESS = 0.7


class RefusedError(ValueError):
    """A run would end before it starts, with this message."""


def composed(arguments: Sequence[str]) -> DictConfig:
    """The configuration of a run with these arguments.

    Raises:
        RefusedError: Hydra refuses the arguments; in its own words.
    """
    printed, errors = io.StringIO(), io.StringIO()
    # Hydra would raise, instead of a message for users.
    os.environ.pop("HYDRA_FULL_ERROR", None)
    sys.argv = [main_ppo.__file__, *arguments, "--cfg", "job"]
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
            runpy.run_path(main_ppo.__file__, run_name="__main__")
        config = OmegaConf.create(printed.getvalue())
    except SystemExit:
        lines = [line for line in errors.getvalue().splitlines() if line and "HYDRA_FULL_ERROR" not in line]
        # The last line of a traceback, or of how to call it, says what is wrong.
        plain = bool(lines) and not lines[0].startswith(("Traceback", "usage"))
        message = "\n".join(lines if plain else lines[-1:])
        raise RefusedError(message or "with these arguments it does not start") from None
    except Exception as error:
        raise RefusedError(str(error)) from error
    if not isinstance(config, DictConfig) or OmegaConf.select(config, _LOSS_MODE_KEY) is None:
        raise RefusedError(f"the configuration has no {_LOSS_MODE_KEY}")
    return config


def announcement(config: DictConfig) -> str | None:
    """What the driver would say of TROLL; None where it is off.

    Raises:
        RefusedError: verl or TROLL refuses the settings; names the key.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            auto_set_device(config)
            # A critic's settings need its model, which this host may not have.
            validate_config(config, need_reference_policy(config), use_critic=False)
            loss = omega_conf_to_dataclass(config.actor_rollout_ref.actor).policy_loss
    except Exception as error:
        raise RefusedError(str(error.__cause__ or error)) from error
    on_troll = isinstance(loss, TrollPolicyLossConfig) and loss.loss_mode == LOSS_MODE
    return loss.troll.announcement if on_troll else None


def groups() -> dict[str, list[str]]:
    """Options of the configuration groups of verl_troll, by group."""
    options: dict[str, list[str]] = {}
    for path in sorted((Path(verl_troll.__file__).parent / "configs").glob("*/*.yaml")):
        options.setdefault(path.parent.name, []).append(path.stem)
    return options


def _nearest(word: str, words: Sequence[str]) -> str | None:
    return next(iter(get_close_matches(word.lower(), words, n=1, cutoff=_LIKENESS)), None)


def misread(config: DictConfig, known: set[str]) -> Iterator[tuple[str, str]]:
    """Top-level keys that were meant to choose a group of verl_troll; yields what is wrong and what to do.

    Where there is no group ``x``, Hydra takes ``+x=y`` for a key.

    Args:
        known: top-level keys that are read.
    """
    options = groups()
    for key, value in ((str(key), config[key]) for key in config if key not in known):
        group = _nearest(key, list(options))
        if group is None or not isinstance(value, str):
            continue
        wrong = f"+{key}={value} sets a key that nothing reads"
        option = _nearest(value, options[group])
        if key == group:
            by_hand = "write 'hydra.searchpath=[pkg://verl_troll.configs]' before it"
            yield f"{wrong}: Hydra does not find the group", f"mend that as said above; until then {by_hand}"
        elif option is not None:
            yield wrong, f"write +{group}={option}"


def why_off(loss: str | None, baseline: str | None, arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Signs that another loss was meant than the one that would train; yields what is wrong and what to do.

    Args:
        loss: the policy loss that would train; None if the run would be refused.
        baseline: the policy loss that ``+baseline=`` chose; None without it.
    """
    if loss == LOSS_MODE:
        yield (
            f"{_LOSS_MODE_KEY}={LOSS_MODE} without TROLL's settings would end the run at its first update",
            "write +troll=default in its place",
        )
    if None not in (loss, baseline) and loss != baseline:
        yield f"+baseline={baseline} is given, and another {_LOSS_MODE_KEY}", "leave out one of them"
    keys = {argument: argument.partition("=")[0] for argument in arguments if not argument.startswith("-")}
    if "+troll" in keys.values():
        if "~troll" in keys.values():
            yield "~troll takes +troll=... back", "leave it out"
        return
    for argument, key in keys.items():
        # Values do not count: the name of an experiment, say.
        if _NAMED.search(key):
            yield f"{argument} does not switch TROLL on", "write +troll=default"


def look(arguments: Sequence[str]) -> dict[str, Any]:
    """What a run with these arguments would train with.

    Returns:
        ``announcement`` if TROLL is on, ``loss`` if the arguments compose, ``refused`` if a run would end before it
        starts, and ``problems``, each with what to do.
    """
    loss = baseline = refused = on = None
    problems: list[tuple[str, str]] = []
    try:
        config = composed(arguments)
        loss, baseline = OmegaConf.select(config, _LOSS_MODE_KEY), config.get(_BASELINE_KEY)
        problems += misread(config, {_BASELINE_KEY, *map(str, composed([]))})
        on = announcement(config)
    except RefusedError as error:
        refused = str(error)
    if on is None and not problems:
        problems += why_off(loss if refused is None else None, baseline, arguments)
    return {"announcement": on, "loss": loss, "refused": refused, "problems": problems}


if __name__ == "__main__":
    print(json.dumps(look(sys.argv[1:])))
