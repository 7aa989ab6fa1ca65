"""How long the passes take on this device, vanilla's and ours, and the card's own rates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.gpu.checks import DROPPED_MASS, terms_of
from benchmarks.gpu.session import Session
from benchmarks.inputs import make_batch
from benchmarks.rows import Case
from verl_troll.core import kernels
from verl_troll.core.comparison import RULES
from verl_troll.core.kernels.constants import STATISTICS
from verl_troll.core.lm_head import LinearHead
from verl_troll.core.logits import DenseLogits, LogitsSource
from verl_troll.core.loss import PolicyTerms
from verl_troll.core.support import Selection, select
from verl_troll.core.vocab import VocabLogits

COPY = "copy: one read, one write"
FLASH = "update, flash-attention's cross-entropy in place"
FLASH_OLD = "old pass with entropy, flash-attention's cross-entropy and torch's entropy, compiled"
OLD = "old pass, TROLL with entropy"
READ = "reading kernel, k = 0"


def run(session: Session) -> None:
    """Measure all times."""
    for dtype in ("bfloat16", "float32"):
        _logits(session, dtype)
    for units in session.sizes.hidden:
        _head(session, units)


def _loss(terms: PolicyTerms) -> Tensor:
    loss: Tensor = (terms.log_ratio.exp() + terms.regression_kl).mean()
    return loss


def _logits(session: Session, tag: str) -> None:
    sizes, device = session.sizes, session.device
    batch = make_batch(Case(vocab=sizes.vocab, tokens=sizes.tokens, k=sizes.k, dtype=tag, device=device))
    logits, moved, ids, rows = batch.old, batch.new, batch.labels, batch.rows
    work = torch.empty_like(logits)

    def timed(name: str, function: Callable[[Any], object], prepare: Any = lambda: None, repeat: int = 11) -> None:
        session.time(f"{tag}, {name}", function, prepare, repeat=repeat)

    def fresh() -> Tensor:
        nonlocal work
        work = work.detach()
        work.copy_(moved)
        return work.requires_grad_()

    def read_of(k: int) -> Callable[[Any], object]:
        return lambda _: kernels.read_rows(logits, rows, none, sizes.vocab, k=k)

    timed(COPY, lambda _: work.copy_(logits))
    none = torch.empty(sizes.tokens, 0, dtype=torch.int64, device=device)
    timed(READ, lambda _: kernels.read_rows(logits, rows, none, sizes.vocab))
    for k in (sizes.k, 4 * sizes.k):
        timed(f"reading kernel, k = {k}", read_of(k))
    max_logit, sumexp, *_ = kernels.read_rows(logits, rows, none, sizes.vocab)
    column, level = ids.unsqueeze(-1), -1 / sumexp
    timed(
        "writing kernel, in place",
        lambda out: kernels.write_gradient(
            out.detach(), out.detach(), rows, sizes.vocab, max_logit, level, None, column, sumexp.unsqueeze(-1)
        ),
        fresh,
    )
    timed(OLD, lambda _: select(VocabLogits.of(logits, rows), ids, Selection(sizes.k, DROPPED_MASS), entropy=True))
    old = select(VocabLogits.of(logits, rows), ids, Selection(sizes.k, DROPPED_MASS))

    def update(rule: str, entropy: bool, form: kernels.Form = "auto") -> Callable[[Tensor], object]:
        def step(leaf: Tensor) -> object:
            terms = terms_of(rule, DenseLogits(leaf, reuse=True, form=form), rows, old, sizes.k, entropy=entropy)
            loss = _loss(terms)
            if terms.entropy is not None:
                loss = loss + 0.01 * terms.entropy.mean()
            return torch.autograd.grad(loss, leaf)

        return step

    for rule in RULES:
        timed(f"update, TROLL {rule}", update(rule, entropy=False), fresh)
    timed("update with entropy bonus, TROLL union", update("union", entropy=True), fresh)
    terms = terms_of("union", DenseLogits(moved), rows, old, sizes.k)
    session.facts[f"{tag}, projected share"] = round(float(terms.projected.mean()), 3)
    session.facts[f"{tag}, ids kept"] = round(float(terms.statistics[STATISTICS.index("support_size")].mean()), 1)

    flash = _flash_cross_entropy() if session.on_gpu else None
    if flash is not None:
        timed(FLASH, lambda leaf: torch.autograd.grad(flash(leaf, ids, inplace_backward=True)[0].mean(), leaf), fresh)

        # verl compiles it by default.
        for name, entropy in (("", _entropy), (", compiled", torch.compile(_entropy, dynamic=True))):

            def flash_old(_: None, entropy: Callable[[Tensor], Tensor] = entropy) -> None:
                with torch.no_grad():
                    flash(logits, ids)
                    entropy(logits)

            timed(FLASH_OLD.removesuffix(", compiled") + name, flash_old, repeat=3)
        timed("old pass without entropy, flash-attention's cross-entropy", lambda _: flash(logits, ids))
    timed(
        "update, torch's cross-entropy",
        lambda leaf: torch.autograd.grad(functional.cross_entropy(leaf.float(), ids), leaf),
        fresh,
        repeat=3,
    )
    if tag == "bfloat16":
        in_torch = VocabLogits.of(DenseLogits(logits, form="torch"), rows)
        timed(
            "old pass, TROLL's torch form",
            lambda _: select(in_torch, ids, Selection(sizes.k, DROPPED_MASS), entropy=True),
            repeat=3,
        )
        for rule in RULES:
            timed(f"update, TROLL's torch form, {rule}", update(rule, entropy=False, form="torch"), fresh, repeat=3)


def _entropy(logits: Tensor) -> Tensor:
    """The entropy as verl computes it by default: a softmax of all logits, and their log-sum-exp."""
    probs = torch.softmax(logits, dim=-1)
    return torch.logsumexp(logits, dim=-1) - (probs * logits).sum(-1)


def _flash_cross_entropy() -> Any:
    """flash-attention's Triton cross-entropy; None if it is not installed."""
    try:
        from flash_attn.ops.triton.cross_entropy import cross_entropy_loss
    except ImportError:
        return None
    return cross_entropy_loss


