"""The mixin that turns one of verl's engines into one with TROLL; stock, unless its configuration carries settings."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.workers.engine import BaseEngine

from verl_troll.plugin.layout import TokenLayout
from verl_troll.plugin.passes import LossFunction, OldPolicyPass, UpdatePass
from verl_troll.plugin.settings import TrollConfig
from verl_troll.vocab_parallel import VocabShard


class TrollEngineMixin(BaseEngine):
    """Puts :class:`OldPolicyPass` and :class:`UpdatePass` where verl's engine shows its logits."""

    _adapter_disabled = False

    @property
    def troll(self) -> TrollConfig | None:
        """Settings that the actor's configuration left in the engine's; None on any other engine."""
        settings: TrollConfig | None = getattr(self.engine_config, "troll", None)
        return settings

    @abstractmethod
    def token_layout(self, shape: tuple[int, int], data: TensorDict, data_format: str) -> TokenLayout:
        """See :class:`verl_troll.plugin.passes.LogitsOwner`."""

    @abstractmethod
    def vocab_shard(self, columns: int) -> VocabShard:
        """See :class:`verl_troll.plugin.passes.LogitsOwner`."""

    def forward_backward_batch(
        self, data: TensorDict, loss_function: LossFunction | None, forward_only: bool = False
    ) -> Any:
        """verl's pass, with TROLL's reading of the logits in the old-log-prob pass and in the update."""
        settings = self.troll
        # With a LoRA reference inside the actor, the reference pass comes through this engine too.
        if settings is not None and not self.engine_config.forward_only and not self._adapter_disabled:
            if not forward_only:
                if loss_function is None:
                    raise TypeError("loss_function is missing")
                loss_function = UpdatePass(settings, self, loss_function)
            elif loss_function is None:
                loss_function = OldPolicyPass(settings, self)
            if isinstance(loss_function, OldPolicyPass | UpdatePass):
                if tu.get_non_tensor_data(data, key="use_fused_kernels", default=False):
                    raise ValueError("use_fused_kernels=True is not supported with TROLL: set it to False")
                tu.assign_non_tensor(data, distillation_use_topk=True, distillation_only=True)
        return super().forward_backward_batch(data, loss_function, forward_only=forward_only)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """verl's context, remembered: a pass without the adapter is the reference's, not the old policy's."""
        with super().disable_adapter():
            self._adapter_disabled = True
            try:
                yield
            finally:
                self._adapter_disabled = False
