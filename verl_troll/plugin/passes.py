"""The two passes over the actor's logits: the old policy's support, and the projected update.

Each is a callable in two roles, as verl's distillation loss is (``verl.trainer.distillation.losses``). verl first
calls it with the temperature-scaled logits (``student_logits``) and stores the per-token tensors that it returns, then
as the loss, with those in ``model_output``. verl's own cross-entropy is skipped (``distillation_only``): log-probs
come from the same normaliser as everything else, and nothing overwrites the logits in between.

Under Ulysses each rank holds a window of the packed sequence. No collectives otherwise.

Shapes: N packed positions on this rank, V vocabulary, M response tokens that take part in the loss.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor
from verl.utils.metric import AggregationType, Metric
from verl.utils.ulysses import (
    gather_outputs_and_unpad,
    get_ulysses_sequence_parallel_group,
    get_ulysses_sequence_parallel_rank,
    get_ulysses_sequence_parallel_world_size,
)
from verl.workers.utils.padding import no_padding_2_padding

from verl_troll.logits import log_normaliser, log_probs_at
from verl_troll.objective import token_terms
from verl_troll.plugin import carry
from verl_troll.plugin.metrics import as_metrics, token_statistics
from verl_troll.plugin.policy_loss import ProjectedTerms, projected_terms
from verl_troll.plugin.settings import TrollConfig
from verl_troll.support import SparsePolicy, compare, select

LossFunction = Callable[..., tuple[Tensor, dict[str, Any]]]

_LOG_RATIO = "troll_log_ratio"
_REGRESSION_KL = "troll_regression_kl"
_PROJECTED = "troll_projected"


class _Window:
    """This rank's part of the packed sequence."""

    def __init__(self, positions: int, total: int) -> None:
        self.positions = positions
        self.ranks = get_ulysses_sequence_parallel_world_size()
        self.start = get_ulysses_sequence_parallel_rank() * positions if self.ranks > 1 else 0
        self.padding = self.ranks * positions - total

    def local(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Which of ``rows`` lie in the window (bool), and where those do (int64)."""
        shifted = rows - self.start
        inside = (shifted >= 0) & (shifted < self.positions)
        return inside, shifted[inside]

    def spread(self, rows: Tensor, values: Tensor, fill: float = 0.0) -> Tensor:
        """``[positions, ...]`` with ``values`` at local ``rows``; gradients flow to ``values``."""
        full = values.new_full((self.positions, *values.shape[1:]), fill)
        return full.index_copy(0, rows, values)

    def gather(self, values: Tensor) -> Tensor:
        """``[total, ...]`` from every rank's ``[positions, ...]``: one all-gather under Ulysses."""
        gathered: Tensor = gather_outputs_and_unpad(values, gather_dim=0, unpad_dim=0, padding_size=self.padding)
        return gathered


class _LogitsPass(ABC):
    """The two roles, told apart as verl does it: by whether logits are given."""

    def __call__(
        self,
        model_output: dict[str, Tensor] | None = None,
        data: TensorDict | None = None,
        dp_group: dist.ProcessGroup | None = None,
        student_logits: Tensor | None = None,
        data_format: str = "thd",
    ) -> Any:
        """Per-token tensors ``[1, N]`` by name from logits ``[1, N, V]``; without logits, the loss and its metrics."""
        if data is None:
            raise TypeError("data is missing")
        if student_logits is not None:
            return self._read_logits(student_logits.squeeze(0), data)
        if model_output is None:
            raise TypeError("model_output is missing")
        return self._loss(model_output, data, dp_group)

    @abstractmethod
    def _read_logits(self, logits: Tensor, data: TensorDict) -> dict[str, Tensor]: ...

    @abstractmethod
    def _loss(
        self, model_output: dict[str, Tensor], data: TensorDict, dp_group: dist.ProcessGroup | None
    ) -> tuple[Tensor, dict[str, Any]]: ...


class OldPolicyPass(_LogitsPass):
    """Takes the place of the missing loss function in the old-log-prob pass; adds the support to its output."""

    def __init__(self, settings: TrollConfig) -> None:
        self.settings = settings
        self._support: tuple[_Window, carry.ResponseTokens, Tensor, SparsePolicy] | None = None

    def _read_logits(self, logits: Tensor, data: TensorDict) -> dict[str, Tensor]:
        tokens = carry.response_tokens(data)
        window = _Window(logits.shape[0], data["input_ids"].values().shape[0])
        inside, rows = window.local(tokens.rows)
        ids, mask = tokens.ids[inside], tokens.mask[inside]
        vocab_size = logits.shape[-1]
        log_z = log_normaliser(logits, rows, vocab_size)
        log_probs = log_probs_at(logits, rows, ids.unsqueeze(-1), log_z, vocab_size).squeeze(-1)
        policy = select(
            logits,
            rows[mask],
            ids[mask],
            k=self.settings.k,
            dropped_mass=self.settings.dropped_mass,
            log_z=log_z[mask],
        )
        self._support = (window, tokens, rows[mask], policy)
        return {"log_probs": window.spread(rows, log_probs).unsqueeze(0)}

    def _loss(
        self, model_output: dict[str, Tensor], data: TensorDict, dp_group: dist.ProcessGroup | None
    ) -> tuple[Tensor, dict[str, Any]]:
        # verl stores what is in model_output once its loss function has returned.
        model_output.update(self._packed_support())
        return torch.ones((), device=data["input_ids"].device), {}

    def _packed_support(self) -> dict[str, Tensor]:
        if self._support is None:
            raise RuntimeError("the engine never showed its logits: this verl no longer calls the logits hook")
        window, tokens, rows, policy = self._support
        self._support = None
        ids, log_probs = policy.ids, policy.log_probs
        if window.ranks > 1:
            wanted = tokens.rows[tokens.mask]
            ids = window.gather(window.spread(rows, ids, fill=-1))[wanted]
            log_probs = window.gather(window.spread(rows, log_probs, fill=-torch.inf))[wanted]
        return carry.pack(ids, log_probs, tokens)


class UpdatePass(_LogitsPass):
    """Wraps verl's loss function in the update."""

    def __init__(self, settings: TrollConfig, inner: LossFunction) -> None:
        self.settings = settings
        self.inner = inner
        self._statistics: tuple[Tensor, Tensor] | None = None

    def _read_logits(self, logits: Tensor, data: TensorDict) -> dict[str, Tensor]:
        settings = self.settings
        tokens = carry.response_tokens(data)
        old = carry.unpack(data, tokens)
        window = _Window(logits.shape[0], data["input_ids"].values().shape[0])
        inside, rows = window.local(tokens.rows[tokens.mask])
        comparison = compare(
            settings.support,  # type: ignore[arg-type]
            logits,
            rows,
            SparsePolicy(old.ids[inside], old.log_probs[inside], old.sampled[inside]),
            k=settings.k,
            dropped_mass=settings.dropped_mass,
        )
        terms = token_terms(comparison, settings.kl_bound, settings.step_size_gradient)  # type: ignore[arg-type]
        self._statistics = token_statistics(comparison, terms, settings.kl_bound)
        return {
            name: window.spread(rows, values).unsqueeze(0)
            for name, values in (
                ("log_probs", comparison.sampled_log_probs),
                (_LOG_RATIO, terms.log_ratio),
                (_REGRESSION_KL, terms.regression_kl),
                (_PROJECTED, terms.projected.to(terms.log_ratio.dtype)),
            )
        }

    def _loss(
        self, model_output: dict[str, Tensor], data: TensorDict, dp_group: dist.ProcessGroup | None
    ) -> tuple[Tensor, dict[str, Any]]:
        if self._statistics is None:
            raise RuntimeError("the engine never showed its logits: this verl no longer calls the logits hook")
        sums, maxima = self._statistics
        self._statistics = None
        terms = ProjectedTerms(
            settings=self.settings,
            log_ratio=no_padding_2_padding(model_output.pop(_LOG_RATIO), data),
            regression_kl=no_padding_2_padding(model_output.pop(_REGRESSION_KL), data),
            projected=no_padding_2_padding(model_output.pop(_PROJECTED), data),
        )
        with projected_terms(terms):
            loss, metrics = self.inner(model_output=model_output, data=data, dp_group=dp_group)
        if terms.regression_loss is None:
            raise RuntimeError(
                "the engine projected the policy, but the loss function did not use it: "
                "actor_rollout_ref.actor.policy_loss.loss_mode must be 'troll'"
            )
        if get_ulysses_sequence_parallel_world_size() > 1:
            group = get_ulysses_sequence_parallel_group()
            dist.all_reduce(sums, group=group)
            dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=group)
        metrics.update(as_metrics(sums, maxima, data["batch_num_tokens"], data["dp_size"]))
        metrics["troll/regression_loss"] = Metric(AggregationType.SUM, terms.regression_loss)
        return loss + terms.regression_loss, metrics
