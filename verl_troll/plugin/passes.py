"""The two passes over the actor's logits: the old policy's support, and the projected update.

verl calls each of them in two roles, like its distillation loss (``verl.trainer.distillation.losses``): first with the
temperature-scaled logits (``student_logits``), to get per-token tensors, then as the loss, with these tensors in
``model_output``. verl's own cross-entropy and entropy are skipped: both come from the same reading of the logits as
everything else, so that the gradient may be written over them.

Collectives per micro-batch: over the ranks that share the vocabulary, two in the old pass and in the update under
``union``, one in the update under ``anchored``, none in backward (:mod:`verl_troll.core.vocab`); over the ranks that
share the tokens, one all-reduce in the old pass, two small ones in the update.

Shapes: V local logit columns, R response tokens on this rank, M tokens (on all ranks) that take part in the loss.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils as tu
from verl.utils.metric import AggregationType, Metric

from verl_troll.core import kernels, wire
from verl_troll.core.lm_head import LinearHead
from verl_troll.core.logits import DenseLogits, LogitsSource
from verl_troll.core.loss import BatchTerms, PolicyTerms, policy_terms
from verl_troll.core.support import SparsePolicy, select
from verl_troll.core.vocab import VocabLogits, VocabShard
from verl_troll.plugin import carry
from verl_troll.plugin.layout import TokenLayout
from verl_troll.plugin.metrics import age_statistics, as_metrics, token_statistics
from verl_troll.plugin.policy_loss import ProjectedTerms, projected_terms
from verl_troll.plugin.settings import TrollConfig

LossFunction = Callable[..., tuple[Tensor, dict[str, Any]]]

_LOG_RATIO = "troll_log_ratio"
_REGRESSION_KL = "troll_regression_kl"
_PROJECTED = "troll_projected"
# verl's own metrics of a policy loss.
_SHIFT = ("actor/ppo_kl", "actor/pg_clipfrac", "actor/pg_clipfrac_lower")


def update_terms(settings: TrollConfig, logits: VocabLogits, old: SparsePolicy, *, entropy: bool) -> PolicyTerms:
    """:func:`verl_troll.core.loss.policy_terms` with these settings."""
    return policy_terms(
        settings.support,
        logits,
        old,
        settings.selection,
        kl_bound=settings.kl_bound,
        step_size_gradient=settings.step_size_gradient,  # type: ignore[arg-type]
        entropy=entropy,
    )


def _never_shown(data: TensorDict) -> str:
    """Why a pass that verl has ended has read nothing."""
    if tu.get_non_tensor_data(data, key="use_fused_kernels", default=False):
        return (
            "the model never showed its hidden states: its forward pass does not call the functions of verl's fused "
            "kernels that are known here. Set actor_rollout_ref.model.use_fused_kernels=False."
        )
    return "the engine never showed its logits: this verl no longer calls the logits hook"


class LogitsOwner(Protocol):
    """What a pass asks of the engine whose logits it reads."""

    def token_layout(self, shape: tuple[int, int], data: TensorDict, data_format: str) -> TokenLayout:
        """Which of the micro-batch's tokens the rows of logits with these leading dimensions hold."""
        ...

    def vocab_shard(self, columns: int) -> VocabShard:
        """The part of the vocabulary that logits with this many columns hold."""
        ...


