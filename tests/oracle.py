"""Dense float64 reference for the projection, the support rules and the objective.

Written from the formulas alone, slow and plain on purpose: the multiplier by bisection over the whole vocabulary,
supports by Python loops, gradients by autograd through one implicit correction step.

Shapes: R rows, n outcomes, V vocabulary, B sequences of T tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Probability under the other policy of an id that only one policy keeps (the published rule).
MISSING = 1e-12


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """``[...]`` KL(a || b) over the last dimension; outcomes without mass under a contribute 0."""
    live = log_a > -math.inf
    gap = torch.where(live, log_a, 0.0) - torch.where(live, log_b, 0.0)
    return torch.where(live, log_a.exp() * gap, 0.0).sum(-1)


def entropy(log_a: Tensor) -> Tensor:
    """``[...]`` entropy in nats."""
    return -torch.where(log_a > -math.inf, log_a.exp() * log_a, 0.0).sum(-1)


def interpolate(log_p: Tensor, log_q: Tensor, eta: Tensor) -> Tensor:
    """``[R, n]`` log pi, pi proportional to ``exp((eta log q + log p) / (eta + 1))``; 0 where p or q is 0."""
    live = (log_p > -math.inf) & (log_q > -math.inf)
    eta = eta.unsqueeze(-1)
    mixed = (eta * torch.where(live, log_q, 0.0) + torch.where(live, log_p, 0.0)) / (eta + 1)
    mixed = torch.where(live, mixed, -math.inf)
    return mixed - mixed.logsumexp(-1, keepdim=True)


def multiplier(log_p: Tensor, log_q: Tensor, bound: float) -> Tensor:
    """``[R]`` eta with KL(pi || q) = bound, by bisection to 1e-12 (relative above 1); 0 if KL(p || q) <= bound."""
    log_p, log_q = log_p.detach().double(), log_q.detach().double()
    low = torch.zeros(log_p.shape[0], dtype=torch.float64)
    high = torch.ones_like(low)
    for _ in range(120):
        too_far = kl(interpolate(log_p, log_q, high), log_q) > bound
        if not bool(too_far.any()):
            break
        high = torch.where(too_far, 2 * high, high)
    else:
        raise ArithmeticError("no multiplier is large enough for this bound")
    for _ in range(200):
        if bool((high - low <= 1e-12 * high.clamp_min(1.0)).all()):
            break
        middle = 0.5 * (low + high)
        outside = kl(interpolate(log_p, log_q, middle), log_q) > bound
        low = torch.where(outside, middle, low)
        high = torch.where(outside, high, middle)
    inside = kl(interpolate(log_p, log_q, torch.zeros_like(low)), log_q) <= bound
    return torch.where(inside, 0.0, high)


def project(log_p: Tensor, log_q: Tensor, bound: float, *, implicit: bool = True) -> Tensor:
    """``[R, n]`` log pi for float64 rows; differentiable in ``log_p``, through the multiplier if ``implicit``."""
    eta = multiplier(log_p, log_q, bound)
    active = eta > 0
    if implicit and log_p.requires_grad and bool(active.any()):
        probe = eta.clone().requires_grad_()
        with torch.enable_grad():
            slope = torch.autograd.grad(kl(interpolate(log_p.detach(), log_q, probe), log_q).sum(), probe)[0]
        here = kl(interpolate(log_p, log_q, eta), log_q)
        eta = eta - torch.where(active, (here - here.detach()) / torch.where(active, slope, 1.0), 0.0)
    return torch.where(active.unsqueeze(-1), interpolate(log_p, log_q, eta), log_p)


@dataclass(frozen=True)
class Kept:
    """Ids of one row in descending probability; the sampled id is last if it was not selected.

    ``selected`` counts the ids before the sampled one was added. ``edge_gap`` is the minimum distance of any partial
    mass from the mass that ends the selection. ``capped``: the cap ended it first.
    """

    ids: list[int]
    selected: int
    edge_gap: float
    capped: bool


def keep(logits: Tensor, sampled: int, *, k: int, dropped_mass: float, vocab_size: int) -> Kept:
    """The most probable ids of one row ``[V]``, up to mass ``1 - dropped_mass`` and at most k, plus o."""
    values = [float(x) for x in logits[:vocab_size].double()]
    top = max(values)
    weights = [math.exp(x - top) for x in values]
    total = math.fsum(weights)
    order = sorted(range(vocab_size), key=lambda i: (-values[i], i))
    ids: list[int] = []
    mass = 0.0
    gap = math.inf
    capped = False
    for i in order:
        if values[i] == -math.inf or (dropped_mass > 0 and mass >= 1 - dropped_mass):
            break
        if len(ids) == k:
            capped = True
            break
        ids.append(i)
        mass = math.fsum([mass, weights[i] / total])
        gap = min(gap, abs(mass - (1 - dropped_mass)))
    selected = len(ids)
    if sampled not in ids:
        ids.append(sampled)
    return Kept(ids, selected, gap, capped)


@dataclass(frozen=True)
class Outcomes:
    """Both policies of one row over common outcomes: ``log_p, log_q [n]``, their ids, and the sampled id's index.

    Under ``anchored`` the last outcome is ``rest`` with id -1, if any ids are left for it.
    """

    log_p: Tensor
    log_q: Tensor
    ids: list[int]
    place: int
    old: Kept
    new: Kept | None


def outcomes(
    rule: str, new: Tensor, old: Tensor, sampled: int, *, k: int, dropped_mass: float, vocab_size: int
) -> Outcomes:
    """Compare one row's logits ``new, old [V]``; differentiable in ``new``."""
    log_p = torch.log_softmax(new[:vocab_size].double(), -1)
    log_q = torch.log_softmax(old[:vocab_size].detach().double(), -1)
    kept_old = keep(old, sampled, k=k, dropped_mass=dropped_mass, vocab_size=vocab_size)
    if rule == "union":
        kept_new = keep(new.detach(), sampled, k=k, dropped_mass=dropped_mass, vocab_size=vocab_size)
        ids = kept_old.ids + [i for i in kept_new.ids if i not in kept_old.ids]
        missing = torch.tensor(math.log(MISSING), dtype=torch.float64)
        p_side = torch.stack([log_p[i] if i in kept_new.ids else missing for i in ids])
        q_side = torch.stack([log_q[i] if i in kept_old.ids else missing for i in ids])
        p_side = p_side - p_side.logsumexp(-1)
        q_side = q_side - q_side.logsumexp(-1)
        return Outcomes(p_side, q_side, ids, ids.index(sampled), kept_old, kept_new)
    ids = list(kept_old.ids)
    members = set(ids)
    others = [i for i in range(vocab_size) if i not in members]
    p_list = [log_p[i] for i in ids]
    q_list = [log_q[i] for i in ids]
    if others:
        p_list.append(torch.stack([log_p[i] for i in others]).logsumexp(-1))
        q_list.append(torch.stack([log_q[i] for i in others]).logsumexp(-1))
        ids.append(-1)
    return Outcomes(torch.stack(p_list), torch.stack(q_list), ids, ids.index(sampled), kept_old, None)


