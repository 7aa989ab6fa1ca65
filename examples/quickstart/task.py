"""The task: five operations modulo 10, evaluated in order, writing the running value after each.

A problem reads ``3+4*2-1+5*7=`` and is evaluated left to right. Its solution is the running value after each
operation, ``7 4 3 8 6``; the last digit is the answer. The reward is an exact match on that digit.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

OPERATIONS = 5
"""Operations per problem, and values per solution."""

SOLUTION_LENGTH = 2 * OPERATIONS - 1
"""Characters of a solution."""


@dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes:
        start: first number, 0 to 9.
        steps: ``(operator, operand)`` of each operation; operators are ``+ - *``, operands 1 to 9.
    """

    start: int
    steps: tuple[tuple[str, int], ...]

    @property
    def text(self) -> str:
        """The problem as the model sees it."""
        return str(self.start) + "".join(f"{operator}{operand}" for operator, operand in self.steps) + "="

    @property
    def values(self) -> list[int]:
        """Running value after each operation."""
        found = []
        value = self.start
        for operator, operand in self.steps:
            value = apply(value, operator, operand)
            found.append(value)
        return found

    @property
    def answer(self) -> str:
        """The last running value."""
        return str(self.values[-1])


def apply(value: int, operator: str, operand: int) -> int:
    """One operation modulo 10."""
    results = {"+": value + operand, "-": value - operand, "*": value * operand}
    return results[operator] % 10


def problems(rng: random.Random) -> Iterator[Problem]:
    """Endless problems, about 140 million of them distinct, so repeats are rare but possible."""
    while True:
        steps = tuple((rng.choice("+-*"), rng.randint(1, 9)) for _ in range(OPERATIONS))
        yield Problem(rng.randint(0, 9), steps)


def noisy_solution(problem: Problem, error_rate: float, rng: random.Random) -> str:
    """A careless teacher's solution: each step errs with probability ``error_rate``, and later steps build on it."""
    digits = []
    value = problem.start
    for operator, operand in problem.steps:
        value = apply(value, operator, operand)
        if rng.random() < error_rate:
            value = (value + rng.randint(1, 9)) % 10
        digits.append(str(value))
    return " ".join(digits)


def check(solution: str, answer: str) -> bool:
    """Whether ``solution`` has one digit per operation, separated by single spaces, and ends with ``answer``."""
    values = solution.split(" ")
    return len(values) == OPERATIONS and all(v in "0123456789" and len(v) == 1 for v in values) and values[-1] == answer
