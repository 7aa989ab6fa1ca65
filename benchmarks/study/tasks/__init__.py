"""The tasks of the study."""

from __future__ import annotations

from benchmarks.study.tasks import add, chain, programs, residues, words
from benchmarks.study.tasks.task import Problem, Task

__all__ = ["TASKS", "Problem", "Task"]

TASKS: dict[str, Task] = {task.name: task for task in (chain.TASK, add.TASK, words.TASK, programs.TASK, residues.TASK)}
"""The tasks by name."""
