"""The available data sets, where their files are, and how their rows are converted to verl's.

A verl row has ``data_source``, ``prompt`` (a list of messages), ``ability``, ``reward_model`` (``style``,
``ground_truth``) and ``extra_info`` (``split``, ``index`` and metadata of the source).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from verl_troll.tasks.rewards.cases import read_cases

Row = dict[str, Any]

GSM8K_INSTRUCTION = 'Let\'s think step by step and output the final answer after "####".'
BOXED_INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."


class UnusableRowError(ValueError):
    """A source row that no reward can score, for what is in ``column``; it is left out and counted."""

    def __init__(self, reason: str, column: str):
        super().__init__(reason)
        self.column = column


class WrongRowError(ValueError):
    """A source row is not in the data set's format; ``column`` says where."""

    def __init__(self, column: str, allowed: str, value: object):
        shown = repr(value)
        shown = shown if len(shown) <= 200 else f"{shown[:200]}..."
        super().__init__(
            f"must be {allowed}, got {type(value).__name__} {shown}" if value is not None else f"must be {allowed}"
        )
        self.column = column


@dataclass(frozen=True)
class Source:
    """Where one split comes from.

    Attributes:
        hub: name on the hub.
        config: the data set's configuration on the hub.
        split: split on the hub.
        names: glob patterns for files in a local folder and its subfolders, in order of preference.
        avoid: folders with other variants, which are skipped.
    """

    hub: str
    split: str
    names: tuple[str, ...]
    config: str | None = None
    avoid: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """A data set.

    Attributes:
        about: one line for the help text.
        sources: by the split to write.
        columns: columns that the source must have; one of each tuple.
        convert: converts a source row, without ``extra_info.split`` and ``extra_info.index``; None leaves it out.
        unique: write repeated prompts once.
    """

    about: str
    sources: dict[str, Source]
    columns: tuple[tuple[str, ...], ...]
    convert: Callable[[Row], Row | None]
    unique: bool = False


def _row(data_source: str, prompt: list[Row], ability: str, truth: str, about: Row, column: str) -> Row:
    """verl's row; ``column`` is where the truth was found."""
    # The reward reads a truth as it reads a response.
    if not truth.rpartition("####")[2].strip():
        raise UnusableRowError("the answer is empty", column)
    return {
        "data_source": data_source,
        "prompt": prompt,
        "ability": ability,
        "reward_model": {"style": "rule", "ground_truth": truth},
        "extra_info": about,
    }


def _user(text: str) -> list[Row]:
    return [{"role": "user", "content": text}]


def _text(value: object, column: str) -> str:
    """Text that is not blank.

    Raises:
        WrongRowError: it is none.
    """
    if not isinstance(value, str) or not value.strip():
        raise WrongRowError(column, "text that is not blank", value)
    return value


def _mapping(value: object, column: str) -> Row:
    if not isinstance(value, dict):
        raise WrongRowError(column, "a mapping", value)
    return value


def _answer(value: object, column: str) -> str:
    """A short answer as text, empty for None; a number that is whole has no fraction.

    Raises:
        WrongRowError: it is neither text nor a finite number.
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float, Decimal)) and not isinstance(value, bool) and math.isfinite(value):
        return str(int(value) if value == int(value) else value)
    raise WrongRowError(column, "text or a finite number", value)


def _content(value: object, column: str) -> str:
    """The text of a message, which may be given in parts.

    Raises:
        WrongRowError: it is not text, or a part is something else, such as an image.
    """
    if isinstance(value, list) and value:
        if all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in value) and all(
            part.get("type", "text") == "text" for part in value
        ):
            return "".join(part["text"] for part in value)
        raise WrongRowError(column, "text, or a list of parts {'type': 'text', 'text': ...}", value)
    if not isinstance(value, str):
        raise WrongRowError(column, "text, or a list of its parts", value)
    return value


def _messages(value: object) -> list[Row]:
    """The prompt of a row in verl's format.

    Raises:
        WrongRowError: it is not a list of messages, of which the last is not blank.
    """
    if not isinstance(value, list) or not value:
        raise WrongRowError("prompt", "a list of one or more messages {'role': ..., 'content': ...}", value)
    messages = []
    for number, message in enumerate(value):
        column = f"prompt[{number}]"
        fields = _mapping(message, column)
        content = _content(fields.get("content"), f"{column}.content")
        messages.append({"role": _text(fields.get("role"), f"{column}.role"), "content": content})
    _text(messages[-1]["content"], f"prompt[{len(value) - 1}].content")
    return messages


def gsm8k(row: Row) -> Row:
    """The source's ``answer`` is a solution whose last line is ``#### 1,234``."""
    solution, question = _text(row["answer"], "answer"), _text(row["question"], "question")
    _, mark, answer = solution.rpartition("####")
    if not mark:
        raise UnusableRowError("the answer has no ####", "answer")
    prompt = _user(f"{question} {GSM8K_INSTRUCTION}")
    return _row("openai/gsm8k", prompt, "math", answer.strip().replace(",", ""), {"answer": solution}, "answer")


