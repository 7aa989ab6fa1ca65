"""verl's Megatron engine with TROLL. Tensor parallelism splits the vocabulary, context parallelism the tokens."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from tensordict import TensorDict
from torch import Tensor
from verl.models.mcore.util import preprocess_bshd_engine, preprocess_thd_engine
from verl.utils import tensordict_utils as tu
from verl.utils.megatron_utils import unwrap_model
from verl.workers.engine import MegatronEngineWithLMHead

from verl_troll.core.vocab import VocabShard
from verl_troll.plugin.engines.mixin import TrollEngineMixin
from verl_troll.plugin.layout import TokenLayout


class TrollMegatronEngine(TrollEngineMixin, MegatronEngineWithLMHead):
    """verl's Megatron engine with TROLL."""

    def token_layout(self, shape: tuple[int, int], data: TensorDict, data_format: str) -> TokenLayout:
        """This context-parallel rank's packed (``thd``) or padded (``bshd``) tokens.

        verl's own preprocessing lays out the positions, so its padding and its order of context-parallel chunks are
        not duplicated here.

        Raises:
            RuntimeError: the logits' shape is not that of the tokens.
        """
        input_ids = data["input_ids"]
        total = input_ids.values().shape[0]
        # From 1, because padding is 0.
        numbers = torch.arange(1, total + 1, device=input_ids.device)
        positions = torch.nested.nested_tensor_from_jagged(numbers, input_ids.offsets())
        model = unwrap_model(self.module[-1])
        fp8 = model.config.fp8 in ("e4m3", "hybrid")
        if data_format == "thd":
            layout = self._get_context_parallel_layout(model)
            local = preprocess_thd_engine(positions, use_fp8_padding=fp8, cp_layout=layout)[0]
        else:
            longest = tu.get_non_tensor_data(data, key="forced_max_seqlen", default=None)
            local = preprocess_bshd_engine(positions, use_fp8_padding=fp8, forced_max_seqlen=longest)[0]
        if tuple(local.shape) != shape:
            raise RuntimeError(f"verl lays the tokens out as {tuple(local.shape)}, but its logits as {shape}")
        row_of = torch.full((total + 1,), -1, device=input_ids.device)
        row_of[local.flatten()] = torch.arange(local.numel(), device=input_ids.device)
        group = mpu.get_context_parallel_group() if mpu.get_context_parallel_world_size() > 1 else None
        return TokenLayout(row_of[1:], shape, group)

    def head_inputs(self, hidden: Tensor) -> tuple[Tensor, str]:
        """Packed tokens, ``[s, 1, D]`` in Megatron.

        Without sequence parallelism, the backward pass all-reduces the gradient of the hidden states over the
        tensor-parallel ranks, as Megatron's output layer does.
        """
        if not unwrap_model(self.module[-1]).config.sequence_parallel:
            hidden = copy_to_tensor_model_parallel_region(hidden)
        return hidden.transpose(0, 1), "thd"

    @property
    def head_module(self) -> Any:
        """The output layer on the last stage, None on others."""
        return getattr(unwrap_model(self.module[-1]), "output_layer", None)

    def vocab_shard(self, columns: int) -> VocabShard:
        """An even share of the vocabulary per tensor-parallel rank; columns past the model's vocabulary are padding.

        verl's own log-probs include columns that a bridge padded; these do not.
        """
        vocab_size: int = self.model_config.hf_config.get_text_config().vocab_size
        return VocabShard.even(columns, vocab_size, mpu.get_tensor_model_parallel_group())

    def optimizer_step(self) -> float:
        """verl's step, without the cache emptying that its distillation hook, which TROLL uses, would add."""
        self._distillation_use_topk_active = False
        grad_norm: float = super().optimizer_step()
        return grad_norm
