"""Three numbers of a residue class: hundreds of right answers, more than a short list of likely ids can hold.

``45 is 3 mod 7`` asks for three distinct numbers below 2048, other than 45, that leave 3 when divided by 7, for
example ``10 703 1977``. Every number is one token.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.study.tasks.task import Task

LIMIT = 2048
"""Numbers are below this."""

DIVISORS = (3, 4, 5, 6, 8, 10, 12)
"""Divisors of 120, since related classes are learned sooner."""

ANSWERS = 3
"""Numbers in a right response."""

_VALUES = {str(number): number for number in range(LIMIT)}


@dataclass(frozen=True)
class Class:
    """A problem: one number of the class, and the divisor."""

    example: int
    divisor: int

    @property
    def text(self) -> str:
        """The problem as the model sees it."""
        return f" {self.example} is {self.example % self.divisor} mod {self.divisor}"

    @property
    def answer(self) -> str:
        """The example and the divisor."""
        return f"{self.example} {self.divisor}"


def problems(rng: random.Random) -> Iterator[Class]:
    """Endless problems, 14336 of them distinct, in 48 classes."""
    while True:
        yield Class(rng.randrange(LIMIT), rng.choice(DIVISORS))


def solution(problem: Class, error_rate: float, rng: random.Random) -> str:
    """Three numbers of the class, each replaced by a random number with probability ``error_rate``."""
    remainder = problem.example % problem.divisor
    members = [number for number in range(remainder, LIMIT, problem.divisor) if number != problem.example]
    chosen = rng.sample(members, ANSWERS)
    return "".join(f" {rng.randrange(LIMIT) if rng.random() < error_rate else number}" for number in chosen)


def check(response: str, answer: str) -> bool:
    """Whether the response is three distinct numbers of the class, without the example."""
    example, divisor = map(int, answer.split())
    numbers = [_VALUES.get(word) for word in response.split(" ")]
    return (
        len(numbers) == ANSWERS
        and len({example, *numbers}) == ANSWERS + 1
        and all(number is not None and (number - example) % divisor == 0 for number in numbers)
    )


TASK = Task(
    name="residues",
    problems=problems,
    solution=solution,
    check=check,
    error_rate=0.35,
    prompt_length=5,
    response_length=ANSWERS + 1,
    words=(" is", " mod", *(f" {number}" for number in range(LIMIT))),
    warm_start_steps=1500,
)
