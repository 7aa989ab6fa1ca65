"""Numbers and names that the torch and Triton forms share."""

from __future__ import annotations

import math
from typing import NamedTuple

# --- Support ---

LOG_MISSING = math.log(1e-12)
"""Log-probability, under ``union``, of an id that a policy did not keep."""
REST_FLOOR = 1e-6
"""Minimum mass of the ``rest`` outcome: what a float32 sum of probabilities can resolve."""


def mass_to_keep(dropped_mass: float) -> float:
    """The mass below which selection continues: an id is kept if the more probable ones have less than this."""
    # With dropped_mass = 0, only ids of probability zero may be dropped, however float32 rounds the sum.
    return 1 - dropped_mass if dropped_mass > 0 else math.inf


# --- Solver of the projection ---

TOLERANCE = 1e-3
"""Relative slack below the bound at which a step size is accepted."""
MAX_EVALUATIONS = 20
PATIENCE = 5
"""From this evaluation on, a step that does not halve the residual is replaced by a bisection."""
CURVATURE_RANGE = (0.3, 4.0)
"""Limits of the factor by which curvature divides a Newton step: far from the root it says little."""
LOG_PROB_LIMIT = 1e12
"""Finite log-probabilities below minus this count as minus this; further out, float64 cannot resolve a step size."""
LOG_RATIO_OF_ZERO = -1e5
"""Replaces log(0 / q_i), the log-ratio of an outcome to which the new policy gives no mass."""
VARIANCE_FLOOR = 1e-60
ROUNDING = 1e-15
"""Relative rounding of KL(pi || q) per nat of the largest log-ratio: t s cancels log q to this precision."""
CONVERGED, CAP_REACHED, NOT_A_DISTRIBUTION = range(3)
"""Codes of :attr:`verl_troll.core.projection.Projection.failure`."""


class Window(NamedTuple):
    """Range of log KL(pi || q) in which a step size is accepted, and the value aimed at."""

    lower: float
    target: float
    upper: float


def window(kl_bound: float, tolerance: float) -> Window:
    """The solver's window below ``kl_bound`` (nats)."""
    # It ends just below the bound, so that rounding the result to float32 cannot cross the bound.
    upper = math.log(kl_bound) + math.log1p(-0.1 * tolerance)
    lower = math.log(kl_bound) + math.log1p(-tolerance)
    return Window(lower, 0.5 * (lower + upper), upper)


# --- Statistics of a token ---

STATISTICS = (
    "kl_before",
    "kl_after",
    "projected_share",
    "fixed_share",
    "step_size",
    "regression_kl",
    "support_size",
    "old_kept_mass",
    "new_kept_mass",
    "cap_hit_share",
    "solver_evaluations",
    "unconverged",
)
"""What is recorded of each token for the metrics, in the order of the rows; docs/settings.md says what each means."""
