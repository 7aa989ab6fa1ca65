"""Reward for problems of reasoning-gym: the library's own score, from 0 to 1.

The library runs in processes of its own (:mod:`verl_troll.tasks.rewards.worker`). A row's ``extra_info`` holds all
that the score depends on; :mod:`verl_troll.tasks.reasoning_gym` writes it.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from verl_troll.tasks.rewards.answers import last_number
from verl_troll.tasks.rewards.worker import Program, shared_pool

PROGRAM = Program(Path(__file__).with_name("_reasoning_gym_worker.py"), "reasoning-gym", "reasoning_gym")
ANSWERS = ("tags", "last-number", "response")
"""Where the answer stands: between the last ``<answer>`` tags, the last number, the whole response."""

if importlib.util.find_spec("reasoning_gym") is None:
    raise ImportError("the reward for reasoning-gym needs the library: pip install 'verl_troll[reasoning-gym]'")


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
        data_source: unused.
        solution_str: the response.
        ground_truth: unused; many problems have several right answers.
        extra_info: ``dataset``, ``settings``, ``entry``, ``answer_from`` (one of :data:`ANSWERS`) and ``strict``, as in
            the file.
        seconds: time limit for one score.
        memory_mb: address space of a worker process, in MiB.
        workers: worker processes per reward worker, about 160 MiB each.

    Returns:
        ``score``: the library's, 0 without an answer; if strict, 1 or 0. ``acc``: 1 for full marks, else 0.
        ``answered``: 1 if the response has an answer. ``stopped``: 1 if a limit ended the scoring.

    Raises:
        ValueError: ``extra_info`` is not that of a row of this task.
        ImportError: reasoning-gym or one of its dependencies is missing.
        RuntimeError: reasoning-gym does not start, or cannot make the row's data set.
    """
    row = extra_info or {}
    missing = [key for key in ("dataset", "settings", "entry", "answer_from", "strict") if key not in row]
    if missing or row["answer_from"] not in ANSWERS:
        fault = f"no {', '.join(missing)}" if missing else f"answer_from={row['answer_from']!r}"
        raise ValueError(f"extra_info has {fault}: not a row of python -m verl_troll.tasks reasoning_gym")
    strict, tags = row["strict"], row["answer_from"] == "tags"
    text: str | None = solution_str
    if row["answer_from"] == "last-number":
        text = last_number(solution_str, alone=strict)
    elif row["answer_from"] == "response":
        text = solution_str.strip()
    if not text:
        return {"score": 0.0, "acc": 0.0, "answered": 0.0, "stopped": 0.0}
    question = {"do": "score", "dataset": row["dataset"], "settings": json.loads(row["settings"])}
    question |= {"entry": row["entry"], "response": text, "tags": tags}
    reply = shared_pool(PROGRAM, workers, memory_mb << 20, seconds).ask(question)
    if reply is None:
        return {"score": 0.0, "acc": 0.0, "answered": 1.0, "stopped": 1.0}
    if "refused" in reply:
        raise RuntimeError(f"reasoning-gym cannot make this row's data set again: {reply['refused']}")
    right = float(reply["score"] >= 1)
    return {
        "score": right if strict else reply["score"],
        "acc": right,
        "answered": float(reply["answered"]),
        "stopped": 0.0,
    }
