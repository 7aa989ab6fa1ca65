"""Checks of the numbers and settings in a log."""

from __future__ import annotations

import json
import math
from typing import Any

from verl_troll.tools.report.errors import ReportError, short

MAX_STEP = 10**12
LARGEST, SMALLEST = 3.4028234663852886e38, 1.401298464324817e-45
"""float32's range, in which verl computes its metrics: a value beyond counts as infinite, one below as 0."""


def as_float(value: Any) -> float | None:
    """A number in float32's range (:data:`LARGEST`); None if it is none."""
    try:
        number = float(value)
    except OverflowError:
        number = math.inf if value > 0 else -math.inf
    except (TypeError, ValueError):
        return None
    if abs(number) > LARGEST:
        return math.copysign(math.inf, number)
    return 0.0 if abs(number) < SMALLEST else number


def is_whole(value: Any) -> bool:
    """Whether it is a whole number, in 64 bits and a sign."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**64


def is_step(value: Any) -> bool:
    """Whether it is a step's number, from 0 to :data:`MAX_STEP`."""
    return is_whole(value) and 0 <= value <= MAX_STEP


def is_rate(value: float | None) -> bool:
    """Whether it is finite and at least 0."""
    return value is not None and 0 <= value <= LARGEST


def as_rate(value: Any, name: str) -> float | None:
    """A learning rate; None for None.

    Raises:
        ReportError: it is none; the message begins with ``name``.
    """
    rate = as_float(value)
    if value is not None and not is_rate(rate):
        raise ReportError(f"{name} must be a learning rate of at least 0, got {short(value)}")
    return rate


def as_setting(value: Any, where: str) -> Any:
    """A setting as a scalar: what is none becomes text.

    Raises:
        ReportError: it cannot be written as text.
    """
    if value is None or isinstance(value, (str, float, bool)) or is_whole(value):
        return value
    try:
        return json.dumps(value, default=str)
    except (TypeError, ValueError, RecursionError):
        raise ReportError(f"{where}: a setting is too long or nested too deeply") from None
