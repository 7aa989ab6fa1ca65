"""The study's tasks: rewards, tokenizers, data, and preparation."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from verl.utils.tokenizer.chat_template import apply_chat_template, initialize_system_prompt

from benchmarks.study import prepare as study
from benchmarks.study.reward import compute_score
from benchmarks.study.tasks import TASKS, Task, add, programs, residues, words

each_task = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)


def drawn(task: Task, count: int = 300) -> list[Any]:
    return list(itertools.islice(task.problems(random.Random(7)), count))


@each_task
def test_careful_teacher_is_right_and_a_careless_one_sometimes_wrong(task: Task) -> None:
    rng = random.Random(0)

    def success(error_rate: float) -> float:
        problems = drawn(task)
        scores = [compute_score(task.name, task.solution(p, error_rate, rng), p.answer) for p in problems]
        return sum(scores) / len(scores)

    assert success(0.0) == 1.0
    assert 0.1 < success(task.error_rate) < 0.6


@each_task
def test_reward_needs_the_exact_form(task: Task) -> None:
    rng = random.Random(0)
    for problem in drawn(task, 50):
        right = task.solution(problem, 0.0, rng).strip()
        assert compute_score(task.name, f" {right}", problem.answer) == 1.0
        for wrong in (f"{right} {right}", f"{right} .", f"= {right}", f"{right[0]}  {right[2:]}"):
            assert compute_score(task.name, wrong, problem.answer) == 0.0, wrong


@each_task
def test_hostile_responses_are_wrong_and_do_no_harm(task: Task) -> None:
    problem = drawn(task, 1)[0]
    right = task.solution(problem, 0.0, random.Random(0)).strip()
    hostile = (
        "",
        " ",
        "\0",
        right + "\0",
        "9" * 10**6,
        f"{right} " * 10**5,
        "x " * 10**5,
        "\u0661\u0662\u0663",
        "\u00b2 \u00b2 \u00b2",
        "\ud800",
        "\ufffd" * 20,
        "-1 -1 -1",
        "nan inf 1e9",
        "__import__('os').abort()",
        "\n".join(right),
    )
    for response in hostile:
        assert compute_score(task.name, response, problem.answer) == 0.0, response[:40]


def test_add_forgets_carries_only() -> None:
    rng = random.Random(0)
    assert add.solution(add.Sum(257, 386), 0.0, rng) == "346"
    assert add.solution(add.Sum(257, 386), 1.0, rng) == "335"
    assert add.solution(add.Sum(999, 999), 0.0, rng) == "8991"
    assert add.solution(add.Sum(111, 222), 1.0, rng) == "333"


def test_words_shows_its_steps() -> None:
    story = words.Story("", 12, (("+", 3), ("*", 2), ("-", 4)))
    assert story.answer == "26"
    assert words.solution(story, 0.0, random.Random(0)) == " + 3 = 15 * 2 = 30 - 4 = 26"
    assert words.check("+ 3 = 15 * 2 = 30 - 4 = 26", "26")
    assert words.check("+ 9 = 1 * 2 = 3 - 4 = 26", "26")
    assert not words.check("* 2 = 30 - 4 = 26", "26")
    assert not words.check("+ 3 = 15 * 2 = 30 - 4 = 6", "26")


def test_words_numbers_stay_in_bounds() -> None:
    for story in drawn(TASKS["words"]):
        numbers = [int(word) for word in story.text.split() if word.isdigit()]
        assert max(*numbers, int(story.answer)) <= words.LIMIT
        assert len(story.steps) == words.STEPS


@pytest.mark.parametrize(
    ("program", "x", "value"),
    [
        ("x", 3, 3),
        ("x 2 * 1 +", 3, 7),
        ("1 x x + +", 3, 7),
        ("x 5 -", 3, -2),
        ("5 x -", 3, 2),
        ("x 4 max", 3, 4),
        ("x 4 min", 3, 3),
        ("x x x x x x * * * * *", 3, 729),
    ],
)
def test_interpreter(program: str, x: int, value: int) -> None:
    assert programs.run(tuple(program.split()), x) == value


@pytest.mark.parametrize(
    "program",
    ["", "+", "x +", "x x", "y", "0", "7", "10", "x 1 / ", "x x x x x x * * * * * x", "x x * x * x *"],
)
def test_interpreter_refuses(program: str) -> None:
    assert programs.run(tuple(program.split()), 100) is None


def test_programs_are_judged_on_hidden_inputs() -> None:
    problem = programs.Function(("x", "6", "min"), (1, 2, 3, 5))
    assert problem.text == " 1 1 , 2 2 , 3 3 , 5 5 ="
    assert compute_score("programs", "x 6 min", problem.answer) == 1.0
    assert compute_score("programs", "6 x min", problem.answer) == 1.0
    assert compute_score("programs", "x", problem.answer) == 0.0


def test_residues_need_three_different_numbers_of_the_class() -> None:
    problem = residues.Class(45, 10)
    assert problem.text == " 45 is 5 mod 10"
    for right in ("5 15 2045", "2045 5 15"):
        assert compute_score("residues", right, problem.answer) == 1.0
    for wrong in ("5 15 45", "5 15 15", "5 15 16", "5 15", "5 15 25 35", "5 15 2055", "5 15 025", "5 15 -5"):
        assert compute_score("residues", wrong, problem.answer) == 0.0


@each_task
def test_tokenizer_survives_transformers_and_the_chat_template(task: Task, tmp_path: Path) -> None:
    made = study.make_tokenizer(task)
    made.save_pretrained(tmp_path)
    torch.manual_seed(0)
    study._quickstart.make_model(made).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert type(tokenizer).__name__ == "Qwen2Tokenizer"
    assert len(tokenizer) == len(made)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (made.eos_token_id, made.pad_token_id)
    rng = random.Random(0)
    for word in task.words:
        assert len(tokenizer(word).input_ids) == 1
    for problem in drawn(task):
        for text in (problem.text, task.solution(problem, task.error_rate, rng)):
            ids = tokenizer(text).input_ids
            assert ids == made(text).input_ids
            assert tokenizer.decode(ids, skip_special_tokens=True) == text
            assert not task.words or len(ids) == len(text.split())
        messages = [{"role": "user", "content": problem.text}]
        assert apply_chat_template(tokenizer, messages) == tokenizer(problem.text).input_ids
    assert initialize_system_prompt(tokenizer) == []


@each_task
def test_lengths_are_within_the_limits(task: Task) -> None:
    tokenizer, rng = study.make_tokenizer(task), random.Random(0)
    problems = drawn(task, 2000)
    prompts = tokenizer([problem.text for problem in problems]).input_ids
    responses = tokenizer([task.solution(problem, task.error_rate, rng) for problem in problems]).input_ids
    assert max(map(len, prompts)) <= task.prompt_length
    assert max(map(len, responses)) + 1 <= task.response_length
    assert task.prompt_length + task.response_length <= study._quickstart.MODEL["max_position_embeddings"]


@each_task
def test_held_out_problems_are_in_neither_data_nor_lessons(task: Task) -> None:
    held_out, train = study.split(task)
    assert (held_out, train) == study.split(task)
    texts = {problem.text for problem in held_out}
    assert len(texts) == len(held_out)
    assert (len(held_out), len({problem.text for problem in train})) == (256, 4096)
    assert texts.isdisjoint(problem.text for problem in train)
    assert texts.isdisjoint(text for text, _ in itertools.islice(study.lessons(task, held_out), 5000))


@each_task
def test_prepared_folder(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, task.name, dataclasses.replace(task, warm_start_steps=3, warm_start_batch=8))
    monkeypatch.setattr(study, "SAMPLES", 1)
    monkeypatch.setattr(study._quickstart, "TRAIN_PROBLEMS", 32)
    monkeypatch.setattr(study._quickstart, "HELD_OUT_PROBLEMS", 16)
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    (first / "half-made").touch()
    done = study.prepare(task.name, first)
    assert study.prepare(task.name, second) == done
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(second) for path in second.rglob("*") if path.is_file())
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in files)
    before = (first / "done.json").stat().st_mtime_ns
    assert study.prepare(task.name, first) == done
    assert (first / "done.json").stat().st_mtime_ns == before
    (second / "done.json").write_text(json.dumps({**done, "version": study.VERSION - 1}))
    assert study.prepare(task.name, second) == done

    for name, count in (("train", 32), ("held_out", 16)):
        table = pd.read_parquet(first / f"{name}.parquet")
        assert len(table) == count
        assert set(table["data_source"]) == {task.name}
        assert [extra["index"] for extra in table["extra_info"]] == list(range(count))
        for row in table.itertuples():
            assert [message["role"] for message in row.prompt] == ["user"]
            assert compute_score(row.data_source, "", row.reward_model["ground_truth"]) == 0.0
    model = AutoModelForCausalLM.from_pretrained(first / "model")
    assert model.num_parameters() == done["parameters"] < 700_000
    assert model.config.tie_word_embeddings
    assert 0.0 <= done["success"] <= 1.0
    assert 0.0 < done["kept_mass"] <= 1.0 + 1e-4


def test_chain_starts_from_the_model_of_the_quickstart() -> None:
    task, quickstart = TASKS["chain"], study._quickstart
    held_out, train = study.split(task)
    chosen = list(dict.fromkeys(itertools.islice(task.problems(random.Random(quickstart.SEED)), 4352)))
    assert held_out + train == chosen
    lessons = zip(study.lessons(task, held_out), quickstart.lessons(set(held_out)), strict=False)
    assert all(ours == theirs for ours, theirs in itertools.islice(lessons, 100))
    assert task.warm_start_steps == quickstart.WARM_START_STEPS
    assert task.warm_start_batch == quickstart.WARM_START_BATCH
    assert task.error_rate == quickstart.TEACHER_ERROR_RATE
