"""Test cases in Eurus-2-RL's format, and the comparison of outputs."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from decimal import Decimal
from typing import Any


@dataclass(frozen=True)
class Cases:
    """Inputs and expected outputs of a program on standard input and output, or of a function.

    Attributes:
        function: the function's name; None for programs.
        inputs: text for programs, argument lists for functions.
        outputs: text for programs; for functions, tuples of accepted values with integers as
            :class:`decimal.Decimal`.
    """

    function: str | None
    inputs: list[Any]
    outputs: list[Any]


def read_cases(ground_truth: str | dict[str, Any]) -> Cases:
    """Read a ground truth: JSON with the lists ``inputs`` and ``outputs``, and ``fn_name`` for functions.

    Raises:
        ValueError: it is not in this format.
    """
    try:
        truth = json.loads(ground_truth) if isinstance(ground_truth, str) else ground_truth
        function, inputs, outputs = truth.get("fn_name"), truth["inputs"], truth["outputs"]
        if not (isinstance(inputs, list) and isinstance(outputs, list) and len(inputs) == len(outputs) > 0):
            raise ValueError("'inputs' and 'outputs' must be non-empty lists of equal length")
        if function is None:
            return Cases(None, [_lines(value) for value in inputs], [_lines(value) for value in outputs])
        return Cases(function, [_arguments(value) for value in inputs], [_accepted(value) for value in outputs])
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(
            f"ground_truth is not JSON with the lists 'inputs' and 'outputs' ({type(error).__name__}: {error}); "
            f"it begins with {str(ground_truth)[:80]!r}"
        ) from error


def _lines(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _arguments(value: Any) -> list[Any]:
    """Arguments are given as a list, or as text with one JSON value per line."""
    return value if isinstance(value, list) else [json.loads(line) for line in str(value).split("\n")]


def _accepted(value: Any) -> tuple[Any, ...]:
    """A value is given as is, as JSON text, or wrapped in a list."""
    accepted: list[Any] = [value] if isinstance(value, str) else []
    try:
        accepted.append(exact_json(value if isinstance(value, str) else json.dumps(value)))
    except ValueError:
        # Plain text, not JSON.
        return tuple(accepted)
    if isinstance(accepted[-1], list) and len(accepted[-1]) == 1:
        accepted.append(accepted[-1][0])
    return tuple(accepted)


def exact_json(text: str) -> Any:
    """Read JSON, with integers of any length as :class:`decimal.Decimal`.

    Raises:
        ValueError: it is not JSON.
        RecursionError: it is nested too deeply.
    """
    # Python's int() refuses more than 4300 digits, since conversion takes quadratic time.
    return json.loads(text, parse_int=Decimal)


def same_text(got: str, expected: str) -> bool:
    """Whether two outputs have the same words; non-integer numbers may differ by 1e-6, relatively."""
    got_words, expected_words = got.split(), expected.split()
    return len(got_words) == len(expected_words) and all(map(_same_word, got_words, expected_words))


def _same_word(got: str, expected: str) -> bool:
    if got == expected:
        return True
    if expected.lstrip("+-").isdigit() and got.lstrip("+-").isdigit():
        return False
    try:
        return _close(float(got), float(expected))
    except ValueError:
        return False


def _close(got: float | Decimal, expected: float | Decimal) -> bool:
    return math.isfinite(got) and math.isclose(got, expected, rel_tol=1e-6, abs_tol=1e-9)


def same_value(got: Any, expected: Any) -> bool:
    """Whether two values of :func:`exact_json` are equal; non-integer numbers may differ by 1e-6, relatively."""
    if isinstance(got, list) and isinstance(expected, list):
        return len(got) == len(expected) and all(map(same_value, got, expected))
    if isinstance(got, dict) and isinstance(expected, dict):
        return got.keys() == expected.keys() and all(same_value(got[key], expected[key]) for key in got)
    numbers = (Decimal, float)
    if isinstance(got, numbers) and isinstance(expected, numbers) and not type(got) is type(expected) is Decimal:
        return _close(got, expected)
    return type(got) is type(expected) and bool(got == expected)
