"""From the new policy's logits to the loss, and back to the gradient of the logits.

Peak memory above the logits counts, including the gradient. ``reused`` is TROLL with the gradient written over the
logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import published, troll, vanilla
from benchmarks.inputs import make_batch
from benchmarks.measure import Contender, Spread, bandwidth_contenders, peak_bytes, take_turns
from benchmarks.rows import Case, Floor, Row, parameters, phase_seconds, ratio
from verl_troll.core.logits import DenseLogits
from verl_troll.core.support import Selection, select
from verl_troll.core.vocab import VocabLogits, VocabShard

NAME = "update"
AXES = ("vocab", "tokens", "k", "dtype", "ranks", "response_share")
VANILLA = "vanilla"
FORWARD, BOTH = "forward", "forward + backward"
PHASES = {FORWARD: ("forward",), BOTH: ("forward", "backward")}


def needed_bytes(case: Case) -> int:
    """Memory of the method that needs most, over all ranks."""
    return int(case.logits_bytes * (2.3 + 3.3 * 4 / case.torch_dtype.itemsize))


def run(case: Case, repeat: int, shard: VocabShard | None = None) -> list[Row]:
    """Time and peak memory of each method."""
    rank = 0 if shard is None else shard.rank
    before = make_batch(case, rank, new=False)
    settings: dict[str, Any] = dict(k=case.k, dropped_mass=troll.DROPPED_MASS)
    old = troll.compact(
        select(VocabLogits.of(before.old, before.rows, shard), before.sampled_ids, Selection(**settings))
    )
    del before
    old_log_probs = troll.sampled_log_probs(old)
    batch = make_batch(case, rank, old=False)
    rows, advantages = batch.rows, batch.advantages
    work = torch.empty_like(batch.new)
    last_terms: list[Any] = []

    def prepare() -> Tensor:
        work.copy_(batch.new)
        return work.detach().requires_grad_()

    def clipped(logits: Tensor) -> Tensor:
        read = vanilla.log_probs if shard is None else vanilla.sharded_log_probs
        return vanilla.clipped_loss(old_log_probs, read(logits, batch.labels)[rows], advantages)

    def projected(rule: str, reuse: bool) -> Callable[[Tensor], Tensor]:
        def loss(logits: Tensor) -> Tensor:
            new = VocabLogits.of(DenseLogits(logits, reuse=reuse), rows, shard)
            result, terms = troll.projected_loss(rule, new, old, advantages, k=case.k)
            last_terms[:] = [terms]
            return result

        return loss

    def as_published(logits: Tensor) -> Tensor:
        own = logits if case.response_share == 1 else logits[rows]
        terms = published.update_terms(
            own, published.Support(old.ids, old.log_probs, old.sampled), kl_bound=troll.KL_BOUND, **settings
        )[0]
        return troll.loss_from_terms(terms.log_ratio, terms.regression_kl, advantages)

    losses: dict[str, Callable[[Tensor], Tensor]] = {
        VANILLA: clipped,
        "anchored": projected("anchored", False),
        "anchored, reused": projected("anchored", True),
        "union": projected("union", False),
        "union, reused": projected("union", True),
    }
    if shard is None:
        losses["published"] = as_published

    def contender(name: str, loss: Callable[[Tensor], Tensor]) -> Contender:
        def forward(logits: Tensor) -> tuple[Tensor, Tensor]:
            with vanilla.engine_context(case):
                return loss(logits), logits

        def backward(state: tuple[Tensor, Tensor]) -> Tensor:
            return torch.autograd.grad(*state)[0]

        return Contender(name, {"forward": forward, "backward": backward}, prepare)

    contenders = {name: contender(name, loss) for name, loss in losses.items()}
    times = take_turns([*contenders.values(), *bandwidth_contenders(work)], repeat, case.device)
    floors = _floors(times, work, rows.shape[0] / case.tokens)
    facts = troll.support_facts(old)
    result = []
    for name, own in contenders.items():
        last_terms.clear()
        forward_peak = peak_bytes(own, case.device, phases=1)
        peak = {FORWARD: forward_peak, BOTH: peak_bytes(own, case.device)}
        projection = troll.projection_facts(last_terms[0]) if last_terms else {}
        for phase, parts in PHASES.items():
            seconds = phase_seconds(times, name, parts)
            result.append(
                Row(
                    NAME,
                    name,
                    parameters(case, *AXES, "device"),
                    phase,
                    Spread.of(seconds),
                    ratio(seconds, phase_seconds(times, VANILLA, parts)),
                    VANILLA,
                    peak[phase],
                    floors[phase],
                    {**facts, **projection, "logits_bytes": work.numel() * work.element_size()},
                )
            )
    return result


def _floors(times: dict[str, dict[str, list[float]]], logits: Tensor, share: float) -> dict[str, Floor]:
    size = logits.numel() * logits.element_size()
    read = Spread.of(phase_seconds(times, "read once", ["read"])).median
    write = Spread.of(phase_seconds(times, "read and write", ["read and write"])).median
    return {
        FORWARD: Floor(read * share, round(size * share), "the response tokens' logits, read once, on each rank"),
        BOTH: Floor(
            (read + write) * share,
            round(3 * size * share),
            "the response tokens' logits read twice, and their gradient written over them once, on each rank",
        ),
    }
