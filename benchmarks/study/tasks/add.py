"""Addition of three-digit numbers, with the sum written last digit first.

``257+386=`` has the answer ``346``. Each digit needs the carry from the previous ones, which is never written down.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.study.tasks.task import Task


@dataclass(frozen=True)
class Sum:
    """A problem: two numbers from 100 to 999."""

    first: int
    second: int

    @property
    def text(self) -> str:
        """The problem as the model sees it."""
        return f"{self.first}+{self.second}="

    @property
    def answer(self) -> str:
        """The digits of the sum, last one first."""
        return str(self.first + self.second)[::-1]


def problems(rng: random.Random) -> Iterator[Sum]:
    """Endless problems, 810000 of them distinct."""
    while True:
        yield Sum(rng.randint(100, 999), rng.randint(100, 999))


def solution(problem: Sum, error_rate: float, rng: random.Random) -> str:
    """A sum by a teacher who forgets each carry with probability ``error_rate``."""
    digits, carry = "", 0
    for power in (1, 10, 100):
        total = problem.first // power % 10 + problem.second // power % 10 + carry
        digits += str(total % 10)
        carry = int(total >= 10 and rng.random() >= error_rate)
    return digits + "1" * carry


def check(response: str, answer: str) -> bool:
    """Whether the sum is right."""
    return response == answer


TASK = Task(
    name="add",
    problems=problems,
    solution=solution,
    check=check,
    error_rate=0.6,
    prompt_length=8,
    response_length=5,
    warm_start_steps=3000,
    warm_start_batch=32,
)
