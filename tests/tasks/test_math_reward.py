"""The reward for mathematics."""

from __future__ import annotations

import concurrent.futures
import os
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.tasks.hostile import ANSWERS
from verl_troll.tasks.rewards import math
from verl_troll.tasks.rewards.answers import final_answer
from verl_troll.tasks.rewards.worker import Program, Worker, WorkerPool

SECONDS = 2.0


def score(response: str, truth: Any = "7") -> dict[str, float]:
    return math.compute_score("x", response, truth, {}, seconds=SECONDS, workers=1)


def question(answer: str, gold: str = "\\boxed{7}") -> dict[str, str]:
    return {"gold": gold, "answer": answer}


@pytest.mark.parametrize(
    ("response", "truth"),
    [
        ("2 + 5 = 7.\n#### 7", "7"),
        ("#### 1,234 apples", "She has 1,200.\n#### 1234"),
        ("#### $18.00", "18"),
        ("#### -3", "-3"),
        ("First \\boxed{8}, no: \\boxed{7}.", "7"),
        ("Answer: $\\frac{14}{2}$.", "7"),
        ("Answer:\n7", "7"),
        ("Answer: \\boxed{34}", 34),
        ("**Answer: 34**\n", "34"),
        ("\\boxed{\\frac{2}{4}}", "\\frac12"),
        ("\\boxed{0.5}", "\\frac{1}{2}"),
        ("\\boxed{x^2 + 2x + 1}", "(x+1)^2"),
        ("\\boxed{(1, 2)}", "(1,2)"),
        ("\\boxed{\\text{East}}", "\\text{east}"),
        ("\\boxed{025}", "25"),
        ("\\boxed{x = 5}", "5"),
        ("\\boxed{\\{1, 2\\}}", "\\{2, 1\\}"),
        ("\\boxed{" + "9" * 10000 + "}", "9" * 10000),
    ],
)
def test_right_answer_scores_one(response: str, truth: Any) -> None:
    assert score(response, truth) == {"score": 1, "acc": 1, "answered": 1, "stopped": 0}


@pytest.mark.parametrize(
    ("response", "truth"),
    [
        ("\\boxed{8}", "7"),
        ("#### 7 or 8", "8"),
        ("\\boxed{7} \\boxed{8}", "7"),
        ("The answer is 7.", "7"),
        ("\\boxed{7", "7"),
        ("Answer:\n8", "7"),
        ("", "7"),
    ],
)
def test_wrong_or_unmarked_answer_scores_zero(response: str, truth: str) -> None:
    assert score(response, truth)["score"] == 0


@pytest.mark.parametrize("name", ANSWERS)
def test_hostile_answer_scores_zero_within_the_limit(name: str) -> None:
    # First replaces a worker that a limit ended.
    score("\\boxed{2^3-1}")
    begin = time.monotonic()
    result = score(ANSWERS[name])
    assert time.monotonic() - begin < SECONDS + 20
    assert result["score"] == 0
    if name in ("power tower", "factorial"):
        assert result["stopped"] == 1
    assert score("\\boxed{2^3-1}")["score"] == 1


def test_worker_that_was_stopped_is_gone() -> None:
    before = {child.pid for child in psutil.Process().children()}
    pool = WorkerPool(math.PROGRAM, 1, 2 << 30, 1.0)
    assert pool.ask(question("\\boxed{2^3-1}")) == {"equal": True}
    (worker,) = {child.pid for child in psutil.Process().children()} - before
    assert pool.ask(question(ANSWERS["power tower"])) is None
    assert not psutil.pid_exists(worker)
    assert pool.ask(question("\\boxed{2^3-1}")) == {"equal": True}
    worker_left = pool._idle.get()
    assert worker_left is not None
    worker_left.close()


