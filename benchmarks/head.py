"""The language-model head with the loss: from hidden states to the gradients of hidden states and weight.

Fused forms never materialise the logits. At 32k tokens only they run; the unfused form's memory is computed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from verl.utils.experimental.torch_functional import FusedLinearForPPO

from benchmarks import troll, vanilla
from benchmarks.measure import Contender, Spread, peak_bytes, take_turns
from benchmarks.rows import Case, Floor, Row, parameters, phase_seconds, ratio
from verl_troll.core.lm_head import LinearHead
from verl_troll.core.logits import DenseLogits
from verl_troll.core.support import Selection, SparsePolicy, select
from verl_troll.core.vocab import VocabLogits

NAME = "head"
AXES = ("vocab", "tokens", "dtype", "hidden", "k")
VANILLA, FUSED = "vanilla", "verl fused"
FORWARD, BOTH = "forward", "forward + backward"
PHASES = {FORWARD: ("forward",), BOTH: ("forward", "backward")}
_LIKELY, _PEAK, _STEP = 4, 25.0, 2.0
_MOVED_SHARE, _NOISE, _NOISE_MOVED = 0.25, 0.05, 1.0
_PRODUCT_ROWS = 512


def needed_bytes(case: Case) -> int:
    """Memory of the method that needs most."""
    size = case.torch_dtype.itemsize
    return int(case.logits_bytes * (1.3 + 3 * 4 / size)) + 4 * (case.vocab + case.tokens) * case.hidden * size


def fused_bytes(case: Case) -> int:
    """Memory of the fused methods."""
    size = case.torch_dtype.itemsize
    return 4 * (case.vocab + case.tokens) * case.hidden * size + 6 * 1024 * case.vocab * 4


def unfused_bytes(case: Case) -> int:
    """Minimum memory of an unfused form: the logits (overwritten by their gradient) and both gradients."""
    return case.logits_bytes + (case.vocab + case.tokens) * case.hidden * case.torch_dtype.itemsize


class _Inputs:
    """Hidden states of the old and the new policy, whose logits have a few likely ids, and one weight."""

    def __init__(self, case: Case) -> None:
        generator = torch.Generator(case.device).manual_seed(0)
        shape: dict[str, Any] = dict(generator=generator, device=case.device)
        tokens, vocab, units = case.tokens, case.vocab, case.hidden
        weight = torch.randn(vocab, units, **shape) / units**0.5
        ids = torch.randint(vocab, (tokens, _LIKELY), **shape)
        level = _PEAK - _STEP * torch.arange(_LIKELY, device=case.device)
        hidden = (weight[ids] * level.unsqueeze(-1)).sum(1)
        moved = torch.rand(tokens, 1, **shape) < _MOVED_SHARE
        noise = torch.where(moved, _NOISE_MOVED, _NOISE) * torch.randn(tokens, units, **shape)
        self.case = case
        self.labels = ids[:, 0].contiguous()
        self.rows = torch.arange(tokens, device=case.device)
        self.advantages = torch.randn(tokens, **shape)
        self.weight = weight.to(case.torch_dtype).requires_grad_()
        self.settings: dict[str, Any] = dict(k=case.k, dropped_mass=troll.DROPPED_MASS)
        old_head = LinearHead(hidden.to(case.torch_dtype), self.weight.detach())
        self.old: SparsePolicy = troll.compact(
            select(VocabLogits.of(old_head, self.rows), self.labels, Selection(**self.settings))
        )
        self.old_log_probs = troll.sampled_log_probs(self.old)
        self.hidden = (hidden + noise).to(case.torch_dtype).requires_grad_()
        self.last_terms: list[Any] = []

    def logits(self) -> Tensor:
        result: Tensor = self.hidden @ self.weight.T
        return result

    def clipped(self) -> Tensor:
        log_probs = vanilla.log_probs(self.logits(), self.labels)
        return vanilla.clipped_loss(self.old_log_probs, log_probs, self.advantages)

    def verl_fused(self) -> Tensor:
        log_probs, _ = FusedLinearForPPO(impl_backend="torch")(self.hidden, self.weight, self.labels, temperature=1.0)
        return vanilla.clipped_loss(self.old_log_probs, log_probs, self.advantages)

    def projected(self, rule: str, *, fused: bool, reuse: bool = False) -> Tensor:
        source = LinearHead(self.hidden, self.weight) if fused else DenseLogits(self.logits(), reuse=reuse)
        logits = VocabLogits.of(source, self.rows)
        loss, terms = troll.projected_loss(rule, logits, self.old, self.advantages, k=self.settings["k"])
        self.last_terms[:] = [terms]
        return loss

    def contender(self, name: str, loss: Callable[[], Tensor]) -> Contender:
        def forward(_: None) -> Tensor:
            with vanilla.engine_context(self.case):
                return loss()

        def backward(value: Tensor) -> Any:
            return torch.autograd.grad(value, (self.hidden, self.weight))

        return Contender(name, {"forward": forward, "backward": backward})

    def product(self) -> tuple[Contender, int]:
        """The forward pass's matrix product on some rows, and its number of operations."""
        some = self.hidden.detach()[:_PRODUCT_ROWS]
        weight = self.weight.detach()
        operations = 2 * some.shape[0] * some.shape[1] * weight.shape[0]
        return Contender("product", {"product": lambda _: some @ weight.T}), operations

    def floor(self, seconds: float, operations: int, phase: str) -> Floor:
        products = 1 if phase == FORWARD else 3
        needed = products * 2 * self.case.tokens * self.case.hidden * self.case.vocab
        counted = "one matrix product" if products == 1 else "three matrix products: logits and both gradients"
        return Floor(seconds * needed / operations, 0, f"{counted}; no bytes", needed)

    def fused_losses(self) -> dict[str, Callable[[], Tensor]]:
        return {
            FUSED: self.verl_fused,
            "anchored, fused": lambda: self.projected("anchored", fused=True),
            "union, fused": lambda: self.projected("union", fused=True),
        }


