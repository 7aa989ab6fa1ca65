"""The mixin that adds TROLL to a verl engine. Without TROLL settings the engine behaves as verl's own."""

from __future__ import annotations

import contextlib
import logging
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_name
from verl.workers.engine import BaseEngine

from verl_troll.core import kernels
from verl_troll.core.lm_head import LinearHead
from verl_troll.core.logits import DenseLogits
from verl_troll.core.support import select
from verl_troll.core.vocab import VocabLogits, VocabShard
from verl_troll.plugin.engines import fused_head
from verl_troll.plugin.engines.padded_batches import KeptSupports, is_padded
from verl_troll.plugin.layout import TokenLayout
from verl_troll.plugin.passes import LossFunction, OldPolicyPass, UpdatePass, update_terms
from verl_troll.plugin.settings import PREFIX, TrollConfig, TrollConfigError

logger = logging.getLogger(__name__)

# Hugging Face settings that change the logits after the matrix product.
_LOGIT_TRANSFORMS = (
    "final_logit_softcapping",
    "logits_soft_cap",
    "output_logit_soft_cap",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
)


def check_kernels(settings: TrollConfig, device: torch.device) -> None:
    """Refuse a ``k`` that the kernels cannot hold, and warn if an accelerator runs the torch forms.

    Raises:
        TrollConfigError: ``kernels=auto`` and ``k`` above the kernels' maximum.
    """
    reason = kernels.why_torch(device, settings.k, settings.form)
    if reason is None:
        return
    if settings.kernels == "auto" and settings.k > kernels.MAX_K_OF_TERMS:
        raise TrollConfigError(
            f"{PREFIX}.k={settings.k}: on a GPU allowed is at most {kernels.MAX_K_OF_TERMS}, which the kernels can "
            f"hold. Lower it, or write {PREFIX}.kernels=torch, which is many times slower."
        )
    logger.warning(
        "TROLL runs in its torch forms on %s, since %s. On one H200 they took 111 to 122 milliseconds per 8,192 tokens "
        "and step where the kernels take 3 to 3.5, and the host waits for the device about ten times.",
        device.type,
        reason,
    )


@torch.no_grad()
def compile_kernels(settings: TrollConfig, columns: int, dtype: torch.dtype, device: torch.device) -> None:
    """Run an old pass and an update on two tokens, so that the first step compiles nothing."""
    logits = torch.zeros(2, columns, dtype=dtype, device=device)
    rows = torch.arange(2, device=device)
    old = select(VocabLogits.of(DenseLogits(logits, form=settings.form)), rows, settings.selection, entropy=True)
    for entropy in (False, True):
        leaf = torch.zeros_like(logits).requires_grad_()
        with torch.enable_grad():
            new = VocabLogits.of(DenseLogits(leaf, form=settings.form))
            terms = update_terms(settings, new, old, entropy=entropy)
            loss = (terms.log_ratio + terms.regression_kl).sum()
            torch.autograd.grad(loss if terms.entropy is None else loss + terms.entropy.sum(), leaf)


