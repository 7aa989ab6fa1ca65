"""Test cases in Eurus-2-RL's format, and the comparison of outputs."""

from __future__ import annotations

import json
import math
import re
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
        if not accepted:
            raise
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


_WHOLE = re.compile(r"[+-]?[0-9]+")
_INTEGER = re.compile(r"0|-?[1-9][0-9]*")
# Matched in linear time. Decimal takes any exponent of six digits.
_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,6})?")


def same_text(got: str, expected: str) -> bool:
    """Whether two outputs have the same words.

    A word that is expected to be an integer may be written with a fraction or an exponent, if that is its exact value.
    One expected to be a number with a fraction or an exponent may differ as in :func:`_close`. All others, numbers with
    leading zeros or a plus sign among them, are text.
    """
    got_words, expected_words = got.split(), expected.split()
    return len(got_words) == len(expected_words) and all(map(_same_word, got_words, expected_words))


def _same_word(got: str, expected: str) -> bool:
    if got == expected:
        return True
    if not (_NUMBER.fullmatch(got) and _NUMBER.fullmatch(expected)):
        return False
    if not _WHOLE.fullmatch(expected):
        return _close(Decimal(got), Decimal(expected))
    if _WHOLE.fullmatch(got) or not _INTEGER.fullmatch(expected):
        return False
    return Decimal(got) == Decimal(expected)


def _close(got: float | Decimal, expected: float | Decimal) -> bool:
    """Whether ``got`` is within 1e-6 of ``expected``, relatively, and within 0.1 where floats have fractions.

    The second bound keeps integers and halves apart, however large. Near 0, the tolerance is 1e-9.
    """
    if got == expected:
        return True
    value = float(expected)
    tolerance = max(1e-6 * abs(value), 1e-9)
    if abs(value) < 2**53:
        tolerance = min(tolerance, 0.1)
    return math.isfinite(value) and abs(float(got) - value) <= tolerance


def same_value(got: Any, expected: Any) -> bool:
    """Whether two values of :func:`exact_json` are equal.

    Numbers may be integers or floats. Where a float is expected, they may differ as in :func:`_close`.
    """
    if isinstance(got, list) and isinstance(expected, list):
        return len(got) == len(expected) and all(map(same_value, got, expected))
    if isinstance(got, dict) and isinstance(expected, dict):
        return got.keys() == expected.keys() and all(same_value(got[key], expected[key]) for key in got)
    if isinstance(got, (Decimal, float)) and isinstance(expected, float):
        return _close(got, expected)
    if isinstance(got, (Decimal, float)) and isinstance(expected, Decimal):
        return got == expected
    return type(got) is type(expected) and bool(got == expected)
