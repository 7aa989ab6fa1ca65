"""The method's settings and the verl settings it depends on; construction checks every value.

``configs/troll/default.yaml`` fills :class:`HostSettings` by interpolation, so the checks see the run's values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from verl.base_config import BaseConfig

from verl_troll.core import wire
from verl_troll.core.comparison import RULES
from verl_troll.core.kernels import FORMS, Form
from verl_troll.core.loss import IMPORTANCE_RATIOS
from verl_troll.core.projection import STEP_SIZE_GRADIENTS
from verl_troll.core.support import Selection

PREFIX = "actor_rollout_ref.actor.policy_loss.troll"
LOSS_MODE = "troll"
PLUGIN_MODULE = "verl_troll.plugin"
ROLLOUT_MODULE = "verl_troll.plugin.rollout"
# What makes vLLM and SGLang decode speculatively, among their own settings.
_SPECULATION = ("speculative_config", "speculative_algorithm")
TRAINER_MODES = ("sync", "colocate_async", "separate_async")
# Rollout engines that can supply the old policy's support, from their top log-probabilities.
SUPPORT_ENGINES = ("vllm", "sglang", "hf")


class TrollConfigError(ValueError):
    """A setting is out of range, or not supported with the host's settings."""


def refusal(key: str, value: object, allowed: str, hint: str = "") -> TrollConfigError:
    """The error for an unsupported host setting: its key and value, what is allowed, what to do."""
    return TrollConfigError(f"{key}={value!r} is not supported with TROLL: allowed is {allowed}. {hint}".rstrip())


@dataclass
class RolloutSettings(BaseConfig):
    """verl's rollout settings, checked when the rollout engine supplies the support (``+troll=rollout_support``).

    ``support_wanted`` is the request to the servers (``rollout.custom.troll``), None without that group;
    ``engine_kwargs`` are the engines' own settings by engine, which come after verl's.
    """

    name: str | None = None
    top_p: float = 1.0
    top_k: int = -1
    repetition_penalty: float = 1.0
    logprobs_mode: str | None = "processed_logprobs"
    calculate_log_probs: bool = False
    disaggregation: bool = False
    speculative_decoding: bool = False
    engine_kwargs: Any = None
    support_wanted: Any = None
    correction_weights: str | None = None
    correction_rejection: str | None = None

    def check_bypass(self) -> None:
        """Raise :class:`TrollConfigError` unless the engine supplies the support and it is the policy's own."""
        rollout = "actor_rollout_ref.rollout"
        correction = "algorithm.rollout_correction"
        if self.support_wanted is None:
            can_supply = self.name in SUPPORT_ENGINES
            raise refusal(
                f"{correction}.bypass_mode",
                True,
                "False",
                "Bypass mode skips the pass that computes the old policy's support."
                + (
                    " To take it from the rollout engine, write +troll=rollout_support in the place of +troll=default."
                    if can_supply
                    else ""
                ),
            )
        # verl makes both spellings the same option.
        own = {
            str(name).replace("-", "_"): value
            for name, value in ((self.engine_kwargs or {}).get(self.name) or {}).items()
        }
        own_key = f"{rollout}.engine_kwargs.{self.name}"
        with_engine = "with the old policy from the rollout engine"
        for key, value, allowed, hint in (
            (f"{rollout}.name", self.name, SUPPORT_ENGINES, "Other engines do not return top log-probabilities."),
            (f"{rollout}.top_p", self.top_p, (1.0,), "Below 1 tokens are not sampled from the policy."),
            (f"{rollout}.top_k", self.top_k, (-1,), "Otherwise tokens are not sampled from the policy."),
            (f"{rollout}.repetition_penalty", self.repetition_penalty, (1.0,), ""),
            (
                f"{rollout}.logprobs_mode",
                self.logprobs_mode,
                ("processed_logprobs",),
                "Raw log-probabilities are those before the temperature.",
            ),
            (f"{rollout}.calculate_log_probs", self.calculate_log_probs, (True,), ""),
            (f"{rollout}.disaggregation.enabled", self.disaggregation, (False,), ""),
            ("actor_rollout_ref.model.mtp.enable_rollout", self.speculative_decoding, (False,), ""),
            *((f"{own_key}.{name}", own.get(name) or None, (None,), "") for name in _SPECULATION),
            (
                f"{own_key}.logprobs_mode",
                own.get("logprobs_mode"),
                (None, "processed_logprobs"),
                "Raw log-probabilities are those before the temperature.",
            ),
            (f"{correction}.rollout_is", self.correction_weights, (None,), "In bypass mode it would have no effect."),
            (f"{correction}.rollout_rs", self.correction_rejection, (None,), "In bypass mode it would have no effect."),
        ):
            if value not in allowed:
                raise refusal(key, value, f"{' or '.join(map(str, allowed))} {with_engine}", hint)


