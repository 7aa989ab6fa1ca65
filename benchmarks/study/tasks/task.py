"""The definition of a study task."""

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
        problems: ``(rng)``: endless problems.
        solution: ``(problem, error_rate, rng)``: a solution by a teacher with this error rate, right at 0.
        check: ``(response, answer)``: whether a stripped response is right.
        error_rate: error rate of the teacher that the warm start imitates.
        prompt_length: maximum tokens of a prompt.
        response_length: maximum tokens of a response, including the end of the turn.
        words: strings that are one token each, besides the bytes.
        warm_start_steps: number of warm-start batches.
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
