"""The published method (arXiv 2510.03817), reimplemented from its description.

Each policy's sparse support is the top-k of a dense log-softmax; an id that only one side keeps has probability 1e-12
on the other, both sides are renormalised over the union, and the dual variable eta of

    log pi = (eta log q + log p) / (eta + 1) - const,    KL(pi || q) = bound

is bracketed in [1e-7, 1e2] with 8 points per round, until the bracket is narrower than 1e-5 and 20 times at most. Its
gradient follows from implicit differentiation. Where the description is ambiguous, this takes the cheaper reading:
only rows outside the region are solved, in float32, and the 8 points of a round lie inside the bracket, which the
first 8 rounds narrow enough. With both ends among the 8 points it would take 9.

Shapes: R rows, V ids, W kept ids, n outcomes.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

POINTS, MAX_ROUNDS = 8, 20
ETA_MIN, ETA_MAX, ETA_TOLERANCE = 1e-7, 1e2, 1e-5
ROUNDS = min(MAX_ROUNDS, math.ceil(math.log((ETA_MAX - ETA_MIN) / ETA_TOLERANCE, POINTS + 1)))
"""Every round divides every row's bracket by ``POINTS + 1``, so all rows stop in the same one."""
LOG_MISSING = math.log(1e-12)


class Support(NamedTuple):
    """Kept ids ``[R, W]`` (-1 if unused), their log-probs (``-inf`` if unused) and the sampled id's index ``[R]``."""

    ids: Tensor
    log_probs: Tensor
    sampled: Tensor


class Terms(NamedTuple):
    """Per row: ``log pi(o) - log q(o)``, ``KL(p || pi)`` and whether the row was projected."""

    log_ratio: Tensor
    regression_kl: Tensor
    projected: Tensor


def sparse_support(logits: Tensor, sampled_ids: Tensor, k: int, dropped_mass: float) -> Support:
    """The most probable ids of ``logits [R, V]`` up to a mass of ``1 - dropped_mass``, and the sampled id."""
    dense = torch.log_softmax(logits.float(), dim=-1)
    top, ids = dense.topk(min(k, dense.shape[-1]), dim=-1)
    mass = top.detach().exp()
    dropped = mass.cumsum(-1) - mass >= 1 - dropped_mass
    dropped[:, 0] = False
    ids = ids.masked_fill(dropped, -1)
    top = top.masked_fill(dropped, -math.inf)
    is_sampled = ids == sampled_ids.unsqueeze(-1)
    absent = ~is_sampled.any(-1, keepdim=True)
    sampled_log_prob = dense.gather(-1, sampled_ids.unsqueeze(-1))
    return Support(
        torch.cat([ids, torch.where(absent, sampled_ids.unsqueeze(-1), -1)], dim=-1),
        torch.cat([top, sampled_log_prob.masked_fill(~absent, -math.inf)], dim=-1),
        torch.where(absent.squeeze(-1), ids.shape[-1], is_sampled.int().argmax(-1)),
    )


def on_union(new: Support, old: Support) -> tuple[Tensor, Tensor]:
    """Both sides' log-probs ``[R, n]`` over the union of their ids, old ids first; ``-inf`` if unused."""
    same = (old.ids.unsqueeze(-1) == new.ids.unsqueeze(-2)) & (old.ids >= 0).unsqueeze(-1)
    kept_by_new = same.any(-1)
    at_old = new.log_probs.gather(-1, same.int().argmax(-1))
    at_old = torch.where(kept_by_new, at_old, torch.where(old.ids >= 0, LOG_MISSING, -math.inf))
    only_new = (new.ids >= 0) & ~same.any(-2)
    log_p = torch.cat([at_old, new.log_probs.masked_fill(~only_new, -math.inf)], dim=-1)
    missing = torch.full_like(new.log_probs, -math.inf).masked_fill(only_new, LOG_MISSING)
    log_q = torch.cat([old.log_probs, missing.detach()], dim=-1)
    return torch.log_softmax(log_p, dim=-1), torch.log_softmax(log_q, dim=-1)


