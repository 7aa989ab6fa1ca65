"""verl's functions for log-probs, entropy and the clipped loss, called as its engines call them."""

from __future__ import annotations

import contextlib
import functools
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import compute_policy_loss_vanilla
from verl.utils import torch_functional as verl_functional
from verl.workers.config import ActorConfig

from benchmarks.rows import Case

Entropy = Literal["none", "default", "chunked"]


def engine_context(case: Case) -> AbstractContextManager[Any]:
    """The context in which verl's FSDP engine runs the model and reads its logits."""
    if case.torch_dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(case.device, dtype=case.torch_dtype)


@functools.cache
def _entropy(kind: Entropy, device: str) -> Any:
    function = {
        "default": verl_functional.entropy_from_logits,
        "chunked": verl_functional.entropy_from_logits_with_chunking,
    }[kind]
    # verl compiles it by default, except in CPU mode.
    return torch.compile(function, dynamic=True) if device == "cuda" else function


@torch.no_grad()
def old_pass(logits: Tensor, labels: Tensor, entropy: Entropy) -> tuple[Tensor, Tensor | None]:
    """Log-probs ``[N]`` of the labels, and entropies ``[N]`` if requested."""
    entropies = None if entropy == "none" else _entropy(entropy, logits.device.type)(logits)
    inplace = entropy == "none"
    return verl_functional.logprobs_from_logits(logits, labels, inplace_backward=inplace), entropies


def log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probs ``[N]``, differentiable; with flash-attn the gradient is written over the logits."""
    result: Tensor = verl_functional.logprobs_from_logits(logits, labels, inplace_backward=True)
    return result


@torch.no_grad()
def sharded_old_pass(logits: Tensor, labels: Tensor, entropy: Entropy) -> tuple[Tensor, Tensor | None]:
    """:func:`old_pass` with columns on several ranks, as in verl's Megatron engine; overwrites the logits."""
    from verl.utils.megatron import tensor_parallel

    entropies = None
    if entropy != "none":
        kept = logits.clone()
        # The chunked form needs a leading batch dimension.
        function = {
            "default": tensor_parallel.vocab_parallel_entropy,
            "chunked": tensor_parallel.vocab_parallel_entropy_with_chunking,
        }[entropy]
        entropies = function(logits.unsqueeze(0)).squeeze(0)
        logits = kept
    return tensor_parallel.vocab_parallel_log_probs_from_logits(logits, labels), entropies


def sharded_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probs ``[N]``, differentiable; overwrites the logits."""
    from verl.utils.megatron.tensor_parallel import vocab_parallel_log_probs_from_logits

    result: Tensor = vocab_parallel_log_probs_from_logits(logits, labels)
    return result


@functools.cache
def _actor_config() -> ActorConfig:
    return ActorConfig(strategy="fsdp2", rollout_n=8, ppo_micro_batch_size_per_gpu=1)


def clipped_loss(old_log_probs: Tensor, new_log_probs: Tensor, advantages: Tensor) -> Tensor:
    """verl's PPO loss over R tokens; all arguments are ``[R]``."""
    loss, _ = compute_policy_loss_vanilla(
        old_log_prob=old_log_probs.unsqueeze(0),
        log_prob=new_log_probs.unsqueeze(0),
        advantages=advantages.unsqueeze(0),
        response_mask=torch.ones_like(advantages).unsqueeze(0),
        config=_actor_config(),
    )
    result: Tensor = loss
    return result