def ready_made(ability: str) -> Callable[[Row], Row | None]:
    """For sources that already have verl's columns; rows of other abilities are left out."""

    def convert(row: Row) -> Row | None:
        if _text(row["ability"], "ability").lower() != ability:
            return None
        column = "reward_model.ground_truth"
        given: Any = _mapping(row["reward_model"], "reward_model").get("ground_truth")
        if ability == "code":
            try:
                read_cases(given)
            except ValueError as error:
                raise UnusableRowError("its test cases cannot be read", column) from error
            truth = given if isinstance(given, str) else json.dumps(given)
        else:
            truth = _answer(given, column)
        about = {"source_index": str(_mapping(row.get("extra_info") or {}, "extra_info").get("index", ""))}
        source = _text(row["data_source"], "data_source")
        return _row(source, _messages(row["prompt"]), ability, truth, about, column)

    return convert


def problem_and_answer(data_source: str) -> Callable[[Row], Row]:
    """For suites of problems with short answers."""

    def convert(row: Row) -> Row:
        asked = "problem" if row.get("problem") or "question" not in row else "question"
        column = "answer" if "answer" in row else "final_answer"
        problem, answer = _text(row[asked], asked), row[column]
        if isinstance(answer, list):
            if len(answer) != 1:
                raise UnusableRowError(f"{len(answer)} answers", column)
            answer = answer[0]
        truth = _answer(answer, column).strip().strip("$").strip()
        about = {"source_index": str(row.get("unique_id", row.get("id", "")))}
        return _row(data_source, _user(f"{problem}\n\n{BOXED_INSTRUCTION}"), "math", truth, about, column)

    return convert


def _suite(about: str, hub: str, name: str, split: str = "test") -> Task:
    names = (f"*{name}*.parquet", f"*{name}*.jsonl", f"{split}*.parquet", f"{split}*.jsonl")
    source = Source(hub, split, names)
    columns = (("problem", "question"), ("answer", "final_answer"))
    return Task(about, {"test": source}, columns, problem_and_answer(name))


_VERL_COLUMNS = (("data_source",), ("prompt",), ("ability",), ("reward_model",))
_EURUS = {
    "train": Source("PRIME-RL/Eurus-2-RL-Data", "train", ("train*.parquet", "train*.jsonl")),
    "test": Source("PRIME-RL/Eurus-2-RL-Data", "validation", ("validation*.parquet", "validation*.jsonl")),
}

TASKS = {
    "gsm8k": Task(
        "GSM8K, grade-school mathematics",
        {
            split: Source("openai/gsm8k", split, (f"{split}*.parquet", f"{split}*.jsonl"), "main", ("socratic",))
            for split in ("train", "test")
        },
        (("question",), ("answer",)),
        gsm8k,
    ),
    "dapo_math": Task(
        "DAPO-Math-17k, and AIME 2024 as its test split",
        {
            "train": Source("BytedTsinghua-SIA/DAPO-Math-17k", "train", ("dapo-math-17k*.parquet", "train*.parquet")),
            "test": Source("BytedTsinghua-SIA/AIME-2024", "train", ("aime-2024*.parquet", "test*.parquet")),
        },
        _VERL_COLUMNS,
        ready_made("math"),
        unique=True,
    ),
    "eurus_math": Task("Eurus-2-RL, mathematics", _EURUS, _VERL_COLUMNS, ready_made("math")),
    "eurus_code": Task("Eurus-2-RL, code", _EURUS, _VERL_COLUMNS, ready_made("code")),
    "aime24": _suite("AIME 2024", "HuggingFaceH4/aime_2024", "aime24", "train"),
    "aime25": _suite("AIME 2025", "math-ai/aime25", "aime25"),
    "amc23": _suite("AMC 2023", "math-ai/amc23", "amc23"),
    "math500": _suite("MATH-500", "HuggingFaceH4/MATH-500", "math500"),
    "minerva": _suite("Minerva mathematics", "math-ai/minervamath", "minerva"),
    "olympiadbench": _suite("OlympiadBench, English mathematics in text", "math-ai/olympiadbench", "olympiadbench"),
}
