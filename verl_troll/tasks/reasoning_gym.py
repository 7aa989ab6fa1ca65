"""Writes problems of reasoning-gym's generators as verl's parquet files.

The library runs in a process of its own, with a fixed order of sets: some generators depend on it.
"""

from __future__ import annotations

import contextlib
import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl_troll.tasks.catalog import Row
from verl_troll.tasks.prepare import TaskError, Written, write
from verl_troll.tasks.rewards.worker import Worker

SPLITS = ("train", "test")
TAGS_INSTRUCTION = "Put your final answer between <answer> and </answer>."
PROBLEM_SECONDS = 600.0
"""How long the library may take for one problem."""
MEMORY = 8 << 30


@dataclass(frozen=True)
class Problems:
    """What to write.

    Attributes:
        dataset: one of the library's data sets.
        settings: of its configuration, as JSON values.
        train_size: rows of the training split.
        test_size: problems of the test split, which are never in the training split.
        seed: problems are drawn from a sequence of its own for each seed.
        allow_repeats: the training split may repeat its own problems.
        answer_from: one of :data:`verl_troll.tasks.rewards.reasoning_gym.ANSWERS`.
        instruction: added to each question as a line of its own; None: one for tags, none otherwise.
        strict: only full marks count, and with ``last-number`` only a response that is nothing but the number.
    """

    dataset: str
    settings: dict[str, Any]
    train_size: int = 2000
    test_size: int = 256
    seed: int = 0
    allow_repeats: bool = False
    answer_from: str = "tags"
    instruction: str | None = None
    strict: bool = False


def parse_settings(given: Sequence[str]) -> dict[str, Any]:
    """Settings from ``KEY=VALUE``: each value is JSON, else YAML's list, mapping, number or boolean, else text.

    Raises:
        TaskError: one is not of that form, or a key is given twice.
    """
    import yaml

    settings: dict[str, Any] = {}
    for text in given:
        key, mark, value = text.partition("=")
        if not mark or not key.isidentifier():
            raise TaskError(f"--set {text}: must be KEY=VALUE, such as min_terms=2")
        if key in settings:
            raise TaskError(f"--set {text}: {key} is given twice")
        try:
            settings[key] = json.loads(value)
        except ValueError:
            settings[key] = value
            with contextlib.suppress(yaml.YAMLError):
                loaded = yaml.safe_load(value)
                # Times and dates stay text.
                if isinstance(loaded, (list, dict, float, bool)):
                    settings[key] = json.loads(json.dumps(loaded, default=str))
    return settings


def _ask(worker: Worker, problems: Problems, question: dict[str, Any]) -> dict[str, Any]:
    reply = worker.ask(question, PROBLEM_SECONDS)
    what = f"--dataset {problems.dataset}"
    if reply is None:
        raise TaskError(
            f"{what}: no problem within {PROBLEM_SECONDS:.0f} s and {MEMORY >> 30} GiB: change the settings"
        )
    if "refused" in reply:
        raise TaskError(f"{what}: {reply['refused']}")
    return reply


def _draws(worker: Worker, problems: Problems) -> Iterator[dict[str, Any]]:
    """The generator's problems, in order; without end for almost all of the generators."""
    # The library's problem n of seed s is its problem n - 1 of seed s + 1.
    seed = random.Random(problems.seed).getrandbits(31)
    begin, end = 0, problems.train_size + problems.test_size
    while True:
        question = {"do": "open", "dataset": problems.dataset, "settings": problems.settings}
        try:
            _ask(worker, problems, {**question, "seed": seed, "size": end})
        except TaskError:
            # Some generators limit the size.
            if begin:
                return
            raise
        for index in range(begin, end):
            entry = _ask(worker, problems, {"do": "entry", "index": index})
            if "end" in entry:
                return
            yield entry
        begin, end = end, 2 * end


def draw(worker: Worker, problems: Problems) -> tuple[dict[str, list[dict[str, Any]]], Counter[str]]:
    """The problems of each split, and how many repeats were left out on the way; those of test are drawn first.

    Raises:
        TaskError: the library refuses the settings, or has too few different problems.
    """
    chosen: dict[str, list[dict[str, Any]]] = {"test": [], "train": []}
    seen: dict[str, str] = {}
    repeats: Counter[str] = Counter()
    fruitless = 0
    for entry in _draws(worker, problems):
        split = "test" if len(chosen["test"]) < problems.test_size else "train"
        known = seen.get(entry["question"])
        if known is None or (problems.allow_repeats and split == known == "train"):
            seen[entry["question"]] = split
            chosen[split].append(entry)
            fruitless = 0
            if len(chosen["train"]) == problems.train_size:
                return chosen, repeats
        else:
            repeats[split] += 1
            fruitless += 1
            # Of equally likely problems, one that is left over is then missed with probability e^-10.
            if fruitless >= max(200, 10 * len(seen)):
                break
    # Without enough for test, repeats in train do not help.
    helps = not problems.allow_repeats and len(chosen["test"]) == problems.test_size and len(seen) > problems.test_size
    allow = ", or --allow-repeats (in train, never of test)" if helps else ""
    raise TaskError(
        f"--dataset {problems.dataset}: only {len(seen)} different problems with these settings, {len(chosen['test'])} "
        f"of them for test, for --test-size {problems.test_size} and --train-size {problems.train_size}: lower the "
        f"sizes, or choose settings (--set) with more problems{allow}"
    )


def _row(problems: Problems, split: str, index: int, entry: dict[str, Any]) -> Row:
    instruction = problems.instruction
    if instruction is None:
        instruction = TAGS_INSTRUCTION if problems.answer_from == "tags" else ""
    question = f"{entry['question']}\n{instruction}" if instruction else entry["question"]
    return {
        "data_source": f"reasoning_gym/{problems.dataset}",
        "prompt": [{"role": "user", "content": question}],
        "ability": "reasoning",
        # For people; the reward scores with the entry.
        "reward_model": {"style": "rule", "ground_truth": "" if entry["answer"] is None else str(entry["answer"])},
        "extra_info": {
            "split": split,
            "index": index,
            "dataset": problems.dataset,
            "settings": json.dumps(problems.settings),
            "answer_from": problems.answer_from,
            "strict": problems.strict,
            "entry": entry["entry"],
        },
    }


def prepare_problems(problems: Problems, splits: Sequence[str], out: Path) -> list[Written]:
    """Write ``out/<split>.parquet`` for each of ``splits``, which do not change what is drawn.

    Raises:
        TaskError: a value is not allowed, or the library has too few problems.
    """
    try:
        from verl_troll.tasks.rewards.reasoning_gym import ANSWERS, PROGRAM
    except ImportError as error:
        raise TaskError(str(error)) from error
    for key, number in (("train-size", problems.train_size), ("test-size", problems.test_size)):
        if number < 1:
            raise TaskError(f"--{key} {number}: must be at least 1")
    if problems.answer_from not in ANSWERS:
        raise TaskError(f"--answer {problems.answer_from}: must be one of {', '.join(ANSWERS)}")
    worker = Worker(PROGRAM, MEMORY, PROBLEM_SECONDS)
    try:
        chosen, repeats = draw(worker, problems)
    finally:
        worker.close()
    written = []
    for split in splits:
        path, count = write((_row(problems, split, *item) for item in enumerate(chosen[split])), split, out)
        written.append(Written(path, count, {"repeats a problem": repeats[split]} if repeats[split] else {}))
    return written