def _head(session: Session, units: int) -> None:
    sizes, device = session.sizes, session.device
    dtype = torch.bfloat16
    generator = torch.Generator(device).manual_seed(units)
    hidden = torch.randn(sizes.tokens, units, generator=generator, device=device, dtype=dtype)
    weight = torch.randn(sizes.vocab, units, generator=generator, device=device, dtype=dtype) * (3 / units**0.5)
    weight.requires_grad_()
    rows = torch.arange(sizes.tokens, device=device)
    ids = torch.randint(sizes.vocab, (sizes.tokens,), generator=generator, device=device)

    def timed(name: str, function: Callable[[Any], object], prepare: Any = lambda: None, repeat: int = 5) -> None:
        session.time(f"head {units}, {name}", function, prepare, repeat=repeat)

    def leaf() -> Tensor:
        return (hidden + 0.02 * torch.randn_like(hidden)).requires_grad_()

    timed("one matrix product", lambda _: hidden @ weight.detach().T)
    fixed = LinearHead(hidden, weight.detach())
    timed("old pass, TROLL fused", lambda _: select(VocabLogits.of(fixed, rows), ids, Selection(sizes.k, DROPPED_MASS)))
    old = select(VocabLogits.of(fixed, rows), ids, Selection(sizes.k, DROPPED_MASS))

    def update(rule: str, source: Callable[[Tensor], LogitsSource]) -> Callable[[Tensor], object]:
        def step(states: Tensor) -> object:
            return torch.autograd.grad(_loss(terms_of(rule, source(states), rows, old, sizes.k)), (states, weight))

        return step

    for rule in RULES:
        timed(f"update, TROLL {rule}, fused", update(rule, lambda states: LinearHead(states, weight)), leaf)
        timed(
            f"update, TROLL {rule}, logits kept",
            update(rule, lambda states: DenseLogits(states @ weight.T, reuse=True)),
            leaf,
        )
    flash = _flash_cross_entropy() if session.on_gpu else None
    if flash is not None:
        timed(
            "update, flash-attention's cross-entropy in place, logits kept",
            lambda states: torch.autograd.grad(
                flash(states @ weight.T, ids, inplace_backward=True)[0].mean(), (states, weight)
            ),
            leaf,
        )

    def of_verl(log_probs: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Tensor], object]:
        return lambda states: torch.autograd.grad(log_probs(states, weight, ids).mean(), (states, weight))

    for name, fused in _verl_heads().items():
        timed(f"update, verl's fused head, {name}", of_verl(fused), leaf, repeat=3)


def _verl_heads() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """verl's fused heads, from hidden states to log-probabilities; empty if verl is not installed."""
    try:
        from verl.utils.experimental.torch_functional import FusedLinearForPPO
        from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy
    except ImportError:
        return {}
    return {
        "torch": lambda states, weight, ids: FusedLinearForPPO()(states.unsqueeze(0), weight, ids.unsqueeze(0))[0],
        "triton": lambda states, weight, ids: linear_cross_entropy(states, weight, ids, 1.0, "none")[0],
    }
