"""Whether the kernels are right on this device: compared with float64, and bit-exact invariants."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.session import Session
from verl_troll.core import kernels
from verl_troll.core.comparison import RULES
from verl_troll.core.kernels import constants
from verl_troll.core.kernels.constants import STATISTICS
from verl_troll.core.lm_head import LinearHead
from verl_troll.core.logits import DenseLogits, LogitsSource
from verl_troll.core.loss import PolicyTerms, policy_terms
from verl_troll.core.projection import project
from verl_troll.core.support import Selection, SparsePolicy, select
from verl_troll.core.vocab import VocabLogits

KL_BOUND = 0.05
DROPPED_MASS = 1e-5
DTYPES = (torch.bfloat16, torch.float32)
Reading = tuple[Tensor, ...]


def run(session: Session) -> None:
    """Run all checks."""

    def kernels_in_use() -> None:
        assert kernels.available(torch.device(session.device)), "Triton does not serve this device"

    session.check("kernels are in use", kernels_in_use)
    k = session.sizes.k
    for dtype in DTYPES:
        tag = str(dtype).removeprefix("torch.")
        for vocab in (session.sizes.vocab, session.sizes.odd_vocab):
            session.check(f"{tag}, {vocab} columns: reading", functools.partial(reading, session, dtype, vocab, k))
        session.check(f"{tag}: search among ties and without mass", functools.partial(ties, session, dtype))
        session.check(f"{tag}: writing", functools.partial(writing, session, dtype))
    for many in (1, 16, 256, 1024) if session.on_gpu else (1, 16):
        session.check(
            f"reading, k = {many}",
            functools.partial(reading, session, torch.bfloat16, session.sizes.vocab, many, rows=4),
        )
    if session.on_gpu:
        session.check("offsets beyond 2^31", lambda: far_offsets(session))
    for dtype in DTYPES:
        for rule in RULES:
            name = f"{str(dtype).removeprefix('torch.')}, {rule}"
            session.check(f"{name}: the chain", functools.partial(chain, session, dtype, rule))
    session.check("a gradient over logits that are still needed raises", lambda: overwritten(session))
    for width in (11, 66, 130):
        session.check(
            f"{session.sizes.fuzzed} random rows of {width} outcomes",
            functools.partial(fuzz, session, width),
        )
    for rule in RULES:
        session.check(f"fused head, {rule}", functools.partial(head, session, rule))
    if session.on_gpu:
        for rule in RULES:
            session.check(f"the host waits for nothing, {rule}", functools.partial(no_waiting, session, rule))


def read(logits: Tensor, rows: Tensor, k: int, ids: Tensor | None = None) -> Reading:
    """Everything that the reading kernel returns, over all columns."""
    none = torch.empty(len(rows), 0, dtype=torch.int64, device=logits.device)
    max_logit, sumexp, energy, *found = kernels.read_rows(
        logits, rows, none if ids is None else ids, logits.shape[1], k=k, energy=True
    )
    assert energy is not None
    return max_logit, sumexp, energy, *found


def reading(session: Session, dtype: torch.dtype, vocab: int, k: int, rows: int | None = None) -> dict[str, float]:
    """Compare with float64; the bits are the same for any k, beside any rows, and on a second read."""
    count = rows or session.sizes.checked
    logits = session.normal(count, vocab, dtype=dtype)
    order = torch.arange(count, device=session.device)
    ids = torch.randint(vocab, (count, 3), device=session.device)
    ids[0, 1] = -1
    first = read(logits, order, k, ids)
    max_logit, sumexp, energy, values, top_values, top_ids = first
    dense = logits.double()
    shift = dense - dense.amax(-1, keepdim=True)
    weight = shift.exp()
    assert torch.equal(max_logit.double(), dense.amax(-1)), "max_logit"
    torch.testing.assert_close(sumexp.double(), weight.sum(-1), rtol=3e-6, atol=0)
    torch.testing.assert_close(energy.double(), (weight * shift).sum(-1), rtol=3e-6, atol=1e-6)
    wanted = torch.where(ids >= 0, dense.gather(-1, ids.clamp_min(0)), 0.0)
    assert torch.equal(values.double(), wanted), "values"
    best = dense.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(top_values.double(), best.values[:, :k]) and torch.equal(top_ids, best.indices[:, :k]), "top"
    for other in (0, k, max(1, k // 2)):
        again = read(logits, order, other)
        assert all(torch.equal(x, y) for x, y in zip(first[:3], again[:3], strict=True)), f"bits at k = {other}"
    for some in (order[:1], order[-3:], order.flip(0)):
        alone = read(logits[some].contiguous(), torch.arange(len(some), device=session.device), k)
        assert all(torch.equal(x[some], y) for x, y in zip(first[:3], alone[:3], strict=True)), "bits beside other rows"
        assert torch.equal(first[5][some], alone[5]), "ids beside other rows"
    return {"relative error of the mass": float((sumexp.double() / weight.sum(-1) - 1).abs().max())}


def ties(session: Session, dtype: torch.dtype) -> None:
    """Equal logits are ordered by column; columns without mass come last."""
    count, vocab, k = 8, session.sizes.vocab, session.sizes.k
    logits = torch.randint(3, (count, vocab), device=session.device).to(dtype)
    logits[1] = 0
    logits[2] = -math.inf
    logits[3, 5:] = -math.inf
    logits[4, : vocab - 2] = -math.inf
    logits[5] = torch.arange(vocab, device=session.device) / vocab
    logits[6] = -torch.arange(vocab, device=session.device) / vocab
    logits[7, ::2] = torch.finfo(dtype).min
    _, sumexp, energy, _, values, ids = read(logits, torch.arange(count, device=session.device), k)
    best = logits.double().sort(dim=-1, descending=True, stable=True)
    assert torch.equal(ids, best.indices[:, :k]), "ids"
    assert torch.equal(values.double(), best.values[:, :k]), "values"
    assert bool(sumexp.isfinite().all() and energy.isfinite().all() and sumexp[2] == 0), "sumexp"


def writing(session: Session, dtype: torch.dtype) -> None:
    """Compare with float64; same result in place and apart, zero outside."""
    count, vocab, width = 16, session.sizes.vocab, min(65, session.sizes.vocab // 2)
    logits = session.normal(count, vocab, dtype=dtype)
    rows = torch.arange(count, device=session.device)[1::2]
    columns = vocab - 3
    some = logits[rows].float()
    max_logit = some[:, :columns].amax(-1)
    ids = torch.rand(len(rows), columns, device=session.device).argsort(-1)[:, :width]
    ids[:, 3] = -1
    level, slope = torch.randn(2, len(rows), device=session.device)
    corrections = torch.randn(len(rows), width, device=session.device)
    for b in (None, slope):
        shift = some[:, :columns].double() - max_logit.double().unsqueeze(-1)
        factor = level.double().unsqueeze(-1) + (0.0 if b is None else b.double().unsqueeze(-1) * shift)
        exact = torch.zeros(count, vocab, dtype=torch.float64, device=session.device)
        exact[rows, :columns] = (shift.exp() * factor).scatter_add(
            -1, ids.clamp_min(0), torch.where(ids >= 0, corrections, 0.0).double()
        )
        apart, over = torch.full_like(logits, math.nan), logits.clone()
        kernels.write_gradient(apart, logits, rows, columns, max_logit, level, b, ids, corrections)
        kernels.write_gradient(over, over, rows, columns, max_logit, level, b, ids, corrections)
        assert torch.equal(apart, over), "in place"
        # The interpreter truncates float32 to bfloat16 where a GPU rounds.
        once = {torch.bfloat16: 2**-8 if session.on_gpu else 2**-7, torch.float32: 2e-6}[dtype]
        torch.testing.assert_close(apart.double(), exact, rtol=once * 1.01, atol=5e-6)
        assert not bool(apart[::2].any() or apart[:, columns:].any()), "zeros"


def far_offsets(session: Session) -> None:
    """Rows whose elements have offsets beyond 2^31."""
    vocab, k = session.sizes.vocab, session.sizes.k
    count = 2**31 // vocab + 40
    logits = torch.full((count, vocab), -5.0, dtype=torch.bfloat16, device=session.device)
    rows = torch.arange(count - 8, count, device=session.device)
    logits[rows] = session.normal(8, vocab, dtype=torch.bfloat16)
    near = torch.arange(8, device=session.device)
    few = logits[rows].clone()
    far = read(logits, rows, k)
    assert all(torch.equal(x, y) for x, y in zip(far, read(few, near, k), strict=True)), "reading"
    ids, ones = far[5], torch.ones_like(far[4])
    level = -torch.ones(8, device=session.device)
    kernels.write_gradient(few, few, near, vocab, far[0], level, None, ids, ones)
    kernels.write_gradient(logits, logits, rows, vocab, far[0], level, None, ids, ones)
    assert torch.equal(logits[rows], few) and not bool(logits[: count - 8].any()), "writing"


def terms_of(rule: str, source: LogitsSource, rows: Tensor, old: SparsePolicy, k: int, **options: Any) -> PolicyTerms:
    """The whole chain with the published settings."""
    return policy_terms(
        rule, VocabLogits.of(source, rows), old, Selection(k, DROPPED_MASS), kl_bound=KL_BOUND, **options
    )


def loss_of(terms: PolicyTerms) -> Tensor:
    """A loss that every output contributes to."""
    weight = torch.linspace(-1, 1, len(terms.log_ratio), device=terms.log_ratio.device, dtype=terms.log_ratio.dtype)
    loss = (weight * terms.log_ratio.exp()).mean() + terms.regression_kl.mean()
    loss = loss + 0.02 * terms.sampled_log_probs.mean()
    return loss if terms.entropy is None else loss + 0.01 * terms.entropy.mean()


def chain(session: Session, dtype: torch.dtype, rule: str) -> dict[str, float]:
    """Equal policies have ratio exactly 1; the bound holds; values and gradient match the torch form in float64."""
    sizes, device = session.sizes, session.device
    count, k = sizes.checked, sizes.k
    logits = session.normal(count, sizes.vocab, dtype=dtype)
    moved = (logits.float() + session.normal(count, sizes.vocab, dtype=torch.float32, seed=1, scale=0.8)).to(dtype)
    rows = torch.arange(count, device=device)
    ids = torch.randint(sizes.vocab, (count,), device=device)
    ids[: count // 2] = logits[: count // 2].argmax(-1)
    old = select(VocabLogits.of(logits, rows), ids, Selection(k, DROPPED_MASS))
    same = terms_of(rule, DenseLogits(logits.clone().requires_grad_()), rows, old, k)
    assert not bool(same.log_ratio.any() or same.regression_kl.any()), "the ratio of equal policies is not 1"

    found: dict[str, float] = {}
    for mode in ("implicit", "detached"):
        options: dict[str, Any] = {"entropy": True, "step_size_gradient": mode}
        leaf = moved.clone().requires_grad_()
        terms = terms_of(rule, DenseLogits(leaf), rows, old, k, **options)
        (gradient,) = torch.autograd.grad(loss_of(terms), leaf)
        kl = terms.statistics[STATISTICS.index("kl_after")]
        assert float(kl.max()) <= KL_BOUND * (1 + 1e-5), f"KL {float(kl.max())} exceeds the bound"
        assert not bool(terms.statistics[STATISTICS.index("unconverged")].any()), "unconverged"
        base = moved.clone().requires_grad_()
        reused = terms_of(rule, DenseLogits(base * 1.0, reuse=True), rows, old, k, **options)
        (over,) = torch.autograd.grad(loss_of(reused), base)
        assert torch.equal(gradient, over), "the gradient over the logits differs"

        exact = moved.double().requires_grad_()
        exact_old = SparsePolicy(old.ids, old.log_probs.double(), old.sampled)
        reference = terms_of(rule, DenseLogits(exact, form="torch"), rows, exact_old, k, **options)
        (exact_gradient,) = torch.autograd.grad(loss_of(reference), exact)
        for name in ("log_ratio", "regression_kl", "sampled_log_probs", "entropy"):
            ours, theirs = getattr(terms, name).double(), getattr(reference, name)
            torch.testing.assert_close(ours, theirs, rtol=5e-3, atol=1e-4, msg=f"{name}: {ours} against {theirs}")
        error = float((gradient.double() - exact_gradient).norm() / exact_gradient.norm())
        assert error < (1e-2 if dtype == torch.bfloat16 else 2e-3), f"gradient off by {error}"
        found[f"gradient, {mode}"] = error
        found["projected"] = float(terms.projected.mean())
    assert found["projected"] > 0, "nothing was projected"
    return found


def overwritten(session: Session) -> str:
    """Overwriting logits that the operation behind them kept for its backward pass raises."""
    vocab = session.sizes.vocab
    leaf = session.normal(4, vocab, dtype=torch.float32, scale=0.3).requires_grad_()
    kept = leaf.exp()
    rows, ids = torch.arange(4, device=session.device), torch.zeros(4, dtype=torch.int64, device=session.device)
    old = select(VocabLogits.of(kept.detach(), rows), ids, Selection(session.sizes.k, DROPPED_MASS))
    terms = terms_of("anchored", DenseLogits(kept, reuse=True), rows, old, session.sizes.k)
    try:
        torch.autograd.grad(terms.sampled_log_probs.sum(), leaf)
    except RuntimeError:
        return "raises"
    raise AssertionError("a silently wrong gradient")


def fuzz(session: Session, width: int) -> dict[str, float]:
    """Random pairs of distributions through the projection and the chain: the bound holds, the torch form agrees."""
    generator = torch.Generator(session.device).manual_seed(width)
    shape = (session.sizes.fuzzed, width)
    options: dict[str, Any] = {"generator": generator, "device": session.device}
    spread = 8 * torch.rand(shape[0], 1, **options)
    moved = 3 * torch.rand(shape[0], 1, **options) ** 3
    old = (spread * torch.randn(shape, **options)).log_softmax(-1)
    new = (old + moved * torch.randn(shape, **options)).log_softmax(-1)
    sampled = torch.randint(width, (shape[0],), **options)
    reference = project(new, old, KL_BOUND, form="torch")
    ours = project(new, old, KL_BOUND)
    assert bool((ours.kl <= KL_BOUND).all()), f"KL {float(ours.kl.max())} exceeds the bound"
    assert bool(ours.converged.all()), "unconverged"
    # A step size may be anywhere in a window of a thousandth.
    torch.testing.assert_close(ours.kl, reference.kl, rtol=2e-3, atol=1e-7)
    torch.testing.assert_close(ours.kl_before, reference.kl_before, rtol=1e-5, atol=1e-9)

    from verl_troll.core.kernels import tokens_triton

    # The vocabulary has as many ids as there are outcomes, so the chain compares on the same ones.
    zeros = torch.zeros(shape[0], device=session.device)
    (log_ratio, *_), statistics, *_ = tokens_triton.terms(
        torch.arange(width, device=session.device).expand(shape),
        old,
        sampled,
        None,
        new,
        zeros,
        zeros + 1,
        kl_bound=KL_BOUND,
        tolerance=constants.TOLERANCE,
        implicit=True,
        vocab_size=width,
        k=width,
        mass_to_keep=math.inf,
    )
    kl_before, kl_after, projected = statistics[:3]
    assert bool((kl_after <= KL_BOUND).all()), f"KL {float(kl_after.max())} exceeds the bound in the chain"
    assert not bool(statistics[STATISTICS.index("unconverged")].any()), "unconverged in the chain"
    clear = (reference.kl_before - KL_BOUND).abs() > 1e-6
    other = (projected > 0) != (reference.kl_before > KL_BOUND)
    assert not bool((other & clear).any()), "other tokens are projected in the chain"
    torch.testing.assert_close(kl_before, reference.kl_before, rtol=1e-3, atol=1e-6)
    place = sampled.unsqueeze(-1)
    expected = (reference.log_probs.gather(-1, place) - old.gather(-1, place)).squeeze(-1)
    torch.testing.assert_close(log_ratio, expected, rtol=1e-3, atol=1e-3)
    return {
        "projected": float(projected.mean()),
        "most evaluations": int(ours.evaluations.max()),
        "largest difference of log pi": float((ours.log_probs - reference.log_probs).abs().max()),
    }


def head(session: Session, rule: str) -> dict[str, float]:
    """The fused head against the chain on its own logits; equal policies have ratio 1 when read in other blocks."""
    sizes, device = session.sizes, session.device
    count, units = (2500, sizes.hidden[0]) if session.on_gpu else (7, sizes.hidden[0])
    generator = torch.Generator(device).manual_seed(5)
    hidden = torch.randn(count, units, generator=generator, device=device)
    weight = torch.randn(sizes.vocab, units, generator=generator, device=device) * 3 / units**0.5
    # Integers of few bits: products are exact in any order, so differences come from the reading alone.
    whole_hidden, whole_weight = (4 * hidden).round().clamp(-8, 8), (8 * weight).round().clamp(-8, 8) / 8
    rows = torch.arange(count, device=device)
    ids = torch.randint(sizes.vocab, (count,), generator=generator, device=device)
    old = select(VocabLogits.of(LinearHead(whole_hidden, whole_weight), rows), ids, Selection(sizes.k, DROPPED_MASS))
    some = rows[rows % 7 != 3]
    part = SparsePolicy(old.ids[some], old.log_probs[some], old.sampled[some])
    again = LinearHead(whole_hidden.requires_grad_(), whole_weight)
    same = terms_of(rule, again, some, part, sizes.k)
    assert not bool(same.log_ratio.any()), "the ratio of equal policies is not 1"

    found = {}
    hidden, weight = hidden.bfloat16().requires_grad_(), weight.bfloat16().requires_grad_()
    old = select(VocabLogits.of(LinearHead(hidden, weight), rows), ids, Selection(sizes.k, DROPPED_MASS))
    part = SparsePolicy(old.ids[some], old.log_probs[some], old.sampled[some])
    same = terms_of(rule, LinearHead(hidden, weight), some, part, sizes.k)
    found["share of ratios that are not 1, bfloat16"] = float((same.log_ratio != 0).float().mean())
    part = SparsePolicy(old.ids[some], (old.log_probs[some] * 1.05), old.sampled[some])
    gradients = []
    for source in (LinearHead(hidden, weight), DenseLogits(hidden @ weight.T)):
        terms = terms_of(rule, source, some, part, sizes.k, entropy=True)
        gradients.append(torch.autograd.grad(loss_of(terms), (hidden, weight)))
    for name, ours, theirs in zip(("hidden", "weight"), *gradients, strict=True):
        error = float((ours.double() - theirs.double()).norm() / theirs.double().norm())
        assert error < 2e-2, f"gradient of {name} off by {error}"
        found[f"gradient of {name}"] = error
    return found


def no_waiting(session: Session, rule: str) -> None:
    """Old pass, update and backward under torch's check for synchronisation."""
    logits = session.normal(64, session.sizes.vocab, dtype=torch.bfloat16)
    rows = torch.arange(64, device=session.device)
    ids = torch.randint(session.sizes.vocab, (64,), device=session.device)

    def step() -> None:
        leaf = logits.clone().requires_grad_()
        old = select(VocabLogits.of(logits, rows), ids, Selection(session.sizes.k, DROPPED_MASS), entropy=True)
        loss_of(terms_of(rule, DenseLogits(leaf, reuse=False), rows, old, session.sizes.k)).backward()

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