def test_worker_ends_itself_when_nobody_kills_it() -> None:
    worker = Worker(math.PROGRAM, 2 << 30, 1.0)
    try:
        # No wall-clock limit for half a minute; the processor-time limit is 3 s.
        begin = time.monotonic()
        assert worker.ask(question(ANSWERS["power tower"]), 60.0) is None
        assert time.monotonic() - begin < 30
    finally:
        worker.close()


def test_threads_share_the_workers() -> None:
    before = len(psutil.Process().children())
    pool = WorkerPool(math.PROGRAM, 2, 2 << 30, 30.0)
    questions = [question(f"\\boxed{{{n % 10 * 2}/2}}", f"\\boxed{{{n}}}") for n in range(20)]
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(pool.ask, questions))
    assert answers == [{"equal": n == n % 10} for n in range(20)]
    assert len(psutil.Process().children()) - before == 2
    for _ in range(2):
        worker = pool._idle.get()
        assert worker is not None
        worker.close()


def test_worker_that_does_not_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match=r"the process for math-verify did not start \(status 1\)"):
        Worker(math.PROGRAM, 2 << 30, 1.0)


@pytest.mark.parametrize("name", ["sympy", "latex2sympy2_extended", "antlr4", "math_verify"])
def test_missing_dependency_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError(\"No module named '{name}'\")")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    pool = WorkerPool(math.PROGRAM, 1, 2 << 30, 60.0)
    missing = rf"math-verify cannot be used: ModuleNotFoundError: No module named '{name}'.*'verl_troll\[tasks\]'"
    with pytest.raises(ImportError, match=missing):
        pool.ask(question("\\boxed{7}"))


@pytest.mark.parametrize(
    "wrong", ["def latex2sympy(*given, **named): import nothing_of_this_name", "def latex2sympy(): 0"]
)
def test_math_verify_that_cannot_parse_is_an_error(wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # math-verify itself takes any error for an unreadable answer.
    source = f"import latex2sympy2_extended.latex2sympy2 as module\n{wrong}\nmodule.latex2sympy = latex2sympy\n"
    (tmp_path / "broken.py").write_text(f"{source}exec(open({str(math.PROGRAM.file)!r}).read())")
    with pytest.raises(ImportError, match="one of its dependencies is missing"):
        Worker(Program(tmp_path / "broken.py", "math-verify", "tasks"), 2 << 30, 60.0)


def test_dependency_that_an_answer_misses_is_named(tmp_path: Path) -> None:
    (tmp_path / "late.py").write_text(
        "def load():\n    def answer(question): import nothing_of_this_name\n    return answer"
    )
    pool = WorkerPool(Program(tmp_path / "late.py", "the library", "tasks"), 1, 2 << 30, 60.0)
    for _ in range(2):
        with pytest.raises(ImportError, match="No module named 'nothing_of_this_name'"):
            pool.ask({})


@pytest.mark.parametrize("truth", ["", " ", "####"])
def test_empty_ground_truth_is_an_error(truth: str) -> None:
    with pytest.raises(ValueError, match="holds no answer"):
        score("\\boxed{7}", truth)


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("\\boxed{a{b}c}", "a{b}c"),
        ("\\boxed{\\{a\\}}", "\\{a\\}"),
        ("Answer: 5.\n", "5"),
        ("Answer: 5\nAnswer: 6", "6"),
        ("#### 5\n\\boxed{6}", "6"),
        ("\\boxed{6}\n#### 5", "5"),
        ("#### five", None),
        ("#### .5", ".5"),
        ("#### \\$3", "3"),
    ],
)
def test_final_answer(response: str, answer: str | None) -> None:
    assert final_answer(response) == answer


def test_final_answer_of_a_long_response_takes_no_time() -> None:
    begin = time.process_time()
    for mark in ("\\boxed{", "Answer:", "answer:", "####", "#### ", "Answer:\n", "**Answer**\n", "{", "\\", "#", " "):
        final_answer(mark * (10**6 // len(mark)))
    assert time.process_time() - begin < 20