def _tilted(log_q: Tensor, s: Tensor, eta: Tensor) -> tuple[Tensor, Tensor]:
    """``log pi`` and ``log(pi / q)`` ``[..., n]`` at ``eta [...]``, with ``s = log p - log q`` (0 if unused)."""
    log_ratio = s / (1 + eta).unsqueeze(-1)
    log_ratio = log_ratio - torch.logsumexp(log_q + log_ratio, dim=-1, keepdim=True)
    return log_q + log_ratio, log_ratio


@torch.no_grad()
def bracket_eta(log_q: Tensor, s: Tensor, kl_bound: float) -> Tensor:
    """Smallest ``eta [R]`` found with ``KL(pi || q) <= kl_bound``; the upper end if even that is outside."""
    low = torch.full_like(s[:, 0], ETA_MIN)
    high = torch.full_like(low, ETA_MAX)
    fractions = torch.arange(1, POINTS + 1, device=s.device, dtype=s.dtype) / (POINTS + 1)
    for _ in range(ROUNDS):
        points = low.unsqueeze(-1) + (high - low).unsqueeze(-1) * fractions
        log_pi, log_ratio = _tilted(log_q.unsqueeze(1), s.unsqueeze(1), points)
        outside = (log_pi.exp() * log_ratio).sum(-1) > kl_bound
        edges = torch.cat([low.unsqueeze(-1), points, high.unsqueeze(-1)], dim=-1)
        # KL decreases with eta.
        last_outside = outside.sum(-1, keepdim=True)
        low = edges.gather(-1, last_outside).squeeze(-1)
        high = edges.gather(-1, last_outside + 1).squeeze(-1)
    return high


class _Eta(torch.autograd.Function):
    """eta as the function of s implied by ``KL(pi || q) = bound``."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, log_q: Tensor, kl_bound: float) -> Tensor:
        eta = bracket_eta(log_q, s, kl_bound)
        ctx.save_for_backward(s, log_q, eta)
        return eta

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        s, log_q, eta = ctx.saved_tensors
        pi = _tilted(log_q, s, eta)[0].exp()
        centred = s - (pi * s).sum(-1, keepdim=True)
        variance = (pi * centred.square()).sum(-1)
        scale = torch.where(variance > 0, grad * (1 + eta) / variance, 0.0)
        return scale.unsqueeze(-1) * pi * centred, None, None


def update_terms(
    logits: Tensor, old: Support, *, k: int, dropped_mass: float, kl_bound: float, project: bool = True
) -> tuple[Terms, Tensor, Tensor]:
    """Terms of the objective from the new policy's ``logits [R, V]``, and ``log pi`` and ``log p`` ``[R, n]``."""
    sampled_ids = old.ids.gather(-1, old.sampled.unsqueeze(-1)).squeeze(-1)
    log_p, log_q = on_union(sparse_support(logits, sampled_ids, k, dropped_mass), old)
    used = log_q > -math.inf
    s = torch.where(used, log_p, 0.0) - torch.where(used, log_q, 0.0)
    p = log_p.exp()
    projected = (p.detach() * s.detach()).sum(-1) > kl_bound
    log_pi = log_p
    outside = projected.nonzero().squeeze(-1)
    if project and outside.numel() > 0:
        eta = _Eta.apply(s[outside], log_q[outside], kl_bound)  # type: ignore[no-untyped-call]
        solved = _tilted(log_q[outside], s[outside], eta)[0]
        log_pi = log_p.index_copy(0, outside, solved)
    index = old.sampled.unsqueeze(-1)
    log_ratio = (log_pi.gather(-1, index) - log_q.gather(-1, index)).squeeze(-1)
    gap = torch.where(used, log_p, 0.0) - torch.where(used, log_pi.detach(), 0.0)
    return Terms(log_ratio, (p * gap).sum(-1), projected), log_pi, log_p
