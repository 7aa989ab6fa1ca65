"""What a task of the study consists of."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol


class Problem(Protocol):
    """One problem."""

    @property
    def text(self) -> str:
        """The problem as the model sees it."""

    @property
    def answer(self) -> str:
        """What ``Task.check`` compares a response with."""


@dataclass(frozen=True)
class Task:
    """A task whose responses are right or wrong by a rule.

    Attributes:
        name: verl's ``data_source``.
        problems: endless problems, by a random generator.
        solution: ``(problem, error_rate, rng)``: a solution by a teacher who is careless at this rate, and right at 0.
        check: ``(response, answer)``: whether a response, without white space at its ends, is right.
        error_rate: of the teacher whom the warm start imitates.
        prompt_length: most tokens of a prompt.
        response_length: most tokens of a response, the end of the turn included.
        words: strings that are one token each, beside the bytes.
        warm_start_steps: batches of the warm start.
        warm_start_batch: solutions per batch.
    """

    name: str
    problems: Callable[[random.Random], Iterator[Any]]
    solution: Callable[[Any, float, random.Random], str]
    check: Callable[[str, str], bool]
    error_rate: float
    prompt_length: int
    response_length: int
    words: tuple[str, ...] = ()
    warm_start_steps: int = 400
    warm_start_batch: int = 64