class _LogitsPass(ABC):
    """Both roles; the one is meant if logits are given, as in verl.

    With fused kernels no logits are given. Then :meth:`read_head` is called inside the model, where verl would compute
    log-probs from hidden states, and returns its tensors stacked in place of those log-probs.
    """

    def __init__(self, settings: TrollConfig, owner: LogitsOwner, *, entropy: bool) -> None:
        self.settings = settings
        self.owner = owner
        self.entropy = entropy
        self._stacked: list[str] | None = None

    def __call__(
        self,
        model_output: dict[str, Tensor] | None = None,
        data: TensorDict | None = None,
        dp_group: dist.ProcessGroup | None = None,
        student_logits: Tensor | None = None,
        data_format: str = "thd",
    ) -> Any:
        """Per-token tensors ``[b, s]`` by name from logits ``[b, s, V]``; without logits, the loss and its metrics."""
        if data is None:
            raise TypeError("data is missing")
        if student_logits is not None:
            rows, columns, _ = student_logits.shape
            logits = DenseLogits(student_logits.flatten(0, 1), self.settings.reuse_logits, self.settings.form)
            return self._read(logits, (rows, columns), data, data_format)
        if model_output is None:
            raise TypeError("model_output is missing")
        if self._stacked is not None:
            stacked: Any = model_output.pop("log_probs")
            for name, values in zip(self._stacked, stacked.values().unbind(-1), strict=True):
                model_output[name] = torch.nested.nested_tensor_from_jagged(values, stacked.offsets())
            self._stacked = None
        return self._loss(model_output, data, dp_group)

    def read_head(self, head: LinearHead, shape: tuple[int, int], data: TensorDict, data_format: str) -> Tensor:
        """The same tensors from the head, stacked, ``[b, s, names]``; ``head`` has the ``b * s`` tokens."""
        tensors = self._read(head, shape, data, data_format)
        self._stacked = list(tensors)
        return torch.stack(list(tensors.values()), dim=-1)

    def _read(
        self, logits: LogitsSource, shape: tuple[int, int], data: TensorDict, data_format: str
    ) -> dict[str, Tensor]:
        layout = self.owner.token_layout(shape, data, data_format)
        rows, tensors = self._read_logits(logits, data, layout, self.owner.vocab_shard(logits.columns))
        return {name: layout.spread(rows, values) for name, values in tensors.items() if values is not None}

    @abstractmethod
    def _read_logits(
        self, logits: LogitsSource, data: TensorDict, layout: TokenLayout, shard: VocabShard
    ) -> tuple[Tensor, dict[str, Tensor | None]]:
        """Rows read, and per-token tensors at them."""

    @abstractmethod
    def _loss(
        self, model_output: dict[str, Tensor], data: TensorDict, dp_group: dist.ProcessGroup | None
    ) -> tuple[Tensor, dict[str, Any]]: ...


class OldPolicyPass(_LogitsPass):
    """Serves as the loss function of the old-log-prob pass, which has none, and adds the support to its output."""

    def __init__(self, settings: TrollConfig, owner: LogitsOwner, *, entropy: bool) -> None:
        super().__init__(settings, owner, entropy=entropy)
        self._support: tuple[TokenLayout, carry.ResponseTokens, Tensor, Tensor, Tensor] | None = None

    def _read_logits(
        self, logits: LogitsSource, data: TensorDict, layout: TokenLayout, shard: VocabShard
    ) -> tuple[Tensor, dict[str, Tensor | None]]:
        if shard.vocab_size > wire.MAX_VOCAB_SIZE:
            raise ValueError(
                f"the model has {shard.vocab_size} ids; the support is carried with at most {wire.MAX_VOCAB_SIZE}"
            )
        tokens = carry.response_tokens(data)
        here, rows = layout.local(tokens.rows)
        # verl also needs the log-probs and the entropy of masked response tokens.
        policy = select(
            VocabLogits(logits, rows, shard), tokens.ids[here], self.settings.selection, entropy=self.entropy
        )
        self._support = (layout, tokens, here, policy.ids, policy.log_probs)
        return rows, {"log_probs": policy.sampled_log_probs, "entropy": policy.entropy}

    def _loss(
        self, model_output: dict[str, Tensor], data: TensorDict, dp_group: dist.ProcessGroup | None
    ) -> tuple[Tensor, dict[str, Any]]:
        if self._support is None:
            raise RuntimeError(_never_shown(data))
        # verl stores what model_output holds when its loss function returns.
        model_output.update(self._packed_support())
        return torch.ones((), device=data["input_ids"].device), {}

    def _packed_support(self) -> dict[str, Tensor]:
        assert self._support is not None
        layout, tokens, here, ids, log_probs = self._support
        self._support = None
        if layout.group is not None:
            bits = log_probs.float().view(torch.int32)
            support = layout.gather(here, torch.stack([ids.to(torch.int32), bits], dim=-1), tokens.rows.shape[0])
            ids, log_probs = support[..., 0], support[..., 1].contiguous().view(torch.float32)
        return carry.pack(ids, log_probs, tokens)


