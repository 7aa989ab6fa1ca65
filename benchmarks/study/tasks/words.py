"""Stories of three events, answered with the steps of the calculation.

``tom has 12 apples . ann has 5 pens . tom finds 3 apples . tom doubles them . tom gives 4 to eve . how many apples
has tom ?`` has the solution ``+ 3 = 15 * 2 = 30 - 4 = 26``. Every word and every number is one token.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks.study.tasks.task import Task

STEPS = 3
"""Events of a story that change the number asked for."""

LIMIT = 40
"""Largest number."""

IRRELEVANT = 0.5
"""Share of stories in which a third person also has something."""

NAMES = ("ann", "bob", "eve", "ian", "kim", "leo", "sue", "tom")
THINGS = ("apples", "balls", "books", "cards", "coins", "nuts", "pens", "shells")

EVENTS: dict[str, tuple[str, ...]] = {
    "+": ("{name} finds {number} {thing} .", "{name} buys {number} more .", "{other} gives {name} {number} ."),
    "-": ("{name} loses {number} {thing} .", "{name} sells {number} .", "{name} gives {number} to {other} ."),
    "*": ("{name} doubles them .",),
    "/": ("{name} keeps half of them .", "{name} shares them with {other} ."),
}
"""Event templates by operation; ``*`` and ``/`` are by 2."""

_OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": lambda value, number: value + number,
    "-": lambda value, number: value - number,
    "*": lambda value, number: value * number,
    "/": lambda value, number: value // number,
}
_STEPS = [*itertools.product("+-", range(1, 10)), ("*", 2), ("/", 2)]
_NUMBER = "(?:0|[1-9][0-9]?)"
_SOLUTION = re.compile(rf"(?:[-+*/] {_NUMBER} = {_NUMBER} ){{{STEPS}}}")


@dataclass(frozen=True)
class Story:
    """A problem.

    Attributes:
        text: the problem as the model sees it.
        start: the initial number.
        steps: ``(operation, number)`` of each event.
    """

    text: str
    start: int
    steps: tuple[tuple[str, int], ...]

    @property
    def answer(self) -> str:
        """The final number."""
        value = self.start
        for operation, number in self.steps:
            value = _OPERATIONS[operation](value, number)
        return str(value)


def _story(rng: random.Random) -> Story:
    name, other, third = rng.sample(NAMES, 3)
    thing, unasked = rng.sample(THINGS, 2)
    value = start = rng.randint(2, 20)
    steps: list[tuple[str, int]] = []
    told = [f"{name} has {start} {thing} ."]
    while len(steps) < STEPS:
        operation = rng.choice("++--*/")
        number = rng.randint(1, 9) if operation in "+-" else 2
        after = _OPERATIONS[operation](value, number)
        if not 1 <= after <= LIMIT or (operation == "/" and value % number):
            continue
        value = after
        steps.append((operation, number))
        told.append(rng.choice(EVENTS[operation]).format(name=name, other=other, number=number, thing=thing))
    if rng.random() < IRRELEVANT:
        told.insert(rng.randint(1, STEPS), f"{third} has {rng.randint(1, 9)} {unasked} .")
    told.append(f"how many {thing} has {name} ?")
    return Story(" " + " ".join(told), start, tuple(steps))


def problems(rng: random.Random) -> Iterator[Story]:
    """Endless problems, with hardly any repeats."""
    while True:
        yield _story(rng)


def solution(problem: Story, error_rate: float, rng: random.Random) -> str:
    """Steps by a teacher who misreads each event with probability ``error_rate``; later steps build on the errors."""
    value, written = problem.start, ""
    for operation, number in problem.steps:
        if rng.random() < error_rate:
            operation, number = rng.choice([step for step in _STEPS if step != (operation, number)])
        value = min(max(_OPERATIONS[operation](value, number), 0), LIMIT)
        written += f" {operation} {number} = {value}"
    return written


def check(response: str, answer: str) -> bool:
    """Whether the response is three well-formed steps that end with the answer."""
    return bool(_SOLUTION.fullmatch(response + " ")) and response.rpartition(" ")[2] == answer


def _words() -> tuple[str, ...]:
    told = " ".join(template for templates in EVENTS.values() for template in templates)
    verbs = sorted({word for word in told.split() if "{" not in word})
    numbers = map(str, range(LIMIT + 1))
    return tuple(
        f" {word}" for word in (*NAMES, *THINGS, *verbs, "has", "how", "many", "?", "+", "-", "*", "/", "=", *numbers)
    )


TASK = Task(
    name="words",
    problems=problems,
    solution=solution,
    check=check,
    error_rate=0.3,
    prompt_length=40,
    response_length=4 * STEPS + 1,
    words=_words(),
    warm_start_steps=1400,
    warm_start_batch=32,
)
