"""Reads the old policy from its logits: log-probs, entropy and, with TROLL, the support.

verl reads all tokens, TROLL only response tokens. verl's trainer computes the entropy in this pass, so the rows with
entropy match a real step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks import published, vanilla
from benchmarks.inputs import make_batch
from benchmarks.measure import Contender, Spread, bandwidth_contenders, peak_bytes, take_turns
from benchmarks.rows import Case, Floor, Row, parameters, phase_seconds, ratio
from benchmarks.troll import DROPPED_MASS, support_facts
from verl_troll.core.support import Selection, select
from verl_troll.core.vocab import VocabLogits, VocabShard

NAME = "old_pass"
AXES = ("vocab", "tokens", "k", "dtype", "ranks", "response_share")
PLAIN, WITH_ENTROPY, CHUNKED = "vanilla", "vanilla, entropy", "vanilla, entropy in chunks"


def needed_bytes(case: Case) -> int:
    """Memory of the method that needs most, over all ranks."""
    return int(case.logits_bytes * (1.3 + (3 if case.ranks == 1 else 4) * 4 / case.torch_dtype.itemsize))


def run(case: Case, repeat: int, shard: VocabShard | None = None) -> list[Row]:
    """Time and peak memory of each method."""
    batch = make_batch(case, 0 if shard is None else shard.rank, new=False)
    logits, rows, sampled = batch.old, batch.rows, batch.sampled_ids
    work = logits if shard is None else torch.empty_like(logits)

    def prepare() -> torch.Tensor:
        # verl's form for sharded logits overwrites them.
        return logits if shard is None else work.copy_(logits)

    def clipping(entropy: vanilla.Entropy) -> Callable[[Any], Any]:
        read = vanilla.old_pass if shard is None else vanilla.sharded_old_pass

        def call(given: torch.Tensor) -> Any:
            with vanilla.engine_context(case):
                return read(given, batch.labels, entropy)

        return call

    def support(entropy: bool) -> Callable[[Any], Any]:
        def call(given: torch.Tensor) -> Any:
            with vanilla.engine_context(case):
                return select(
                    VocabLogits.of(given, rows, shard), sampled, Selection(case.k, DROPPED_MASS), entropy=entropy
                )

        return call

    def dense(given: torch.Tensor) -> Any:
        with vanilla.engine_context(case), torch.no_grad():
            own = given if case.response_share == 1 else given[rows]
            return published.sparse_support(own, sampled, case.k, DROPPED_MASS)

    methods: list[tuple[str, str, Callable[[Any], Any]]] = [
        (PLAIN, PLAIN, clipping("none")),
        ("TROLL", PLAIN, support(False)),
        (WITH_ENTROPY, WITH_ENTROPY, clipping("default")),
        (CHUNKED, WITH_ENTROPY, clipping("chunked")),
        ("TROLL, entropy", WITH_ENTROPY, support(True)),
    ]
    if shard is None:
        methods.append(("published", PLAIN, dense))
    contenders = [Contender(name, {"read": call}, prepare) for name, _, call in methods]
    bandwidth = bandwidth_contenders(work)
    times = take_turns([*contenders, *bandwidth], repeat, case.device)
    read = phase_seconds(times, "read once", ["read"])
    share = rows.shape[0] / case.tokens
    size = logits.numel() * logits.element_size()
    floor = Floor(
        Spread.of(read).median * share, round(size * share), "the response tokens' logits, read once, on each rank"
    )
    facts = {
        **support_facts(select(VocabLogits.of(prepare(), rows, shard), sampled, Selection(case.k, DROPPED_MASS))),
        "read_gb_per_s": round(size / Spread.of(read).median / 1e9, 1),
    }
    result = []
    for (name, base, _), contender in zip(methods, contenders, strict=True):
        own = phase_seconds(times, name, ["read"])
        result.append(
            Row(
                NAME,
                name,
                parameters(case, *AXES, "device"),
                seconds=Spread.of(own),
                ratio=ratio(own, phase_seconds(times, base, ["read"])),
                baseline=base,
                extra_bytes=peak_bytes(contender, case.device),
                floor=floor,
                facts=facts,
            )
        )
    return result
