"""Names of the study's own metrics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

DISTINCT = "study/distinct_answers"
GREEDY = "study/greedy_success"

KL = "study/kl"
OUTSIDE = "study/outside"

SUPPORTS = ("union", "anchored")


def of_k(k: int, what: str, support: str = "") -> str:
    """A metric of one support size, and of one support rule where it matters."""
    return "/".join(filter(None, (f"study/k{k}", support, what)))


def probed(ks: Sequence[int]) -> Iterator[str]:
    """The metrics of :func:`benchmarks.study.probe.compare_policies`."""
    yield from (KL, OUTSIDE)
    for k in ks:
        yield from (of_k(k, what) for what in ("kept_mass", "cap_hits"))
        for support in SUPPORTS:
            yield from (of_k(k, what, support) for what in ("projected", "false", "missed"))
