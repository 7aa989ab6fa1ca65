"""Programs for an unknown function, given four of its values.

``0 1 , 2 5 , 3 7 , 7 15`` shows that 0 gives 1, 2 gives 5 and so on; ``x 2 * 1 +``, ``1 x x + +`` and others are right.
Programs are in postfix notation: ``x`` and the numbers 1 to 6 are pushed on a stack, an operator pops two values and
pushes one. A program is right if it is correct on all ``INPUTS``, shown or not.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks.study.tasks.task import Task

INPUTS = range(16)
"""Inputs on which a program must be right."""

SHOWN_FROM, SHOWN = 8, 4
"""``SHOWN`` of the first ``SHOWN_FROM`` inputs are shown."""

LARGEST_SHOWN = 100
"""Functions whose values on the first ``SHOWN_FROM`` inputs reach this in magnitude are left out."""

LONGEST = 11
"""Maximum tokens of a program."""

LARGEST = 10**6
"""A program fails if a value exceeds this in magnitude."""

OPERATORS: dict[str, Callable[[int, int], int]] = {
    "+": lambda first, second: first + second,
    "-": lambda first, second: first - second,
    "*": lambda first, second: first * second,
    "max": max,
    "min": min,
}
CONSTANTS = {str(number): number for number in range(1, 7)}


@dataclass(frozen=True)
class Function:
    """A problem.

    Attributes:
        program: one right program.
        shown: the shown inputs.
    """

    program: tuple[str, ...]
    shown: tuple[int, ...]

    @property
    def text(self) -> str:
        """The problem as the model sees it."""
        return " ,".join(f" {value} {run(self.program, value)}" for value in self.shown) + " ="

    @property
    def answer(self) -> str:
        """The values on all ``INPUTS``."""
        return " ".join(str(run(self.program, value)) for value in INPUTS)


def run(program: tuple[str, ...], x: int) -> int | None:
    """A program's result; None if the program is invalid or too long, or a value is too large."""
    if len(program) > LONGEST:
        return None
    stack: list[int] = []
    for token in program:
        if token == "x":
            stack.append(x)
        elif token in CONSTANTS:
            stack.append(CONSTANTS[token])
        elif token in OPERATORS and len(stack) >= 2:
            second, first = stack.pop(), stack.pop()
            stack.append(OPERATORS[token](first, second))
        else:
            return None
        if abs(stack[-1]) > LARGEST:
            return None
    return stack[0] if len(stack) == 1 else None


def _program(rng: random.Random) -> tuple[str, ...]:
    program: tuple[str, ...] = ("x",)
    for _ in range(2):
        operator = rng.choice(list(OPERATORS))
        operand = "x" if rng.random() < 0.15 else rng.choice(list(CONSTANTS))
        program = (*program, operand, operator)
    return program


def problems(rng: random.Random) -> Iterator[Function]:
    """Endless problems; the functions take two operations and have at least four distinct values."""
    while True:
        program = _program(rng)
        values = [run(program, value) for value in range(SHOWN_FROM)]
        if len(set(values)) >= SHOWN and all(value is not None and abs(value) < LARGEST_SHOWN for value in values):
            yield Function(program, tuple(sorted(rng.sample(range(SHOWN_FROM), SHOWN))))


def solution(problem: Function, error_rate: float, rng: random.Random) -> str:
    """A right program in which each number and operator is replaced with probability ``error_rate``."""
    written = ""
    for token in problem.program:
        if token != "x" and rng.random() < error_rate:
            kind = OPERATORS if token in OPERATORS else CONSTANTS
            token = rng.choice([other for other in kind if other != token])
        written += f" {token}"
    return written


def check(response: str, answer: str) -> bool:
    """Whether the response is a program that computes the answer."""
    program = tuple(response.split(" "))
    return all(run(program, x) == int(value) for x, value in zip(INPUTS, answer.split(), strict=True))


TASK = Task(
    name="programs",
    problems=problems,
    solution=solution,
    check=check,
    error_rate=0.15,
    prompt_length=3 * SHOWN,
    response_length=LONGEST + 1,
    words=tuple(f" {word}" for word in ("x", *OPERATORS, ",", "=", *map(str, range(1 - LARGEST_SHOWN, LARGEST_SHOWN)))),
    warm_start_steps=1500,
)
