"""Only the step size: evaluations and time of TROLL's solver and the published bracketing, on the same rows.

All rows lie outside the region. ``overlapping``: both policies have mass everywhere; ``missing ids``: a tenth of the
outcomes have probability 1e-12 on one side, as under the union rule.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks import published
from benchmarks.measure import Contender, Spread, bandwidth_contenders, peak_bytes, take_turns
from benchmarks.rows import Case, Floor, Row, parameters, phase_seconds, ratio
from benchmarks.troll import KL_BOUND
from verl_troll.core.projection import project

NAME = "solver"
AXES = ("tokens",)
WIDTHS = (8, 64, 256)
BRACKETING = "published bracketing"
# Rows per batch: enough to hide fixed costs, few enough that the published form's eight points fit in memory.
_MAX_ROWS = 8192


def needed_bytes(case: Case) -> int:
    """Memory of the published form at the widest support."""
    return min(case.tokens, _MAX_ROWS) * max(WIDTHS) * 4 * 8 * 6


def outside_rows(rows: int, width: int, family: str, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """``new, old [rows, width]`` log-probs with ``KL(new || old)`` above the bound in every row, float32."""
    generator = torch.Generator(device).manual_seed(width)
    kept: list[tuple[Tensor, Tensor]] = []
    found = 0
    while found < rows:
        normal = torch.randn(3, rows, width, generator=generator, device=device)
        old = 2 * normal[0]
        new = old + normal[1]
        if family == "missing ids":
            uniform = torch.rand(rows, width, generator=generator, device=device)
            # The first outcome stays, so no row loses one side entirely.
            uniform[:, 0] = 0.5
            old = torch.where(uniform < 0.05, published.LOG_MISSING + 5, old)
            new = torch.where(uniform > 0.95, published.LOG_MISSING + 5, new)
        log_q, log_p = torch.log_softmax(old, -1), torch.log_softmax(new, -1)
        outside = (log_p.exp() * (log_p - log_q)).sum(-1) > KL_BOUND
        kept.append((log_p[outside], log_q[outside]))
        found += int(outside.sum())
    new, old = (torch.cat(parts)[:rows].contiguous() for parts in zip(*kept, strict=True))
    return new, old


def run(case: Case, repeat: int, shard: None = None) -> list[Row]:
    """Both methods at three widths and two families."""
    rows = min(case.tokens, _MAX_ROWS)
    result = []
    for width in WIDTHS:
        for family in ("overlapping", "missing ids"):
            result += _run(case, repeat, rows, width, family)
    return result


def _run(case: Case, repeat: int, rows: int, width: int, family: str) -> list[Row]:
    new, old = outside_rows(rows, width, family, case.device)
    contenders = [
        Contender(BRACKETING, {"solve": lambda _: published.bracket_eta(old, new - old, KL_BOUND)}),
        Contender("TROLL", {"solve": lambda _: project(new, old, KL_BOUND)}),
    ]
    bandwidth = bandwidth_contenders(new.clone())
    times = take_turns([*contenders, *bandwidth], repeat, case.device)
    read = Spread.of(phase_seconds(times, "read once", ["read"])).median
    floor = Floor(2 * read, 2 * new.numel() * 4, "both policies' log-probs in float32, read once")
    projection = project(new, old, KL_BOUND)
    spent = projection.evaluations.float()
    evaluations = {
        BRACKETING: (published.POINTS * published.ROUNDS,) * 2,
        "TROLL": (round(float(spent.mean()), 2), int(spent.max())),
    }
    base = phase_seconds(times, BRACKETING, ["solve"])
    result = []
    for contender in contenders:
        own = phase_seconds(times, contender.name, ["solve"])
        mean, largest = evaluations[contender.name]
        facts = {
            "evaluations": mean,
            "evaluations_max": largest,
            "seconds_per_million_tokens": Spread.of(own).median / rows * 1e6,
        }
        if contender.name == "TROLL":
            facts["unconverged"] = int((~projection.converged).sum())
        result.append(
            Row(
                NAME,
                contender.name,
                {**parameters(case, "device"), "tokens": rows, "outcomes": width, "family": family},
                "solve",
                Spread.of(own),
                ratio(own, base),
                BRACKETING,
                peak_bytes(contender, case.device),
                floor,
                facts,
            )
        )
    return result