class UpdatePass(_LogitsPass):
    """Wraps verl's loss function of the update."""

    def __init__(self, settings: TrollConfig, owner: LogitsOwner, inner: LossFunction, *, entropy: bool) -> None:
        super().__init__(settings, owner, entropy=entropy)
        self.inner = inner
        self.broken = 0
        """Tokens so far, of this rank, whose losses are not finite."""
        self._statistics: tuple[TokenLayout, Tensor, Tensor] | None = None
        self._unpacked: carry.Unpacked | None = None

    def _read_logits(
        self, logits: LogitsSource, data: TensorDict, layout: TokenLayout, shard: VocabShard
    ) -> tuple[Tensor, dict[str, Tensor | None]]:
        settings = self.settings
        tokens = carry.response_tokens(data)
        self._unpacked = carry.unpack(
            data,
            tokens,
            k=settings.k,
            vocab_size=shard.vocab_size,
            # Saves compilations, and the host need not wait to learn the largest.
            fixed_width=kernels.available(tokens.rows.device, settings.form),
            from_engine=settings.host.bypass_mode,
        )
        old = self._unpacked.policy
        here, rows = layout.local(tokens.rows[tokens.in_loss])
        if layout.group is not None:
            old = SparsePolicy(old.ids[here], old.log_probs[here], old.sampled[here])
        terms = update_terms(settings, VocabLogits(logits, rows, shard), old, entropy=self.entropy)
        sums, maxima = token_statistics(terms)
        trained_version = tu.get_non_tensor_data(data, key=carry.TRAINED_VERSION, default=None)
        ages = carry.token_ages(data, tokens, trained_version)
        if ages is not None:
            counts, largest = age_statistics(ages if layout.group is None else ages[here])
            sums, maxima = torch.cat([sums, counts.to(sums.dtype)]), torch.cat([maxima, largest.to(maxima.dtype)])
        self._statistics = (layout, sums, maxima)
        return rows, {
            "log_probs": terms.sampled_log_probs,
            "entropy": terms.entropy,
            _LOG_RATIO: terms.log_ratio,
            _REGRESSION_KL: terms.regression_kl,
            _PROJECTED: terms.projected,
        }

    def _loss(
        self, model_output: dict[str, Tensor], data: TensorDict, dp_group: dist.ProcessGroup | None
    ) -> tuple[Tensor, dict[str, Any]]:
        if self._statistics is None or self._unpacked is None:
            raise RuntimeError(_never_shown(data))
        layout, sums, maxima = self._statistics
        unpacked = self._unpacked
        self._statistics = self._unpacked = None
        packed = [model_output.pop(name).values() for name in (_LOG_RATIO, _REGRESSION_KL, _PROJECTED)]
        pad = unpacked.arrived.tokens.pad
        terms = ProjectedTerms(self.settings, lambda shape: BatchTerms(*(pad(values, shape) for values in packed)))
        with projected_terms(terms):
            loss, metrics = self.inner(model_output=model_output, data=data, dp_group=dp_group)
        if terms.losses is None:
            raise RuntimeError(
                "the engine projected the policy, but the loss function did not use it: "
                "actor_rollout_ref.actor.policy_loss.loss_mode must be 'troll', and a loss function of your own must "
                "call that policy loss, as verl's ppo_loss does"
            )
        if layout.group is not None:
            dist.all_reduce(sums, group=layout.group)
            dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=layout.group)
        # The only transfer to the host in this micro-batch.
        losses, dtype = terms.losses, sums.dtype
        scalars = torch.stack([unpacked.wrong.to(dtype), losses.regression.detach().to(dtype)])
        shift, projected, limited, broken, wrong, regression, *values = torch.cat(
            [losses.shift.to(dtype), losses.unusual.to(dtype), scalars, sums, maxima]
        ).tolist()
        unpacked.check(bool(wrong))
        self.broken += int(broken)
        # Dashboards read pg_clipfrac: under TROLL the projected share takes its place.
        for name, value in zip(_SHIFT, (shift, projected, 0.0), strict=True):
            metrics[name] = Metric(AggregationType.MEAN, value)
        tokens, ranks = data["batch_num_tokens"], data["dp_size"]
        values, largest = values[: len(sums)], values[len(sums) :]
        metrics.update(as_metrics(values, largest, [limited, broken], tokens, ranks, self.settings.kl_bound))
        metrics["troll/regression_loss"] = Metric(AggregationType.SUM, regression)
        return loss + losses.regression, metrics
