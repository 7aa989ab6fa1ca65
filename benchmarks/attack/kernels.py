"""Fuzzes the projection and the whole chain of a token, in torch and in Triton.

What must hold is computed here in float64, apart from the product's own code. The Triton forms run on a GPU with
``--device cuda``. Without one they run in Triton's interpreter, in processes of their own and on far fewer rows: it
takes some 50 ms for each.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.attack.attack import Attack, Extent, Outcome
from benchmarks.processes import run
from verl_troll.core import kernels
from verl_troll.core.kernels.constants import LOG_RATIO_OF_ZERO, STATISTICS
from verl_troll.core.logits import DenseLogits
from verl_troll.core.loss import PolicyTerms, policy_terms
from verl_troll.core.projection import NOT_A_DISTRIBUTION, Projection, project
from verl_troll.core.support import Selection, SparsePolicy, select
from verl_troll.core.vocab import VocabLogits, VocabShard

MAGNITUDE = 1e4
"""Largest log-ratio of the projection's rows, in nats."""
WIDTHS = (1, 2, 3, 5, 8, 17, 33, 64, 65, 130, 257, 511, 1025)
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
BOUNDS = (1e-8, 10.0)
BROKEN_SHARE = 0.05
MAX_EVALUATIONS = 20
ROOT = Path(__file__).parents[2]

FORMS: tuple[kernels.Form, kernels.Form] = ("auto", "torch")

Violations = Iterator[tuple[str, Tensor]]
"""Promises, each with ``[R]`` bool: the rows that break it."""


# --- what is drawn ----------------------------------------------------------------------------------------------------


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, device=generator.device, dtype=torch.float64)


def _uniform(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=generator, device=generator.device, dtype=torch.float64)


