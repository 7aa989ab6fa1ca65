"""Which tokens leave the trust region, on the whole vocabulary and by each support.

The projection sees two policies through a support of few ids. Where those ids hold little of the mass, what it sees may
leave the region although the policies do not (a false projection), or the other way round (a missed one).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.study import names
from benchmarks.study.names import of_k
from verl_troll.core.comparison import compare
from verl_troll.core.projection import project
from verl_troll.core.support import Selection, select
from verl_troll.core.vocab import VocabLogits

KL_BOUND = 0.05
"""TROLL's default, in nats."""

DROPPED_MASS = 1e-5
"""TROLL's default."""


@torch.no_grad()
def response_logits(model: Any, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> Tensor:
    """Logits ``[R, V]`` that predict each response token, sample after sample."""
    longest = max(len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    wanted = torch.zeros_like(ids, dtype=torch.bool)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        end = len(prompt) + len(response)
        ids[row, :end] = torch.tensor([*prompt, *response])
        mask[row, :end] = 1
        wanted[row, len(prompt) - 1 : end - 1] = True
    # The head is the larger part of the work: only at the tokens asked for.
    ids, mask, wanted = (part.to(model.device) for part in (ids, mask, wanted))
    hidden = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
    logits: Tensor = model.get_output_embeddings()(hidden[wanted])
    return logits.float()


@torch.no_grad()
def compare_policies(old: Tensor, new: Tensor, sampled: Tensor, ks: Sequence[int]) -> dict[str, float]:
    """Means over tokens of what each support sees of the step from one policy to another.

    Args:
        old: logits ``[R, V]``.
        new: of the same shape.
        sampled: int64 ``[R]``, the sampled ids.
        ks: support sizes.

    Returns:
        ``study/kl``, KL(new || old) in nats, and ``study/outside``, share of tokens above :data:`KL_BOUND`, both on
        the whole vocabulary; for each ``k`` the mass of ``old`` that is kept and the share of tokens at which the cap
        binds; for each ``k`` and support the share of tokens that are projected, falsely projected and missed.
    """
    kl = torch.cat([_kl(q, p) for q, p in zip(old.split(64), new.split(64), strict=True)])
    outside = kl > KL_BOUND
    found = {names.KL: kl.mean().item(), names.OUTSIDE: _share(outside)}
    for k in ks:
        selection = Selection(k, DROPPED_MASS)
        support = select(VocabLogits.of(old), sampled, selection)
        for rule in names.SUPPORTS:
            seen = compare(rule, VocabLogits.of(new), support, selection)
            projected = project(seen.new_log_probs, seen.old_log_probs, KL_BOUND).kl_before > KL_BOUND
            found[of_k(k, "kept_mass")] = seen.old_kept_mass.mean().item()
            found[of_k(k, "cap_hits")] = _share(seen.cap_hit)
            found[of_k(k, "projected", rule)] = _share(projected)
            found[of_k(k, "false", rule)] = _share(projected & ~outside)
            found[of_k(k, "missed", rule)] = _share(outside & ~projected)
    return found


def _kl(old: Tensor, new: Tensor) -> Tensor:
    old, new = old.double().log_softmax(-1), new.double().log_softmax(-1)
    return (new.exp() * (new - old)).sum(-1)


def _share(tokens: Tensor) -> float:
    return tokens.double().mean().item()
