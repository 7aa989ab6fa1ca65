"""The quickstart's task: five operations modulo 10, writing the running value after each."""

from __future__ import annotations

from benchmarks.study.tasks.quickstart import quickstart
from benchmarks.study.tasks.task import Task

_task = quickstart("task")

TASK = Task(
    name="chain",
    problems=_task.problems,
    solution=_task.noisy_solution,
    check=_task.check,
    error_rate=0.2,
    prompt_length=12,
    response_length=_task.SOLUTION_LENGTH + 1,
)
