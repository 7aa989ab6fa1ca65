"""Compares answers with math-verify, in a process of :mod:`verl_troll.tasks.rewards.worker`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any


def load() -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Import math-verify; returns a function from ``gold``, ``answer`` and ``sides`` to ``equal``."""
    import sympy
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
    from sympy.core.function import AppliedUndef

    # The whole box, not a formula somewhere in it.
    boxed = LatexExtractionConfig(try_extract_without_anchor=False, boxed_match_priority=0)

    def read(text: str) -> list[Any]:
        found = parse(text, [boxed], parsing_timeout=None)
        if all(isinstance(one, str) for one in found) and len(re.findall(r"[0-9]+(?:[.,][0-9]+)*", text)) == 1:
            # Of several numbers, it would read the last.
            found += parse(text, [ExprExtractionConfig()], parsing_timeout=None)
        return [*found, *(exact for exact in map(without_floats, found) if exact is not None)]

    def without_floats(expression: Any) -> Any:
        """The same with decimals as fractions; None without decimals."""
        if isinstance(expression, str) or not expression.atoms(sympy.Float):
            return None
        return expression.xreplace({one: sympy.Rational(str(one)) for one in expression.atoms(sympy.Float)})

    def is_value(expression: Any) -> bool:
        """Whether it has a value: f(2) has none, and E may be a name."""
        names = (AppliedUndef, type(sympy.E), type(sympy.I))
        return bool(getattr(expression, "is_number", False)) and not expression.atoms(*names)

    def sizes(expression: Any) -> Iterator[Any]:
        """The absolute values of the numbers in an expression that are not 0."""
        if isinstance(expression, str):
            return
        if getattr(expression, "is_number", False):
            size = abs(expression.evalf(5))
            if size.is_finite and size > 0:
                yield size
            return
        for part in expression if isinstance(expression, sympy.MatrixBase) else expression.args:
            yield from sizes(part)

    def equal(gold: list[Any], answer: list[Any]) -> bool:
        # math-verify rounds to 6 decimals and compares to 15: too coarse for small numbers.
        smallest = min((size for one in gold for size in sizes(one)), default=sympy.Integer(1))
        places = min(max(6, 4 - int(sympy.floor(sympy.log(smallest, 10)))), 1000)
        return bool(verify(gold, answer, places, places + 9, timeout_seconds=None))

    def compare(question: dict[str, Any]) -> dict[str, Any]:
        try:
            answer = read(question["answer"])
            for side in map(read, question.get("sides", [])):
                if any(map(is_value, side)) and not equal(answer, side):
                    return {"equal": False}
            return {"equal": equal(read(question["gold"]), answer)}
        except ImportError:
            raise
        except Exception:
            # Answers that cannot be parsed or compared are wrong.
            return {"equal": False}

    # math-verify takes any error for an unreadable answer.
    if not equal(read("\\boxed{\\frac{1}{4}}"), read("\\boxed{\\sqrt{\\frac{1}{16}}}")):
        raise ImportError("math-verify reads no formula: one of its dependencies is missing or too old")
    return compare
