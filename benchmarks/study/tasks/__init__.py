"""The tasks of the study."""

from __future__ import annotations

from benchmarks.study.tasks import add, chain, programs, residues, words
from benchmarks.study.tasks.pretrained import PRETRAINED, PretrainedTask
from benchmarks.study.tasks.task import Problem, Task

__all__ = ["NAMES", "PRETRAINED", "TASKS", "PretrainedTask", "Problem", "Task"]

TASKS: dict[str, Task] = {task.name: task for task in (chain.TASK, add.TASK, words.TASK, programs.TASK, residues.TASK)}
"""The tasks by name."""

NAMES = (*TASKS, *PRETRAINED)
"""The names of all tasks, for models trained from scratch and for a pretrained one."""