def _among(generator: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    """Of any order of magnitude between the two."""
    return (math.log(low) + _uniform(generator, *shape) * math.log(high / low)).exp()


def _one_place(generator: torch.Generator, rows: int, n: int) -> Tensor:
    """``[R, n]`` bool, one true in each row."""
    lanes = torch.arange(n, device=generator.device)
    return lanes == torch.randint(n, (rows, 1), generator=generator, device=generator.device)


def any_logits(generator: torch.Generator, rows: int, n: int, magnitude: float) -> Tensor:
    """``[R, n]`` float64: normal, clipped, tied, with heavy tails, with one large outcome, or flat."""
    scale = _among(generator, 1e-3, magnitude / 4, rows, 1)
    normal = scale * _normal(generator, rows, n)
    tails = (math.pi * (_uniform(generator, rows, n) - 0.5)).tan() * scale.clamp_max(30)
    one = torch.where(_one_place(generator, rows, n), scale, 0.0)
    shapes = (normal, normal.clamp(-20, 20), normal.clamp(-5, 5).round(), tails, one, torch.zeros_like(normal))
    kind = torch.randint(len(shapes), (rows, 1), generator=generator, device=generator.device)
    found = torch.stack(shapes).gather(0, kind.expand(rows, n).unsqueeze(0)).squeeze(0)
    return found.clamp(-magnitude, magnitude)


def any_pair(generator: torch.Generator, rows: int, n: int, magnitude: float) -> tuple[Tensor, Tensor]:
    """Logits ``new, old [R, n]``: near each other, equal, or unrelated."""
    old = any_logits(generator, rows, n, magnitude)
    moved = old + _among(generator, 1e-6, magnitude / 4, rows, 1) * _normal(generator, rows, n)
    kind = _uniform(generator, rows, 1)
    new = torch.where(kind < 0.6, moved, any_logits(generator, rows, n, magnitude))
    return torch.where(kind < 0.02, old, new), old


def spoil(generator: torch.Generator, values: Tensor, share: float) -> Tensor:
    """NaN or ``+inf`` at one place of some rows."""
    rows, n = values.shape
    bad = _one_place(generator, rows, n) & (_uniform(generator, rows, 1) < share)
    return torch.where(bad, torch.where(_uniform(generator, rows, 1) < 0.5, math.nan, math.inf), values)


@dataclass(frozen=True)
class Rows:
    """Pairs of policies, and what is to be done with them.

    Attributes:
        new, old: ``[R, n]`` log-probabilities.
        bound: in nats.
        implicit: differentiate through the step size.
        grad: ``[R, n]``, gradient to log pi.
    """

    new: Tensor
    old: Tensor
    bound: float
    implicit: bool
    grad: Tensor


def draw(generator: torch.Generator, rows: int, n: int, dtype: torch.dtype, magnitude: float) -> tuple[Tensor, Tensor]:
    """``new, old [R, n]``: regular pairs, pairs with missing outcomes on either side or both, and no distributions."""
    new, old = any_pair(generator, rows, n, magnitude)
    chance, side = _among(generator, 1e-3, 1.0, rows, 1), _uniform(generator, rows, 1)
    missing, other = (_uniform(generator, rows, n) < chance for _ in range(2))
    some = _uniform(generator, rows, 1) < 0.4
    new = new.masked_fill(some & missing & ((side < 0.2) | (side > 0.4)), -math.inf)
    old = old.masked_fill(some & missing & (side > 0.2) & (side < 0.6), -math.inf)
    old = old.masked_fill(some & other & (side > 0.8), -math.inf)
    # Without any outcome: -inf minus -inf.
    new, old = (x.log_softmax(-1).nan_to_num(nan=-math.inf, neginf=-math.inf) for x in (new, old))
    # Ids that only one side kept, under the published rule.
    some, floor = _uniform(generator, rows, 1) < 0.1, math.log(1e-12)
    new, old = (torch.where(some & (_uniform(generator, rows, n) < 0.2), floor, x) for x in (new, old))
    return spoil(generator, new, BROKEN_SHARE / 2).to(dtype), spoil(generator, old, BROKEN_SHARE / 2).to(dtype)


def draw_chunks(extent: Extent, count: int, elements: int, magnitude: float) -> Iterator[Rows]:
    """``count`` rows in all, about ``elements`` numbers at a time."""
    generator = torch.Generator(extent.device).manual_seed(extent.seed)
    # Few rows have their turn at every width and dtype too.
    share = count // (len(WIDTHS) * len(DTYPES)) + 1
    for number in itertools.count():
        n, dtype = WIDTHS[number % len(WIDTHS)], DTYPES[number // len(WIDTHS) % len(DTYPES)]
        rows = min(count, share, max(1, elements // max(n, 20)))
        new, old = draw(generator, rows, n, dtype, magnitude)
        grad = _normal(generator, rows, n).to(torch.promote_types(dtype, torch.float32))
        # Few variants with a constant step size: a GPU compiles each.
        implicit = n > 8 or number % 2 == 0
        yield Rows(new, old, float(_among(generator, *BOUNDS, 1)), implicit, grad)
        count -= rows
        if count == 0:
            return


# --- the projection ---------------------------------------------------------------------------------------------------


def solve(rows: Rows, form: kernels.Form, *, strided: bool = False) -> tuple[Projection, Tensor]:
    """The product's projection and its gradient to the new policy."""
    new = rows.new
    if strided:
        new = torch.nn.functional.pad(new, (0, 3), value=math.nan)[:, : new.shape[1]]
    new = new.detach().requires_grad_()
    step_size_gradient: Literal["implicit", "detached"] = "implicit" if rows.implicit else "detached"
    found = project(new, rows.old, rows.bound, step_size_gradient=step_size_gradient, form=form)
    (gradient,) = torch.autograd.grad(found.log_probs, new, rows.grad)
    return replace(found, log_probs=found.log_probs.detach()), gradient


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """``[R]`` KL(a || b) in nats, without cancellation: no term of sum of b - a + a log(a / b) is negative."""
    live = log_a > -math.inf
    gap = torch.where(live, log_a - log_b, 0.0)
    a, b = log_a.exp(), log_b.exp()
    near = live & (gap.abs() < 1e-2)
    small = torch.where(near, gap, 0.0)
    # x exp(x) - exp(x) + 1, by its series.
    series = small.square() * (1 / 2 + small * (1 / 3 + small * (1 / 8 + small * (1 / 30 + small / 144))))
    return torch.where(near, b * series, a * gap - a + b).sum(-1)


@dataclass(frozen=True)
class Kinds:
    """What rows are, by their numbers alone; ``[R]`` bool each.

    Attributes:
        broken: no pair of distributions with an outcome in common.
        empty: neither has an outcome.
        escaped: the new policy has mass where the old one has none.
    """

    broken: Tensor
    empty: Tensor
    escaped: Tensor

    @classmethod
    def of(cls, new: Tensor, old: Tensor) -> Kinds:
        mass, outcome = new > -math.inf, old > -math.inf
        wrong = (new.isnan() | (new == math.inf) | old.isnan() | (old == math.inf)).any(-1)
        empty = ~wrong & ~(mass | outcome).any(-1)
        return cls(wrong | (~(mass & outcome).any(-1) & ~empty), empty, (mass & ~outcome).any(-1))


def resolution(new: Tensor, old: Tensor, log_pi: Tensor) -> Tensor:
    """``[R, n]`` by how much rounding may move each log pi: a place of its own dtype, and float64's of what made it."""
    made_of = torch.where(new > -math.inf, new, LOG_RATIO_OF_ZERO).abs() + torch.where(old > -math.inf, old, 0.0).abs()
    own = torch.where(log_pi > -math.inf, log_pi, 0.0).abs() + 1
    return torch.finfo(log_pi.dtype).eps * own.double() + 2 * torch.finfo(torch.float64).eps * made_of.double()


def check_projection(rows: Rows, found: Projection, gradient: Tensor) -> Violations:
    """What holds of any projection."""
    dtype, log_pi, bound = found.log_probs.dtype, found.log_probs, rows.bound
    new, old = rows.new.to(dtype), rows.old.to(dtype)
    kind = Kinds.of(new, old)
    everything = torch.cat([log_pi.T, torch.stack([found.step_size, found.kl_before, found.kl]), gradient.T])
    yield "failure says which rows are broken", (found.failure == NOT_A_DISTRIBUTION) != kind.broken
    yield "a broken row is NaN in all its values", kind.broken & ~everything.isnan().all(0)
    yield "no other row is NaN anywhere", ~kind.broken & everything.isnan().any(0)
    yield "the gradient is finite", ~kind.broken & ~gradient.isfinite().all(-1)
    yield "at most 20 evaluations", found.evaluations > MAX_EVALUATIONS
    yield "the step size lies in (0, 1]", ~kind.broken & ~((found.step_size > 0) & (found.step_size <= 1))
    yield "kl does not exceed the bound", ~kind.broken & ~(found.kl <= bound)

    # Rows that cannot be looked at are replaced by harmless ones.
    fine = ~kind.broken & ~kind.empty
    p, q, pi = (torch.where(fine.unsqueeze(-1), x, 0.0).double().log_softmax(-1) for x in (new, old, log_pi))
    inside = kind.empty | (fine & ~kind.escaped & (found.kl_before <= bound))
    same = (log_pi == new).all(-1)
    yield "unchanged inside the region", inside & ~same
    # Near the bound, the solver's own KL decides.
    yield "changed only outside of it", fine & ~kind.escaped & (kl(p, q) < 0.999 * bound) & ~same
    outside = fine & ~inside
    yield "no mass on what is no outcome", outside & ((log_pi > -math.inf) & (old == -math.inf)).any(-1)
    places = resolution(new, old, log_pi)
    mass = torch.where(fine.unsqueeze(-1), log_pi, 0.0).double().exp().sum(-1)
    yield "normalised", outside & ~((mass - 1).abs() <= 8 * (pi.exp() * places).sum(-1))
    # The derivative of KL by log pi_i is pi_i (log pi_i - log q_i - KL), the second one pi_i.
    gap = torch.where(pi > -math.inf, pi - q, 0.0).abs()
    slack = 2 * (pi.exp() * places * (gap + bound + places)).sum(-1)
    yield "KL(pi || q) does not exceed the bound", outside & ~(kl(pi, q) <= bound + slack)
    yield "kl is KL(pi || q)", outside & ~((kl(pi, q) - found.kl.double()).abs() <= 1e-5 * bound + slack)

    live = (new > -math.inf) & (old > -math.inf)
    passed_on = torch.where(live, rows.grad, 0.0).to(gradient.dtype)
    yield "the gradient passes through inside the region", inside & ~(gradient == passed_on).all(-1)
    moved = outside.nonzero().squeeze(-1)
    part = replace(rows, new=new[moved], grad=rows.grad[moved])
    path = OnPath.of(part, q[moved], live[moved], found.step_size[moved], found.evaluations[moved] > 1)
    off = torch.where(log_pi[moved] == -math.inf, 0.0, (log_pi[moved].double() - path.log_pi).abs())
    # The path's own sum over the outcomes rounds too.
    yield "pi lies on the path, at the step size", _at(moved, ~(off <= 64 * places[moved] + path.moves).all(-1), fine)
    error = (gradient[moved].double() - path.gradient).abs().amax(-1)
    allowed = path.allowed + GRADIENT_ROUNDING[gradient.dtype] * path.size
    yield "the gradient is that of the formula", _at(moved, ~(error <= allowed), fine)


GRADIENT_ROUNDING = {torch.bfloat16: 2**-8, torch.float32: 1e-6, torch.float64: 1e-9}


def _at(places: Tensor, values: Tensor, like: Tensor) -> Tensor:
    return torch.zeros_like(like).index_put((places,), values)


@dataclass(frozen=True)
class OnPath:
    """The path from q to p at the step sizes found, and the gradient by autograd and the implicit function theorem.

    Attributes:
        log_pi: ``[R, n]``.
        moves: ``[R, n]`` by how much a place of the step size moves it.
        gradient: ``[R, n]`` to the new policy.
        size: ``[R]`` of the numbers that the gradient is made of.
        allowed: ``[R]``, error of the gradient that the last places of its inputs make.
    """

    log_pi: Tensor
    moves: Tensor
    gradient: Tensor
    size: Tensor
    allowed: Tensor

    @classmethod
    def of(cls, rows: Rows, log_q: Tensor, live: Tensor, step_size: Tensor, on_bound: Tensor) -> OnPath:
        g = torch.where(live, rows.grad.double(), 0.0)
        outcome = log_q > -math.inf
        log_q = torch.where(outcome, log_q, -1e30)
        log_p = torch.where(live, rows.new.double(), 0.0)
        s = torch.where(live, log_p - log_q, torch.where(outcome, LOG_RATIO_OF_ZERO, 0.0)).requires_grad_()
        t = step_size.double().requires_grad_()
        log_pi = (log_q + t.unsqueeze(-1) * s).log_softmax(-1)
        of_s, of_t = torch.autograd.grad((g * log_pi).sum(), (s, t), retain_graph=True)
        kl_of_s, kl_of_t = torch.autograd.grad(kl(log_pi, log_q).sum(), (s, t))
        s, t, log_pi = s.detach(), t.detach(), log_pi.detach()
        pi = log_pi.exp()
        centred = s - (pi * s).sum(-1, keepdim=True)
        slope = t * (pi * centred.square()).sum(-1)
        # Nothing is to be compared where float64 does not resolve how KL depends on the step size.
        resolved = (slope > 0) & ((kl_of_t - slope).abs() <= 1e-9 * slope)
        through = on_bound if rows.implicit else torch.zeros_like(on_bound)
        ratio = torch.where(through & resolved, of_t / torch.where(resolved, kl_of_t, 1.0), 0.0)
        along = kl_of_s * ratio.unsqueeze(-1)
        size = of_s.abs().amax(-1) + along.abs().amax(-1) + t * (g.abs().amax(-1) + g.sum(-1).abs())
        eps, place = torch.finfo(step_size.dtype).eps, torch.finfo(torch.float64).eps
        spread = torch.where(pi > 0, centred.abs(), 0.0).amax(-1)
        # The mean of s is known to a place of the numbers that s is made of, times s.
        made_of = log_p.abs().amax(-1) + torch.where(outcome, log_q.abs(), 0.0).amax(-1)
        mean = place * made_of * torch.where(pi > 0, s.abs(), 0.0).amax(-1)
        of_mean = t * (g * centred).sum(-1).abs() * mean / slope.clamp_min(1e-300)
        allowed = size * (10 * eps * t * spread + 16 * place / rows.bound) + 2 * torch.where(through, of_mean, 0.0)
        return cls(
            log_pi,
            2 * eps * t.unsqueeze(-1) * centred.abs(),
            torch.where(live, of_s - along, 0.0),
            size,
            torch.where(through & ~resolved, math.inf, allowed),
        )


def check_forms(rows: Rows, found: Projection, other: Projection) -> Violations:
    """What holds between the two forms, which search step sizes in the same way."""
    fine = (found.failure != NOT_A_DISTRIBUTION) & (other.failure != NOT_A_DISTRIBUTION)
    place = torch.finfo(torch.float64).eps
    relative, least = 8 * torch.finfo(found.kl.dtype).eps + 1e-9, 64 * place * MAGNITUDE
    yield "both forms say the same of failure", found.failure != other.failure
    before, its = found.kl_before.double(), other.kl_before.double()
    yield "and of kl_before", fine & (before != its) & ~((before - its).abs() <= relative * its + least)
    # At the edge of the region, and of what is accepted, rounding decides; then both results are within the bound.
    near = (before - rows.bound).abs() <= relative * rows.bound + least
    same = fine & ~near & (found.evaluations == other.evaluations)
    step, value = (
        (getattr(found, name).double() / getattr(other, name).double() - 1).abs() for name in ("step_size", "kl")
    )
    # Where KL hardly depends on the step size, it is KL that agrees.
    yield (
        "and of the result",
        same & (found.step_size < 1) & ~(step.minimum(value) <= relative + 1024 * place / rows.bound),
    )


def fuzz_projection(extent: Extent, count: int, elements: int, form: kernels.Form) -> Outcome:
    """Fuzz one form; Triton's is compared with torch's too."""
    outcome = Outcome()
    for number, rows in enumerate(draw_chunks(extent, count, elements, MAGNITUDE)):
        found, gradient = solve(rows, form, strided=number % 2 == 1)
        violations = [check_projection(rows, found, gradient)]
        if form == "auto":
            violations.append(check_forms(rows, found, solve(rows, "torch")[0]))
        if number % 4 == 0:
            violations.append(check_neighbours(rows, found, gradient, form))
        what = f"{rows.new.shape[1]} outcomes, {rows.new.dtype}, bound {rows.bound:.3g}"
        what = f"seed {extent.seed}, chunk {number}: {what}"
        _count(outcome, len(rows.new), itertools.chain(*violations), what, (rows.new, rows.old))
    return outcome


def check_neighbours(rows: Rows, found: Projection, gradient: Tensor, form: kernels.Form) -> Violations:
    """Broken rows change no bit of the others."""
    broken = Kinds.of(rows.new, rows.old).broken.unsqueeze(-1)
    harmless = math.log(1 / rows.new.shape[1])
    new, old = (torch.where(broken, harmless, x) for x in (rows.new, rows.old))
    again, gradient_again = solve(replace(rows, new=new, old=old), form)
    same = (found.log_probs == again.log_probs).all(-1) & (gradient == gradient_again).all(-1)
    yield "broken rows change no bit of the others", ~broken.squeeze(-1) & ~(same & (found.kl == again.kl))


def _count(
    outcome: Outcome, tried: int, violations: Violations, what: str, numbers: Sequence[Tensor], most: int = 8
) -> None:
    """Count rows; one that breaks several promises counts once."""
    fell: dict[int, str] = {}
    for promise, rows in violations:
        for row in rows.nonzero().flatten().tolist():
            shown = ", ".join(str(x[row].tolist()) for x in numbers) if numbers[0].shape[1] <= most else f"row {row}"
            fell.setdefault(row, f"not {promise!r}: {what}: {shown}")
    outcome.count(tried, fell.values())


# --- the chain of a token ---------------------------------------------------------------------------------------------

LOGITS = 60.0
"""Largest logit of the chain's rows."""
AGREEING_BOUND = 1e-3
"""Below this bound (nats), the rounding of float32 log-probabilities alone moves a token by as much as the bound."""
PADDING = 3
K = (1, 8, 64)
DROPPED = (0.0, 1e-8, 1e-5, 1e-3, 0.3)
LOGIT_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Tokens:
    """Logits of some tokens, and how they are read.

    Attributes:
        new, old: ``[R, V + PADDING]``, NaN in the padding.
        sampled: ``[R]`` ids.
        vocab: V.
        bound: in nats.
        broken: ``[R]`` bool, no numbers among the new logits.
    """

    new: Tensor
    old: Tensor
    sampled: Tensor
    vocab: int
    selection: Selection
    rule: str
    bound: float
    implicit: bool
    broken: Tensor

    def logits(self, values: Tensor, form: kernels.Form) -> VocabLogits:
        return VocabLogits.of(DenseLogits(values, form=form), None, VocabShard.whole(values.shape[1], self.vocab))


def draw_tokens(extent: Extent, count: int, elements: int, vocabs: Sequence[int]) -> Iterator[Tokens]:
    """``count`` tokens in all, about ``elements`` logits at a time."""
    generator = torch.Generator(extent.device).manual_seed(extent.seed)
    share = count // (len(vocabs) * len(LOGIT_DTYPES) * len(K)) + 1
    for number in itertools.count():
        vocab, rest = vocabs[number % len(vocabs)], number // len(vocabs)
        dtype, k = LOGIT_DTYPES[rest % len(LOGIT_DTYPES)], K[rest // len(LOGIT_DTYPES) % len(K)]
        rows = min(count, share, max(1, elements // max(vocab, 20)))
        new, old = any_pair(generator, rows, vocab, LOGITS)
        sampled = torch.randint(vocab, (rows,), generator=generator, device=generator.device)
        sampled = torch.where(_uniform(generator, rows) < 0.5, old.argmax(-1), sampled)
        # Ids without mass, but not the sampled one.
        holes = _uniform(generator, rows, vocab) < _among(generator, 1e-3, 1.0, rows, 1)
        holes &= (_uniform(generator, rows, 1) < 0.3) & (
            torch.arange(vocab, device=generator.device) != sampled[:, None]
        )
        side = _uniform(generator, rows, 1)
        new = new.masked_fill(holes & (side < 0.7), -math.inf)
        old = old.masked_fill(holes & (side > 0.3), -math.inf)
        new = spoil(generator, new, BROKEN_SHARE)
        padded_new, padded_old = (
            torch.nn.functional.pad(x, (0, PADDING), value=math.nan).to(dtype) for x in (new, old)
        )
        yield Tokens(
            padded_new,
            padded_old,
            sampled,
            vocab,
            Selection(k, DROPPED[int(_uniform(generator, 1) * len(DROPPED))]),
            ("union", "anchored")[int(_uniform(generator, 1) < 0.5)],
            float(_among(generator, *BOUNDS, 1)),
            vocab > 8 or number % 2 == 0,
            ~(new.isfinite() | (new == -math.inf)).all(-1),
        )
        count -= rows
        if count == 0:
            return


def run_chain(tokens: Tokens, support: SparsePolicy, form: kernels.Form) -> tuple[PolicyTerms, Tensor]:
    """The chain's terms, and the gradient to the logits of a loss that uses all of them."""
    leaf = tokens.new.clone().requires_grad_()
    terms = policy_terms(
        tokens.rule,
        tokens.logits(leaf, form),
        support,
        tokens.selection,
        kl_bound=tokens.bound,
        step_size_gradient="implicit" if tokens.implicit else "detached",
        entropy=True,
    )
    assert terms.entropy is not None
    weight = torch.linspace(-1, 2, len(leaf), device=leaf.device)
    loss = weight * (terms.log_ratio + 0.5 * terms.regression_kl) + 0.2 * terms.sampled_log_probs + 0.3 * terms.entropy
    return terms, torch.autograd.grad(loss.sum(), leaf)[0]


def check_support(tokens: Tokens, found: SparsePolicy) -> Violations:
    """The kept ids are the most probable ones in order, as many as their mass in float64 asks for."""
    logits, k = tokens.old[:, : tokens.vocab].double(), min(tokens.selection.k, tokens.vocab)
    order = logits.sort(dim=-1, descending=True, stable=True)
    log_probs = logits.log_softmax(-1)
    best = log_probs.gather(-1, order.indices)[:, :k]
    before = best.exp().cumsum(-1) - best.exp()
    ids = found.ids[:, :k]
    kept = ids >= 0
    yield "kept ids are the most probable, in order", (kept & (ids != order.indices[:, :k])).any(-1)
    yield "and none is left out among them", (kept[:, 1:] & ~kept[:, :-1]).any(-1)
    # Of a sum of k float32 probabilities.
    places = _logit_places(tokens.old, tokens.vocab)
    edge = places + 4 * torch.finfo(torch.float32).eps * math.sqrt(k)
    goal = tokens.selection.mass_to_keep
    yield "as many as the mass asks for", ((before < goal - edge) & (best > -math.inf) & ~kept).any(-1)
    yield "and no more", ((before >= goal + edge) & kept)[:, 1:].any(-1)
    place = found.sampled.unsqueeze(-1)
    yield "the sampled id is among them", found.ids.gather(-1, place).squeeze(-1) != tokens.sampled
    exact = torch.where(found.ids >= 0, log_probs.gather(-1, found.ids.clamp_min(0)), -math.inf)
    error = torch.where(exact == found.log_probs, 0.0, (exact - found.log_probs.double()).abs())
    yield "log-probabilities are exact", ~(error <= places).all(-1)


def _logit_places(logits: Tensor, vocab: int) -> Tensor:
    """``[R, 1]`` a few float32 places of the smallest log-probability."""
    values = logits[:, :vocab].double()
    values = torch.where(values.isfinite(), values, 0.0)
    distance = values.amax(-1, keepdim=True) - values.amin(-1, keepdim=True)
    return 8 * torch.finfo(torch.float32).eps * (2 + math.log(vocab) + distance)


def check_chain(tokens: Tokens, terms: PolicyTerms, gradient: Tensor) -> Violations:
    """What holds of any token's terms."""
    statistics = dict(zip(STATISTICS, terms.statistics, strict=True))
    values = torch.stack([terms.log_ratio, terms.regression_kl, terms.sampled_log_probs, terms.statistics[0]]).detach()
    fine = ~tokens.broken
    yield "a broken token's log-ratio is NaN", tokens.broken & ~values[0].isnan()
    yield "no other token is NaN anywhere", fine & (values.isnan().any(0) | terms.statistics.isnan().any(0))
    yield "the gradient is finite", fine & ~gradient.isfinite().all(-1)
    yield "and 0 in the padding", fine & (gradient[:, tokens.vocab :] != 0).any(-1)
    yield "KL(pi || q) does not exceed the bound", fine & ~(statistics["kl_after"] <= tokens.bound)
    yield "at most 20 evaluations", statistics["solver_evaluations"] > MAX_EVALUATIONS
    yield "the regression KL is not negative", fine & ~(values[1] >= -1e-6)
    inside = fine & (statistics["projected_share"] == 0)
    yield "a token inside the region keeps its step size of 1", inside & (statistics["step_size"] != 1)
    yield "and has no regression", inside & (values[1] != 0)


def check_chain_forms(
    tokens: Tokens, found: tuple[PolicyTerms, Tensor], other: tuple[PolicyTerms, Tensor], same_selection: Tensor
) -> Violations:
    """What holds between the two forms on the same support, where they select the same ids of the new policy."""
    (terms, gradient), (its, its_gradient) = found, other
    fine = ~tokens.broken
    ours, theirs = (dict(zip(STATISTICS, x.statistics, strict=True)) for x in (terms, its))
    places = _logit_places(tokens.new, tokens.vocab).squeeze(-1)
    assert terms.entropy is not None and its.entropy is not None
    entropy = (terms.entropy - its.entropy).abs()
    yield "both forms say the same of the entropy", fine & ~(entropy <= 2 * places * (1 + its.entropy))
    sampled = (terms.sampled_log_probs - its.sampled_log_probs).abs()
    yield "and of the sampled id", fine & ~(sampled <= places)
    for name in ("support_size", "cap_hit_share"):
        differs = ours[name] != theirs[name]
        edge = (ours["old_kept_mass"] - tokens.selection.mass_to_keep).abs() < places + 1e-6
        yield f"and of {name}", fine & differs & ~edge
    if tokens.bound < AGREEING_BOUND:
        return
    # At the edge of the region or of what is accepted, rounding decides.
    near = (theirs["kl_before"] - tokens.bound).abs() <= 1e-2 * tokens.bound + 1e-5
    same = fine & ~near & (ours["solver_evaluations"] == theirs["solver_evaluations"]) & same_selection
    for name in ("log_ratio", "regression_kl"):
        our, its_own = getattr(terms, name).detach(), getattr(its, name).detach()
        error = (our - its_own).abs() / (1 + its_own.abs())
        yield f"and of {name}", same & ~(error <= 64 * places)
    size = its_gradient.abs().amax(-1).double() + 1
    error = (gradient.double() - its_gradient.double()).abs().amax(-1) / size
    once = 2**-6 if gradient.dtype == torch.bfloat16 else 0.0
    yield "and of the gradient", same & ~(error <= once + 64 * places)


def fuzz_tokens(extent: Extent, count: int, elements: int, vocabs: Sequence[int]) -> Outcome:
    """Fuzz selection, terms and gradients in Triton, against float64 and the torch form."""
    outcome = Outcome()
    for number, tokens in enumerate(draw_tokens(extent, count, elements, vocabs)):
        support = select(tokens.logits(tokens.old, "torch"), tokens.sampled, tokens.selection)
        own = select(tokens.logits(tokens.old, "auto"), tokens.sampled, tokens.selection)
        selected = [select(tokens.logits(tokens.new, form), tokens.sampled, tokens.selection).ids for form in FORMS]
        same_selection = (selected[0] == selected[1]).all(-1)
        found, other = (run_chain(tokens, support, form) for form in FORMS)
        violations = (
            check_support(tokens, own),
            check_chain(tokens, *found),
            check_chain(tokens, *other),
            check_chain_forms(tokens, found, other, same_selection),
        )
        what = f"seed {extent.seed}, chunk {number}: {tokens.rule}, {tokens.vocab} ids, {tokens.selection}, "
        what += f"{tokens.new.dtype}, bound {tokens.bound:.3g}"
        _count(outcome, len(tokens.new), itertools.chain(*violations), what, (tokens.new, tokens.old))
    return outcome


# --- the attacks ------------------------------------------------------------------------------------------------------

ROWS = 10_000_000
INTERPRETED = {"projection": 4_000, "tokens": 1_500}
"""Rows in Triton's interpreter: some minutes on two cores."""
VOCABS, VOCABS_ON_GPU = (1, 2, 7, 60, 130), (2, 60, 1031, 9000)


def attack_torch(extent: Extent) -> Outcome:
    """The projection's torch form, on any device."""
    return fuzz_projection(extent, extent.tries(ROWS), _elements(extent), "torch")


def attack_triton(what: Literal["projection", "tokens"], extent: Extent) -> Outcome:
    """A Triton form: on a GPU here, otherwise in processes of Triton's interpreter."""
    if extent.device.type == "cuda":
        if what == "projection":
            return fuzz_projection(extent, extent.tries(ROWS), _elements(extent), "auto")
        return fuzz_tokens(extent, extent.tries(ROWS), _elements(extent), VOCABS_ON_GPU)
    if importlib.util.find_spec("triton") is None:
        return Outcome(skipped="Triton is not installed")
    count, workers = extent.tries(INTERPRETED[what]), os.cpu_count() or 1
    shares = [share for worker in range(workers) if (share := (count + worker) // workers) > 0]
    with ThreadPoolExecutor(workers) as pool:
        results = pool.map(partial(_interpreted, what), shares, range(extent.seed, extent.seed + len(shares)))
        outcome = Outcome()
        for result in results:
            outcome.count(result["tried"] - result["fell"], ())
            outcome.count(result["fell"], [*result["examples"], *[""] * (result["fell"] - len(result["examples"]))])
    return outcome


def _elements(extent: Extent) -> int:
    return 1 << (20 if extent.device.type == "cpu" else 23)


def _interpreted(what: str, count: int, seed: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.attack.kernels", what, str(count), str(seed)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result: dict[str, Any] = json.loads(run(command, cwd=ROOT, env=environment, check=True).stdout.splitlines()[-1])
    return result


def _in_the_interpreter(what: str, count: int, seed: int) -> Outcome:
    """This process's part of an attack; Triton must not have been imported without the interpreter."""
    from tests.core.kernels import interpreter

    assert kernels.available(torch.device("cpu"))
    # It computes with numbers of no distribution too, and says so.
    warnings.filterwarnings("ignore", category=RuntimeWarning)
    interpreter.shrink()
    _patch_once()
    extent = Extent(Path(), seed=seed)
    if what == "projection":
        return fuzz_projection(extent, count, 1 << 9, "auto")
    return fuzz_tokens(extent, count, 1 << 9, VOCABS)


def _patch_once() -> None:
    """Have the interpreter patch triton.language once for each module, not at each call: that is half of its time."""
    from triton.runtime import interpreter

    patched: set[int] = set()

    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        module = id(function.fn.__globals__)
        if module not in patched:
            patched.add(module)
            interpreter._patch_lang(function.fn)
        return function.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


ATTACKS = (
    Attack(
        "projection",
        "pi is a distribution within the bound, on the path from q to p, with the gradient of the formula; rows inside "
        "the region keep their bits, 20 evaluations at most, NaN only where there is no distribution",
        attack_torch,
    ),
    Attack("projection_triton", "the same, and the torch form agrees", partial(attack_triton, "projection")),
    Attack(
        "tokens_triton",
        "the kept ids are the most probable ones, pi is within the bound, terms and gradients are finite and agree "
        "with the torch form",
        partial(attack_triton, "tokens"),
    ),
)

if __name__ == "__main__":
    print(json.dumps(asdict(_in_the_interpreter(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))))
