"""The available data sets, where their files are, and how their rows are converted to verl's.

A verl row has ``data_source``, ``prompt`` (a list of messages), ``ability``, ``reward_model`` (``style``,
``ground_truth``) and ``extra_info`` (``split``, ``index`` and metadata of the source).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from verl_troll.tasks.rewards.cases import read_cases

Row = dict[str, Any]

GSM8K_INSTRUCTION = 'Let\'s think step by step and output the final answer after "####".'
BOXED_INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."


class UnusableRowError(ValueError):
    """A source row that no reward can score; it is left out and counted."""


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


def _row(data_source: str, prompt: list[Row], ability: str, truth: str, about: Row) -> Row:
    if not truth:
        raise UnusableRowError("the answer is empty")
    return {
        "data_source": data_source,
        "prompt": prompt,
        "ability": ability,
        "reward_model": {"style": "rule", "ground_truth": truth},
        "extra_info": about,
    }


def _user(text: str) -> list[Row]:
    return [{"role": "user", "content": text}]


def gsm8k(row: Row) -> Row:
    """The source's ``answer`` is a solution whose last line is ``#### 1,234``."""
    _, mark, answer = row["answer"].rpartition("####")
    if not mark:
        raise UnusableRowError("the answer has no ####")
    prompt = _user(f"{row['question']} {GSM8K_INSTRUCTION}")
    return _row("openai/gsm8k", prompt, "math", answer.strip().replace(",", ""), {"answer": row["answer"]})


def ready_made(ability: str) -> Callable[[Row], Row | None]:
    """For sources that already have verl's columns; rows of other abilities are left out."""

    def convert(row: Row) -> Row | None:
        if row["ability"].lower() != ability:
            return None
        truth = row["reward_model"]["ground_truth"]
        if ability == "code":
            try:
                read_cases(truth)
            except ValueError as error:
                raise UnusableRowError("its test cases cannot be read") from error
        prompt = [{"role": message["role"], "content": message["content"]} for message in row["prompt"]]
        about = {"source_index": str((row.get("extra_info") or {}).get("index", ""))}
        return _row(row["data_source"], prompt, ability, truth, about)

    return convert


def problem_and_answer(data_source: str) -> Callable[[Row], Row]:
    """For suites of problems with short answers."""

    def convert(row: Row) -> Row:
        problem = row.get("problem") or row.get("question")
        answer = row.get("answer", row.get("final_answer"))
        if isinstance(answer, list):
            if len(answer) != 1:
                raise UnusableRowError(f"{len(answer)} answers")
            answer = answer[0]
        if isinstance(answer, float) and answer.is_integer():
            answer = int(answer)
        truth = "" if answer is None else str(answer).strip().strip("$")
        about = {"source_index": str(row.get("unique_id", row.get("id", "")))}
        return _row(data_source, _user(f"{problem}\n\n{BOXED_INSTRUCTION}"), "math", truth, about)

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
