"""One run of the study: its definition, and its command line for verl."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.study.tasks import NAMES, PRETRAINED, TASKS

ROOT = Path(__file__).resolve().parents[2]
TASKS_FOLDER = ROOT / "runs" / "study" / "tasks"

PROMPTS, SAMPLES = 16, 8
"""Prompts per step, unless a run has its own, and samples per prompt."""
TEST_EVERY = 5
"""Steps between evaluations, of :data:`PROMPTS` prompts each; fewer if steps are larger."""

PRETRAINED_PROMPTS, PRETRAINED_SAMPLES = 8, 8
"""Prompts per step and samples per prompt with a pretrained model."""
PRETRAINED_ROWS = 16
"""Samples per forward and backward pass with a pretrained model."""
PRETRAINED_EVALUATIONS = 3
"""Evaluations of a pretrained model in training, besides the one before."""
PROBED_K = (16, 64, 256)
"""Support sizes at which :mod:`benchmarks.study.probe` looks at a pretrained model."""

TRAINERS = ("study", "separate_async")
"""The study's own (:mod:`benchmarks.study.trainer`), and verl's asynchronous one as it is."""

DEVICES = ("cpu", "cuda")

_ACTOR = "actor_rollout_ref.actor"
_TROLL = f"{_ACTOR}.policy_loss.troll"
_WIDE_OPEN = "1e9"


def _with_regression(loss: str, *, low: float, high: float, c: float) -> tuple[str, ...]:
    """``+baseline=loss``, plus TROLL's regression (:mod:`benchmarks.study.losses`)."""
    return (
        "+troll=default",
        f"{_ACTOR}._target_=benchmarks.study.losses.RegressionActorConfig",
        f"{_ACTOR}.policy_loss.loss_mode={loss}_regression",
        "actor_rollout_ref.model.external_lib=[verl_troll.plugin,benchmarks.study.losses]",
        f"{_ACTOR}.clip_ratio_low={low}",
        f"{_ACTOR}.clip_ratio_high={high}",
        f"{_ACTOR}.clip_ratio_c={c}",
    )


LOSSES: dict[str, tuple[str, ...]] = {
    "clip": ("+baseline=vanilla",),
    "clip_higher": ("+baseline=vanilla", f"{_ACTOR}.clip_ratio_high=0.28"),
    "none": (
        "+baseline=vanilla",
        f"{_ACTOR}.clip_ratio_low={_WIDE_OPEN}",
        f"{_ACTOR}.clip_ratio_high={_WIDE_OPEN}",
        f"{_ACTOR}.clip_ratio_c={_WIDE_OPEN}",
    ),
    "gspo": ("+baseline=gspo",),
    "gspo_wide": ("+baseline=gspo", f"{_ACTOR}.clip_ratio_low=0.2", f"{_ACTOR}.clip_ratio_high=0.2"),
    "cispo": ("+baseline=cispo",),
    "sapo": ("+baseline=sapo",),
    "dppo_kl": ("+baseline=dppo_kl",),
    "dppo_tv": ("+baseline=dppo_tv",),
    "union": ("+troll=default",),
    "anchored": ("+troll=default", f"{_TROLL}.support=anchored"),
    "union_sequence": ("+troll=sequence", f"{_ACTOR}.loss_agg_mode=seq-mean-token-mean"),
    "clip_regression": _with_regression("vanilla", low=0.2, high=0.2, c=3.0),
    "dppo_kl_regression": _with_regression("dppo_kl", low=0.05, high=0.05, c=10000.0),
}
"""Arms of the study, as overrides for verl. ``none`` is the plain ratio without a trust region."""


