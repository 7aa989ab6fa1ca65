"""Reward for programs: 1 if a program passes every test in :mod:`verl_troll.tasks.rewards.sandbox`, else 0.

Importing this module checks the sandbox, so verl's reward workers fail at start-up on a machine without one.
"""

from __future__ import annotations

import time
from typing import Any

from verl_troll.tasks.rewards import sandbox
from verl_troll.tasks.rewards.cases import Cases, exact_json, read_cases, same_text, same_value
from verl_troll.tasks.rewards.programs import last_program


def _passes(program: str, cases: Cases, index: int, limits: sandbox.Limits, slot_index: int) -> tuple[bool, bool]:
    """Whether a program passes one test, and whether a limit ended it."""
    given, expected = cases.inputs[index], cases.outputs[index]
    if cases.function is None:
        outcome = sandbox.run(program, data=given, limits=limits, slot_index=slot_index)
    else:
        outcome = sandbox.run(program, function=cases.function, arguments=given, limits=limits, slot_index=slot_index)
    if outcome.ended != "finished":
        return False, outcome.ended != "failed"
    text = outcome.output.decode(errors="replace")
    if cases.function is None:
        return same_text(text, expected), False
    try:
        got = exact_json(text)
        return any(same_value(got, value) for value in expected), False
    except (ValueError, RecursionError, OverflowError):
        return False, False


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str | dict[str, Any],
    extra_info: dict[str, Any] | None = None,
    *,
    processor_seconds: int = 6,
    total_seconds: float = 60.0,
    memory_mb: int = 1024,
    output_kb: int = 1024,
    slots: int | None = None,
    **unused: Any,
) -> dict[str, float]:
    """Score one response. verl's reward manager calls this in a thread of a reward worker.

    Args:
        data_source: unused.
        solution_str: the response; :func:`verl_troll.tasks.rewards.programs.last_program` finds the program.
        ground_truth: see :func:`verl_troll.tasks.rewards.cases.read_cases`.
        extra_info: unused.
        processor_seconds: CPU time limit per test; the wall-clock limit is twice as long.
        total_seconds: wall-clock limit for all tests of a response.
        memory_mb: address space of a run, in MiB.
        output_kb: output limit of a run, in KiB; at least twice the expected output.
        slots: concurrent runs on this machine, over all workers of a user; default: one per core.

    Returns:
        ``score`` and ``acc``: 1 if every test passes, else 0. ``answered``: 1 if the response has a program.
        ``stopped``: 1 if a limit ended it.

    Raises:
        ValueError: the ground truth cannot be read.
        SandboxError: the sandbox could not be set up.
    """
    cases = read_cases(ground_truth)
    program = last_program(solution_str, cases.function)
    if program is None:
        return {"score": 0.0, "acc": 0.0, "answered": 0.0, "stopped": 0.0}
    right, stopped = False, False
    with sandbox.slot(slots or sandbox.default_slots()) as slot_index:
        deadline = time.monotonic() + total_seconds
        for index, expected in enumerate(cases.outputs):
            left = deadline - time.monotonic()
            if left <= 0:
                right, stopped = False, True
                break
            limits = sandbox.Limits(
                processor_seconds=processor_seconds,
                wall_seconds=min(2.0 * processor_seconds, left),
                memory=memory_mb << 20,
                output=max(output_kb << 10, 2 * len(str(expected))),
            )
            right, stopped = _passes(program, cases, index, limits, slot_index)
            if not right:
                break
    return {"score": float(right), "acc": float(right), "answered": 1.0, "stopped": float(stopped)}


sandbox.require()
