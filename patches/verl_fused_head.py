"""Patch: let a reader take the hidden states from which verl's fused kernels compute log-probs.

With ``use_fused_kernels`` verl's models never form logits: they pass the hidden states and the head's weight to one of
two functions. While a reader is set, both functions call it; otherwise they are verl's own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor

from verl_troll.patches.registry import Patch
from verl_troll.versions import TESTED_VERL

HeadReader = Callable[[Tensor, Tensor, float], Tensor]
"""Maps hidden states, the head's weight and the temperature to the replacement of verl's log-probs."""


def _install(current_reader: Callable[[], HeadReader | None]) -> None:
    from verl.utils.experimental import torch_functional
    from verl.utils.kernel import linear_cross_entropy as kernel_module

    own_forward = torch_functional.FusedLinearForPPO.forward
    kernel: Any = kernel_module
    own_kernel = kernel.linear_cross_entropy

    def forward(
        self: Any, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
    ) -> Any:
        reader = current_reader()
        if reader is None:
            return own_forward(self, hidden_states, vocab_weights, input_ids, temperature)
        return reader(hidden_states, vocab_weights, temperature), None

    def linear_cross_entropy(
        hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float = 1.0, *arguments: Any
    ) -> Any:
        reader = current_reader()
        if reader is None:
            return own_kernel(hidden, weight, labels, temperature, *arguments)
        return reader(hidden, weight, temperature), None

    torch_functional.FusedLinearForPPO.forward = forward
    kernel.linear_cross_entropy = linear_cross_entropy
    # FSDP models import the name at each call, Megatron models once.
    megatron: Any = sys.modules.get("verl.models.mcore.model_forward_fused")
    if megatron is not None:
        megatron.linear_cross_entropy = linear_cross_entropy


PATCH = Patch(
    name="verl-fused-head",
    host="verl",
    versions=TESTED_VERL,
    why="verl's fused kernels return log-probs and entropy of the sampled tokens, with no hook to read more.",
    upstream="verl/models/transformers/dense_common.py and verl/models/mcore/model_forward_fused.py: a head function "
    "that the engine hands over, as logits_processor_func is on the other path",
    install=_install,
    replaces={
        "verl.utils.experimental.torch_functional:FusedLinearForPPO.forward": "68e82912d07c68a4",
        "verl.utils.kernel.linear_cross_entropy:LinearCrossEntropy": "2ca1a0e0f9b72865",
        "verl.models.transformers.dense_common:forward_with_torch_backend": "465b27768ef8bfd1",
        "verl.models.transformers.dense_common:forward_with_triton_backend": "76167c4b1865c9e6",
        "verl.models.mcore.model_forward_fused:_fused_GPTModel_forward": "ef9437c5e1d6a9a9",
        "verl.models.mcore.model_forward_fused:fused_output_processor": "e798ade58f895a27",
        "verl.models.mcore.model_forward_fused:fused_forward_model_engine": "9bbf86f231150da4",
    },
)
