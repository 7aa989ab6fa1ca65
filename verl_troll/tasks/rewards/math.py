"""Reward for mathematics: 1 if math-verify finds the final answer equal to the ground truth, else 0.

math-verify runs in processes of its own (:mod:`verl_troll.tasks.rewards.worker`).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from verl_troll.tasks.rewards.answers import final_answer
from verl_troll.tasks.rewards.worker import Program, shared_pool

MAX_ANSWER = 2000
"""Maximum characters of an answer. Longer ones count as wrong, unparsed."""
PROGRAM = Program(Path(__file__).with_name("_math_worker.py"), "math-verify", "math_verify")

if importlib.util.find_spec("math_verify") is None:
    raise ImportError("the reward for mathematics needs math-verify: pip install 'verl_troll[tasks]'")


def _plain(text: str) -> str:
    return "".join(text.replace("$", "").replace("\\,", "").replace("\\!", "").split())


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
        RuntimeError: math-verify does not start.
    """
    truth = str(ground_truth).rsplit("####", 1)[-1].strip()
    if not truth:
        raise ValueError(f"ground_truth={ground_truth!r} holds no answer")
    answer = final_answer(solution_str)
    if answer is None:
        return {"score": 0.0, "acc": 0.0, "answered": 0.0, "stopped": 0.0}
    equal: bool | None = False
    if _plain(answer) == _plain(truth):
        equal = True
    elif len(answer) <= MAX_ANSWER:
        question = {"gold": _boxed(truth), "answer": _boxed(answer)}
        reply = shared_pool(PROGRAM, workers, memory_mb << 20, seconds).ask(question)
        equal = None if reply is None else reply["equal"]
    return {"score": float(bool(equal)), "acc": float(bool(equal)), "answered": 1.0, "stopped": float(equal is None)}


def _boxed(text: str) -> str:
    return f"\\boxed{{{text}}}"