class TrollEngineMixin(BaseEngine):
    """Runs :class:`OldPolicyPass` and :class:`UpdatePass` on the logits of verl's engine."""

    _adapter_disabled = False
    _micro_batch: TensorDict
    _update: UpdatePass | None = None
    _kept: KeptSupports | None = None

    @property
    def troll(self) -> TrollConfig | None:
        """The actor's settings, as passed to its engine's configuration; None on other engines."""
        settings: TrollConfig | None = getattr(self.engine_config, "troll", None)
        return settings

    @abstractmethod
    def token_layout(self, shape: tuple[int, int], data: TensorDict, data_format: str) -> TokenLayout:
        """See :class:`verl_troll.plugin.passes.LogitsOwner`."""

    @abstractmethod
    def vocab_shard(self, columns: int) -> VocabShard:
        """See :class:`verl_troll.plugin.passes.LogitsOwner`."""

    @abstractmethod
    def head_inputs(self, hidden: Tensor) -> tuple[Tensor, str]:
        """Convert the fused kernels' hidden states to ``[b, s, D]``; also return the data format."""

    def within_head(self, read: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, weight: Tensor) -> Tensor:
        """Call ``read`` on the hidden states and the head's weight, where the weight is gathered."""
        return read(hidden, weight)

    @property
    @abstractmethod
    def head_module(self) -> Any:
        """The head's module, None if another pipeline stage holds it."""

    def initialize(self) -> None:
        """Initialize verl's engine, then check the kernels and compile them for this model."""
        super().initialize()
        settings = self.troll
        if settings is None or self.engine_config.forward_only:
            return
        device = torch.device(get_device_name())
        check_kernels(settings, device)
        weight = getattr(self.head_module, "weight", None)
        if kernels.available(device, settings.form) and weight is not None:
            dtype = getattr(self, "_autocast_dtype", weight.dtype)
            compile_kernels(settings, weight.shape[0], dtype, device)

    def check_head(self) -> None:
        """Refuse a head that is more than a matrix product: verl's fused kernels silently ignore the rest.

        Raises:
            ValueError: names what else the head does.
        """
        config = self.model_config.hf_config.get_text_config()
        extra = [name for name in _LOGIT_TRANSFORMS if getattr(config, name, None) not in (None, 1, 1.0)]
        if getattr(self.head_module, "bias", None) is not None:
            extra.append("a bias")
        if hasattr(self.head_module, "base_layer"):
            extra.append("an adapter")
        if extra:
            raise ValueError(
                f"actor_rollout_ref.model.use_fused_kernels=True: the head of {config.model_type} also has "
                f"{', '.join(extra)}, which verl's fused kernels leave out. Set it to False."
            )

    def forward_backward_batch(
        self, data: TensorDict, loss_function: LossFunction | None, forward_only: bool = False
    ) -> Any:
        """verl's pass. In the old-log-prob pass and in the update, TROLL reads the logits."""
        settings = self.troll
        # With LoRA, the reference pass may run on this engine too.
        if settings is not None and not self.engine_config.forward_only and not self._adapter_disabled:
            entropy = bool(tu.get_non_tensor_data(data, key="calculate_entropy", default=False))
            if not forward_only:
                if loss_function is None:
                    raise TypeError("loss_function is missing")
                loss_function = self._update = UpdatePass(settings, self, loss_function, entropy=entropy)
            elif loss_function is None:
                loss_function = OldPolicyPass(settings, self, entropy=entropy)
            if isinstance(loss_function, OldPolicyPass | UpdatePass):
                return self._read(loss_function, data, forward_only)
        return super().forward_backward_batch(data, loss_function, forward_only=forward_only)

    def _read(self, reader: OldPolicyPass | UpdatePass, data: TensorDict, forward_only: bool) -> Any:
        kept = self._kept = self._kept or KeptSupports()
        if is_padded(data) and isinstance(reader, UpdatePass):
            kept.add_to(data)
        with self._shown_to(reader, data):
            output = super().forward_backward_batch(data, reader, forward_only=forward_only)
        if is_padded(data) and isinstance(reader, OldPolicyPass):
            kept.keep(data, output.get("model_output", {}))
        return output

    def optimizer_step(self) -> float:
        """verl's step; skipped, on all ranks, if the loss of a token is infinite or NaN on any of them.

        verl's FSDP engine skips steps whose gradient is not finite, its Megatron engine takes them. One all-reduce of a
        number over all ranks.

        Returns:
            The gradient's norm before clipping; NaN if the step was skipped.
        """
        update, self._update = self._update, None
        if update is not None:
            # Ranks that share tokens count them more than once.
            broken = torch.tensor(update.broken, device=get_device_name())
            if dist.is_initialized():
                dist.all_reduce(broken, op=dist.ReduceOp.MAX)
            if int(broken):
                logger.warning("optimizer step skipped: tokens' losses are infinite or NaN (troll/nonfinite)")
                return math.nan
        grad_norm: float = super().optimizer_step()
        return grad_norm

    @contextlib.contextmanager
    def _shown_to(self, reader: OldPolicyPass | UpdatePass, data: TensorDict) -> Iterator[None]:
        """Route logits (hidden states with fused kernels) to ``reader``, which also computes the entropy."""
        tu.assign_non_tensor(data, calculate_entropy=False)
        try:
            if tu.get_non_tensor_data(data, key="use_fused_kernels", default=False):
                self.check_head()
                with fused_head.reading(partial(self._read_head, reader)):
                    yield
            else:
                tu.assign_non_tensor(data, distillation_use_topk=True, distillation_only=True)
                yield
        finally:
            tu.assign_non_tensor(data, calculate_entropy=reader.entropy)

    def _read_head(
        self, reader: OldPolicyPass | UpdatePass, hidden: Tensor, weight: Tensor, temperature: float
    ) -> Tensor:
        hidden, data_format = self.head_inputs(hidden)

        def read(hidden: Tensor, weight: Tensor) -> Tensor:
            head = LinearHead(hidden.flatten(0, 1).to(weight.dtype), weight, temperature, reader.settings.form)
            return reader.read_head(head, (hidden.shape[0], hidden.shape[1]), self._micro_batch, data_format)

        return self.within_head(read, hidden, weight)

    def prepare_model_inputs(self, micro_batch: TensorDict) -> Any:
        """verl's inputs. Keeps the micro-batch for readers that run inside the model."""
        self._micro_batch = micro_batch
        return super().prepare_model_inputs(micro_batch)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """verl's context. Sets a flag, because a pass without the adapter is the reference's."""
        with super().disable_adapter():
            self._adapter_disabled = True
            try:
                yield
            finally:
                self._adapter_disabled = False