def run(case: Case, repeat: int, shard: None = None) -> list[Row]:
    """Time and peak memory of unfused and fused forms."""
    inputs = _Inputs(case)
    losses: dict[str, Callable[[], Tensor]] = {
        VANILLA: inputs.clipped,
        "anchored": lambda: inputs.projected("anchored", fused=False),
        "anchored, reused": lambda: inputs.projected("anchored", fused=False, reuse=True),
        **inputs.fused_losses(),
    }
    contenders = {name: inputs.contender(name, loss) for name, loss in losses.items()}
    product, operations = inputs.product()
    times = take_turns([*contenders.values(), product], repeat, case.device)
    product_seconds = Spread.of(phase_seconds(times, "product", ["product"])).median
    result = []
    for name, contender in contenders.items():
        inputs.last_terms.clear()
        peak = {FORWARD: peak_bytes(contender, case.device, phases=1), BOTH: peak_bytes(contender, case.device)}
        facts = troll.support_facts(inputs.old)
        facts |= troll.projection_facts(inputs.last_terms[0]) if inputs.last_terms else {}
        facts["gflop_per_s"] = round(operations / product_seconds / 1e9)
        for phase, parts in PHASES.items():
            own = phase_seconds(times, name, parts)
            result.append(
                Row(
                    NAME,
                    name,
                    parameters(case, *AXES, "device"),
                    phase,
                    Spread.of(own),
                    ratio(own, phase_seconds(times, VANILLA, parts)),
                    VANILLA,
                    peak[phase],
                    inputs.floor(product_seconds, operations, phase),
                    facts,
                )
            )
    return result


def run_fused_alone(case: Case) -> list[Row]:
    """One run of each fused form with peak memory, beside the computed bytes of the unfused one."""
    inputs = _Inputs(case)
    product, operations = inputs.product()
    product_seconds = Spread.of(phase_seconds(take_turns([product], 3, case.device), "product", ["product"])).median
    unfused = unfused_bytes(case)
    result = [
        Row(
            NAME,
            "unfused, computed",
            parameters(case, *AXES, "device"),
            BOTH,
            extra_bytes=unfused,
            facts={"counted": "logits with the gradient over them, gradients of hidden states and weight"},
        )
    ]
    base = 0.0
    for name, loss in inputs.fused_losses().items():
        contender = inputs.contender(name, loss)
        start = time.perf_counter()
        peak = peak_bytes(contender, case.device)
        seconds = time.perf_counter() - start
        base = base or seconds
        result.append(
            Row(
                NAME,
                name,
                parameters(case, *AXES, "device"),
                BOTH,
                Spread.of([seconds]),
                seconds / base,
                FUSED,
                peak,
                inputs.floor(product_seconds, operations, BOTH),
                {"share_of_unfused_computed": round(peak / unfused, 4), "timed": "once, under the memory meter"},
            )
        )
    return result
