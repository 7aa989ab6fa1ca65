"""Numbers of the plan are methods; ``--explain`` shows the source that ran."""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from types import FrameType, FunctionType
from typing import Any, Literal, cast

# Tests in tests/tools/test_plan.py; "" if none measures a number.
TestName = Literal[
    "",
    "test_memory_of_the_update",
    "test_small_tensors",
    "test_kernels_in_the_interpreter",
    "test_vanillas_own_memory",
    "test_vanillas_own_memory_on_megatron",
    "test_vanillas_own_collectives",
    "test_memory_of_fused_heads",
    "test_carried_bytes",
    "test_collectives_on_two_ranks",
]


class Number(cached_property[float]):
    """A method without arguments, computed once.

    Its body is one ``return``, or one per case under an ``if``. Its docstring's first paragraph is the reason.

    Attributes:
        unit: of the value; empty for a count.
        measured: the test that measures it, or a function from the plan to that test.
    """

    def __init__(
        self, function: Callable[[Any], float], unit: str, measured: TestName | Callable[[Any], TestName]
    ) -> None:
        super().__init__(function)
        self.unit = unit
        self.measured = measured


def number(
    unit: str = "", measured: TestName | Callable[[Any], TestName] = ""
) -> Callable[[Callable[[Any], float]], Number]:
    """Make a method a :class:`Number`."""
    return lambda function: Number(function, unit, measured)


@dataclass(frozen=True)
class Explanation:
    """One number explained: its value and expression in this plan, its reason, and its test, if any."""

    value: float
    expression: str
    unit: str
    reason: str
    measured: TestName


def sections(plan: type) -> dict[str, list[str]]:
    """Names of the numbers in each base class of ``plan``, keyed by the first line of the class's docstring."""
    found = {
        _first_paragraph(part).rstrip("."): [name for name, value in vars(part).items() if isinstance(value, Number)]
        for part in reversed(plan.__mro__)
    }
    return {title: names for title, names in found.items() if names}


def explain(plan: object, name: str) -> Explanation:
    """Compute the number ``name`` of ``plan`` and find the ``return`` it came from."""
    found: Number = getattr(type(plan), name)
    function = cast(FunctionType, found.func)
    value, line = _run(function, plan)
    lines, start = inspect.getsourcelines(function)
    source = textwrap.dedent("".join(lines))
    returned = next(
        node.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Return) and node.lineno <= line - start + 1 <= (node.end_lineno or 0)
    )
    expression = ast.get_source_segment(source, cast(ast.expr, returned)) or ""
    measured = found.measured if isinstance(found.measured, str) else found.measured(plan)
    # Joined into one line, without the commas and spaces of the multi-line layout.
    expression = re.sub(r",? (?=\))|(?<=\() ", "", " ".join(expression.replace("self.", "").split()))
    return Explanation(value, expression, found.unit, _first_paragraph(function), measured)


def _run(function: FunctionType, plan: object) -> tuple[float, int]:
    """The result of ``function``, and the line of the ``return`` that ran."""
    line = 0

    def watch(frame: FrameType, event: str, _: object) -> None:
        nonlocal line
        if event == "return" and frame.f_code is function.__code__:
            line = frame.f_lineno

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        value: float = function(plan)
    finally:
        sys.setprofile(before)
    return value, line


def _first_paragraph(documented: object) -> str:
    return " ".join((inspect.getdoc(documented) or "").split("\n\n")[0].split())