@dataclass(frozen=True)
class Settings:
    """All parameters of the objective."""

    rule: str
    k: int
    dropped_mass: float
    vocab_size: int
    bound: float
    alpha: float
    ratio: str = "token"
    implicit: bool = True


@dataclass(frozen=True)
class Batch:
    """Logits ``[B, T, V]`` of both policies, sampled ids, advantages, mask and rollout weights ``[B, T]``."""

    new: Tensor
    old: Tensor
    sampled: Tensor
    advantages: Tensor
    mask: Tensor
    weights: Tensor | None = None


def loss(batch: Batch, settings: Settings) -> Tensor:
    """Token mean of ``-weight * ratio * A + alpha * KL(p || stop_gradient(pi))``, to be minimised."""
    terms: list[Tensor] = []
    count = 0
    for b in range(batch.new.shape[0]):
        log_ratios: list[Tensor] = []
        regressions: list[Tensor] = []
        places: list[int] = []
        for t in range(batch.new.shape[1]):
            if not bool(batch.mask[b, t]):
                continue
            row = outcomes(
                settings.rule,
                batch.new[b, t],
                batch.old[b, t],
                int(batch.sampled[b, t]),
                k=settings.k,
                dropped_mass=settings.dropped_mass,
                vocab_size=settings.vocab_size,
            )
            log_pi = project(row.log_p[None], row.log_q[None], settings.bound, implicit=settings.implicit)[0]
            log_ratios.append(log_pi[row.place] - row.log_q[row.place])
            regressions.append(kl(row.log_p, log_pi.detach()))
            places.append(t)
        if not places:
            continue
        mean = torch.stack(log_ratios).detach().mean()
        for t, log_ratio, regression in zip(places, log_ratios, regressions, strict=True):
            if settings.ratio == "token":
                ratio = log_ratio.exp()
            else:
                own = log_ratio.exp()
                ratio = mean.exp() * own / own.detach()
            weight = 1.0 if batch.weights is None else float(batch.weights[b, t])
            terms.append(-weight * ratio * float(batch.advantages[b, t]) + settings.alpha * regression)
            count += 1
    return torch.stack(terms).sum() / count
