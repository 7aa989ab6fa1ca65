"""Reward for mathematics: 1 if the final answer is the ground truth, as text, as a number or by math-verify; else 0.

math-verify runs in processes of its own (:mod:`verl_troll.tasks.rewards.worker`).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from verl_troll.tasks.rewards import notation
from verl_troll.tasks.rewards.answers import final_answer
from verl_troll.tasks.rewards.worker import Program, WorkerPool, shared_pool

MAX_ANSWER = 2000
"""Maximum characters of an answer. Longer ones count as wrong, unparsed."""
PROGRAM = Program(Path(__file__).with_name("_math_worker.py"), "math-verify", "tasks")

if importlib.util.find_spec("math_verify") is None:
    raise ImportError("the reward for mathematics needs math-verify: pip install 'verl_troll[tasks]'")


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: dict[str, Any] | None = None,
    *,
    seconds: float = 10.0,
    memory_mb: int = 2048,
    workers: int = 2,
    **unused: Any,
) -> dict[str, float]:
    """Score one response. verl's reward manager calls this in a thread of a reward worker.

    Args:
        data_source: unused; :func:`verl_troll.tasks.rewards.answers.final_answer` handles all tasks.
        solution_str: the response.
        ground_truth: the right answer as LaTeX or plain text, or a solution that ends in ``#### answer``.
        extra_info: unused.
        seconds: time limit for one comparison.
        memory_mb: address space of a worker process, in MiB.
        workers: worker processes per reward worker, about 120 MiB each.

    Returns:
        ``score`` and ``acc``: 1 if the final answer is right, else 0. ``answered``: 1 if the response has a final
        answer. ``stopped``: 1 if a limit ended the comparison.

    Raises:
        ValueError: the ground truth is empty.
        ImportError: math-verify or one of its dependencies is missing.
        RuntimeError: math-verify does not start.
    """
    truth = str(ground_truth).rsplit("####", 1)[-1].strip()
    if not truth:
        raise ValueError(f"ground_truth={ground_truth!r} holds no answer")
    answer = final_answer(solution_str)
    if answer is None:
        return {"score": 0.0, "acc": 0.0, "answered": 0.0, "stopped": 0.0}
    equal: bool | None = False
    if notation.same_text(truth, answer):
        equal = True
    elif len(answer) <= MAX_ANSWER:
        equal = _equal(truth, answer, shared_pool(PROGRAM, workers, memory_mb << 20, seconds))
    return {"score": float(bool(equal)), "acc": float(bool(equal)), "answered": 1.0, "stopped": float(equal is None)}


def _equal(truth: str, answer: str, pool: WorkerPool) -> bool | None:
    """Whether an answer is the true one; None if a limit ended the comparison."""
    *names, right = notation.sides(truth)
    *others, last = notation.sides(answer)
    if len(names) == 1 and others and notation.same_text(names[0], others[0]):
        # math-verify takes N and n for the same.
        truth, answer, others = right, last, others[1:]
    elif not names:
        # x = 9 is 9.
        answer = last
    else:
        others = []
    true, value = notation.read_number(truth), notation.read_number(answer, words=True)
    if true and value and not notation.same_number(true, value):
        return False
    unread = []
    for other in others:
        number = notation.read_number(other)
        if not (number and value):
            unread += [] if notation.is_shortened(other) else [other]
        elif not notation.rounds(number, value):
            # 6 = 9 is not.
            return False
    if true and value and not unread:
        return True
    texts = [
        notation.latex(true) if true else notation.for_math_verify(truth),
        notation.latex(value) if value else notation.for_math_verify(answer),
        *map(notation.for_math_verify, unread),
    ]
    if None in texts:
        return False
    gold, given, *sides = (f"\\boxed{{{text}}}" for text in texts)
    reply = pool.ask({"gold": gold, "answer": given, "sides": sides})
    return None if reply is None else bool(reply["equal"])