@dataclass
class HostSettings(BaseConfig):
    """What TROLL depends on elsewhere in the configuration, read by interpolation, never set here.

    ``baseline`` is the loss that ``+baseline=...`` sets, ``misplaced`` a key ``troll`` that nothing else reads.
    """

    trainer_mode: str = "sync"
    bypass_mode: bool = False
    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    distillation: bool = False
    multi_token_prediction: bool = False
    external_lib: Any = None
    baseline: str | None = None
    misplaced: Any = None

    def check(self) -> None:
        """Raise :class:`TrollConfigError` for the first setting that TROLL does not support."""
        if self.baseline is not None:
            raise TrollConfigError(
                f"+baseline={self.baseline} and +troll=... each set the policy loss. Leave out one: "
                f"+baseline={self.baseline} to train with TROLL, +troll=... to train with {self.baseline}."
            )
        if self.misplaced is not None:
            raise TrollConfigError(f"troll={self.misplaced!r}: nothing reads this key. Write {PREFIX}.NAME=VALUE.")
        if self.bypass_mode:
            self.rollout.check_bypass()
        if self.trainer_mode not in TRAINER_MODES:
            raise refusal(
                "trainer.v1.trainer_mode",
                self.trainer_mode,
                " or ".join(TRAINER_MODES),
                "A trainer of your own is not tested."
                + ("" if self.bypass_mode else " It must compute old log-probs in the actor."),
            )
        if self.rollout.support_wanted is not None and not self.bypass_mode:
            raise refusal(
                "algorithm.rollout_correction.bypass_mode",
                False,
                "True with +troll=rollout_support",
                "To compute the old policy in the actor, write +troll=default.",
            )
        if self.distillation:
            raise refusal(
                "distillation.enabled",
                self.distillation,
                "False",
                "Distillation uses the same hook on the logits.",
            )
        libraries = [self.external_lib] if isinstance(self.external_lib, str) else list(self.external_lib or [])
        needed = [PLUGIN_MODULE, *([ROLLOUT_MODULE] if self.bypass_mode else [])]
        if not set(needed) <= set(libraries):
            raise refusal(
                "actor_rollout_ref.model.external_lib",
                self.external_lib,
                f"a list that holds {' and '.join(needed)}",
                f"Write 'actor_rollout_ref.model.external_lib=[your.module,{','.join(needed)}]'.",
            )


@dataclass
class TrollConfig(BaseConfig):
    """Settings of the method, under ``actor_rollout_ref.actor.policy_loss.troll``.

    Attributes:
        kl_bound: eps, maximum KL(pi || q) of a token, in nats; above 0.
        alpha: weight of the regression term KL(p || stop_gradient(pi)); at least 0.
        k: maximum number of ids kept of a policy; from 1 to 32766.
        dropped_mass: probability mass that the kept ids may leave out; in [0, 1).
        support: ``union`` (as published) or ``anchored`` (old ids and one outcome for the rest).
        max_log_ratio: limit of a token's log-ratio, in nats, on both sides; above 0.
        importance_ratio: ``token``, or ``sequence`` for GSPO.
        step_size_gradient: ``implicit`` (through the step size, as published) or ``detached``.
        one_sided: tokens that left the region against their advantage keep the unprojected ratio; not in the paper.
        reuse_logits: write the gradient over the logits to save a tensor of their size.
        kernels: ``auto`` (Triton on GPUs, torch elsewhere) or ``torch``.
        host: verl settings, for the start-up checks.
    """

    kl_bound: float = 0.05
    alpha: float = 1.0
    k: int = 64
    dropped_mass: float = 1e-5
    support: str = "union"
    max_log_ratio: float = 10.0
    importance_ratio: str = "token"
    step_size_gradient: str = "implicit"
    one_sided: bool = False
    reuse_logits: bool = True
    kernels: str = "auto"
    host: HostSettings = field(default_factory=HostSettings)

    def __post_init__(self) -> None:
        """Raise :class:`TrollConfigError` naming the first setting that is out of range."""
        self._check_number("kl_bound", 0, math.inf, "a finite number above 0 (nats)", low_open=True)
        self._check_number("alpha", 0, math.inf, "a finite number of at least 0")
        self._check_number("max_log_ratio", 0, 80, "a number above 0 and below 80 (nats)", low_open=True)
        self._check_number("dropped_mass", 0, 1, "a number of at least 0 and below 1")
        if isinstance(self.k, bool) or not isinstance(self.k, int) or not 1 <= self.k <= wire.MAX_K:
            self._reject("k", f"an integer from 1 to {wire.MAX_K}")
        for name, choices in (
            ("support", tuple(RULES)),
            ("importance_ratio", IMPORTANCE_RATIOS),
            ("step_size_gradient", STEP_SIZE_GRADIENTS),
            ("kernels", FORMS),
            ("one_sided", (True, False)),
            ("reuse_logits", (True, False)),
        ):
            if getattr(self, name) not in choices:
                self._reject(name, f"one of {', '.join(map(str, choices))}")

    @property
    def announcement(self) -> str:
        """One line that says that TROLL trains, and with which settings."""
        names = [one.name for one in fields(self) if one.name not in ("_target_", "host")]
        source = "rollout engine" if self.host.bypass_mode else "actor"
        settings = ", ".join(f"{name}={getattr(self, name)}" for name in names)
        return f"TROLL is on: {settings}, old policy from the {source}"

    @property
    def selection(self) -> Selection:
        """How many ids of a policy are kept."""
        return Selection(self.k, self.dropped_mass)

    @property
    def form(self) -> Form:
        """The setting ``kernels``, as :mod:`verl_troll.core` takes it."""
        return self.kernels  # type: ignore[return-value]

    def _check_number(self, name: str, low: float, high: float, allowed: str, low_open: bool = False) -> None:
        value = getattr(self, name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not (low < value if low_open else low <= value) or not value < high:
            self._reject(name, allowed)

    def _reject(self, name: str, allowed: str) -> None:
        raise TrollConfigError(f"{PREFIX}.{name}={getattr(self, name)!r}: allowed is {allowed}")