def _on(device: str) -> list[str]:
    """Settings for a device: float32 and verl's FSDP2 engine on each, so that runs differ by rounding alone."""
    if device == "cpu":
        return ["+cpu=default"]
    return [
        "+embedded=default",
        f"{_ACTOR}.strategy=fsdp2",
        f"{_ACTOR}.fsdp_config.use_torch_compile=False",
        f"+{_ACTOR}.fsdp_config.mixed_precision={{param_dtype:fp32}}",
        "actor_rollout_ref.rollout.dtype=float32",
        "+ray_kwargs.ray_init.object_store_memory=1000000000",
    ]


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        task: name in :data:`benchmarks.study.tasks.NAMES`.
        loss: name in :data:`LOSSES`.
        lr: Adam's constant learning rate.
        seed: seed for the data order and for sampling.
        estimator: Hydra group ``estimator``.
        mini_batches: optimizer steps per batch and epoch.
        epochs: passes over each batch.
        staleness: training steps between sampling and training; in ``separate_async`` how many batches are sampled
            ahead, which bounds them.
        old_policy: ``rescored`` or ``behaviour``.
        temperature: temperature of sampling and training.
        steps: number of training steps.
        settings: further settings, each ``key=value``; ``troll.NAME=VALUE`` sets one of TROLL's.
        prompts: prompts per step.
        trainer: one of :data:`TRAINERS`.
    """

    task: str
    loss: str
    lr: float
    seed: int
    estimator: str = "grpo"
    mini_batches: int = 8
    epochs: int = 1
    staleness: int = 0
    old_policy: str = "rescored"
    temperature: float = 1.0
    steps: int = 50
    settings: tuple[str, ...] = ()
    prompts: int = PROMPTS
    trainer: str = TRAINERS[0]

    def __post_init__(self) -> None:
        """Raise :class:`ValueError` if the run is impossible."""
        if self.task not in NAMES:
            raise ValueError(f"task={self.task!r}: must be one of {', '.join(NAMES)}")
        if self.loss not in LOSSES:
            raise ValueError(f"loss={self.loss!r}: must be one of {', '.join(LOSSES)}")
        if self.old_policy not in ("rescored", "behaviour"):
            raise ValueError(f"old_policy={self.old_policy!r}: must be rescored or behaviour")
        if self.trainer not in TRAINERS:
            raise ValueError(f"trainer={self.trainer!r}: must be one of {', '.join(TRAINERS)}")
        if self.mini_batches < 1 or self.prompts < 1 or self.prompts % self.mini_batches:
            raise ValueError(f"mini_batches={self.mini_batches}: must divide the {self.prompts} prompts of a step")
        if self.lr <= 0 or self.epochs < 1 or self.staleness < 0 or self.steps < 1:
            raise ValueError(f"{self}: lr must be above 0, epochs and steps at least 1, staleness at least 0")

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Cell:
        """Inverse of :meth:`to_json`."""
        return cls(**{**fields, "settings": tuple(fields.get("settings", ()))})

    def to_json(self) -> dict[str, Any]:
        """Fields as JSON values, without ``prompts`` and ``trainer`` at their defaults: older runs keep their keys."""
        fields = {**dataclasses.asdict(self), "settings": list(self.settings)}
        if self.prompts == PROMPTS:
            del fields["prompts"]
        if self.trainer == TRAINERS[0]:
            del fields["trainer"]
        return fields

    @property
    def is_asynchronous(self) -> bool:
        """Whether verl's asynchronous trainer runs it."""
        return self.trainer == "separate_async"

    @property
    def key(self) -> str:
        """Unique id, the same for equal runs."""
        text = json.dumps(self.to_json(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def arm(self) -> str:
        """The loss and its changed settings."""
        return " ".join((self.loss, *(setting.removeprefix("troll.") for setting in self.settings)))

    @property
    def regime(self) -> str:
        """Short code for how the batches are used."""
        parts = [f"M{self.mini_batches}", f"E{self.epochs}"]
        if self.prompts != PROMPTS:
            parts.append(f"P{self.prompts}")
        if self.staleness:
            lag = "ahead" if self.is_asynchronous else "stale"
            parts.append(f"{lag}{self.staleness}-{self.old_policy}")
        if self.temperature != 1:
            parts.append(f"T{self.temperature:g}")
        return " ".join(parts)

    @property
    def name(self) -> str:
        """Human-readable name."""
        return f"{self.task} {self.estimator} {self.arm} lr {self.lr:g} {self.regime} seed {self.seed}"

    @property
    def uses_troll(self) -> bool:
        """Whether the run loads the plugin."""
        return any(word.startswith("+troll") for word in LOSSES[self.loss])

    @property
    def session(self) -> tuple[Any, ...]:
        """Settings fixed at process start; runs that agree on them can share processes."""
        own = (self.key,) if self.is_asynchronous else ()
        return (self.task, self.uses_troll, self.estimator, self.temperature, *own)

    def overrides(self, tasks: Path = TASKS_FOLDER, device: str = DEVICES[0]) -> list[str]:
        """Overrides for verl's command line.

        Args:
            tasks: folder that holds the task's folder, made by :func:`benchmarks.study.prepare.prepare`.
            device: one of :data:`DEVICES`.

        Raises:
            ValueError: the run needs the CPU.
        """
        if device != "cpu" and (self.is_asynchronous or self.estimator == "ppo"):
            raise ValueError(
                f"device={device!r}: the trainer separate_async, which needs a second device, and the estimator ppo, "
                "whose critic has no settings for it here, run on the cpu alone"
            )
        data = tasks / self.task
        task = TASKS.get(self.task) or PRETRAINED[self.task]
        mini_batch = self.prompts // self.mini_batches
        chosen = [
            *_on(device),
            f"+estimator={self.estimator}",
            *self._loss(),
            f"data.train_files={data / 'train.parquet'}",
            f"data.val_files={data / 'held_out.parquet'}",
            f"data.train_batch_size={self.prompts}",
            f"data.seed={self.seed}",
            f"data.max_prompt_length={task.prompt_length}",
            f"data.max_response_length={task.response_length}",
            f"actor_rollout_ref.model.path={data / 'model'}",
            "actor_rollout_ref.model.use_remove_padding=False",
            f"{_ACTOR}.optim.lr={self.lr}",
            f"{_ACTOR}.optim.weight_decay=0",
            f"{_ACTOR}.ppo_mini_batch_size={mini_batch}",
            f"{_ACTOR}.ppo_micro_batch_size_per_gpu={mini_batch * SAMPLES}",
            f"{_ACTOR}.ppo_epochs={self.epochs}",
            f"actor_rollout_ref.rollout.n={SAMPLES}",
            f"actor_rollout_ref.rollout.seed={self.seed}",
            f"actor_rollout_ref.rollout.temperature={self.temperature}",
            f"actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu={self.prompts * SAMPLES}",
            f"actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu={self.prompts * SAMPLES}",
            "actor_rollout_ref.rollout.calculate_log_probs=True",
            # Measure the trained policy itself: sampled, not greedy.
            "actor_rollout_ref.rollout.val_kwargs.do_sample=True",
            f"actor_rollout_ref.rollout.val_kwargs.temperature={self.temperature}",
            "actor_rollout_ref.rollout.val_kwargs.top_p=1.0",
            f"reward.custom_reward_function.path={Path(__file__).with_name('reward.py')}",
            "trainer.logger=[file]",
            "trainer.val_before_train=True",
            f"trainer.test_freq={max(1, TEST_EVERY * PROMPTS // self.prompts)}",
            "trainer.save_freq=-1",
            "trainer.resume_mode=disable",
            f"trainer.total_training_steps={self.steps}",
            "trainer.total_epochs=1000000",
            *(self._asynchronous() if self.is_asynchronous else self._delayed()),
        ]
        if self.task in PRETRAINED:
            # Later words win.
            chosen += self._for_a_pretrained_model(mini_batch)
        if self.estimator == "ppo":
            chosen += [f"critic.optim.lr={self.lr}", f"critic.ppo_mini_batch_size={mini_batch}"]
        return [
            *chosen,
            *(s.replace("troll.", f"{_TROLL}.", 1) if s.startswith("troll.") else s for s in self.settings),
        ]

    def _loss(self) -> list[str]:
        from_rollout = self.is_asynchronous and self.old_policy == "behaviour"
        return [
            word.replace("+troll=default", "+troll=rollout_support") if from_rollout else word
            for word in LOSSES[self.loss]
        ]

    def _delayed(self) -> list[str]:
        return [f"+study.staleness={self.staleness}", f"+study.old_policy={self.old_policy}"]

    def _asynchronous(self) -> list[str]:
        """Sampling on a device of its own, weights sent once per batch."""
        rollout, mode = "actor_rollout_ref.rollout", "trainer.v1.separate_async"
        sampled = self.old_policy == "behaviour"
        return [
            f"algorithm.rollout_correction.bypass_mode={sampled}",
            "trainer.v1.trainer_mode=separate_async",
            f"{mode}.parameter_sync_step={self.mini_batches}",
            f"{mode}.num_warmup_batches={self.staleness}",
            # It re-scores a mini-batch at a time.
            f"{rollout}.log_prob_micro_batch_size_per_gpu={self.prompts // self.mini_batches * SAMPLES}",
            f"{rollout}.nnodes=1",
            f"{rollout}.n_gpus_per_node=1",
            f"{rollout}.checkpoint_engine.backend=ray_object_store",
            f"{rollout}.checkpoint_engine.custom_backend_module=verl_troll.cpu.checkpoint_engine",
            "ray_kwargs.ray_init.num_gpus=2",
        ]

    def _for_a_pretrained_model(self, mini_batch: int) -> list[str]:
        """Fewer samples, in small pieces: with 49,152 ids the logits of a token take 200 kB."""
        rollout, rows = "actor_rollout_ref.rollout", PRETRAINED_ROWS
        return [
            f"{rollout}.n={PRETRAINED_SAMPLES}",
            "actor_rollout_ref.model.use_remove_padding=True",
            f"{_ACTOR}.ppo_micro_batch_size_per_gpu={min(rows, mini_batch * PRETRAINED_SAMPLES)}",
            f"{rollout}.log_prob_micro_batch_size_per_gpu={rows}",
            f"actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu={rows}",
            f"trainer.test_freq={max(1, self.steps // PRETRAINED_EVALUATIONS)}",
            "+study.greedy=True",
            f"+study.probe={list(PROBED_K)}".replace(" ", ""),
        ]
