"""Data sets written by the command line, from small files in each data set's own format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from verl_troll.tasks import prepare
from verl_troll.tasks.__main__ import main
from verl_troll.tasks.catalog import TASKS
from verl_troll.tasks.rewards import code, math

QUESTIONS = [
    {"question": "Two and five?", "answer": "2 + 5 = <<2+5=7>>7\n#### 7"},
    {"question": "A thousand and one?", "answer": "It is so.\n#### 1,001"},
    {"question": "Minus three?", "answer": "#### -3"},
]


def dapo(problem: str, answer: str, index: str) -> dict[str, Any]:
    text = f'Solve it. The last line should be of the form Answer: $Answer.\n\n{problem}\n\nRemember "Answer:".'
    return {
        "data_source": "math_dapo",
        "prompt": [{"content": text, "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": index},
    }


def eurus(source: str, ability: str, truth: Any, split: str, index: int) -> dict[str, Any]:
    return {
        "data_source": source,
        "prompt": [{"content": "[ASSESS]", "role": "system"}, {"content": f"Problem {index}", "role": "user"}],
        "ability": ability,
        "reward_model": {"ground_truth": truth, "style": "rule"},
        "extra_info": {"index": index, "split": split},
    }


PROGRAM_CASES = json.dumps({"inputs": ["1 2\n"], "outputs": ["3\n"]})
FUNCTION_CASES = json.dumps({"fn_name": "add", "inputs": ["1\n2"], "outputs": ["3"]})


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(path: Path) -> list[dict[str, Any]]:
    """Read the file as verl does."""
    import datasets

    return list(datasets.load_dataset("parquet", data_files=str(path), split="train"))


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_gsm8k(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = {"parquet": "main/{}-00000-of-00001.parquet", "jsonl": "{}.jsonl"}[kind]
    write(tmp_path / "hub" / names.format("train"), [*QUESTIONS, {"question": "?", "answer": "none"}])
    write(tmp_path / "hub" / names.format("test"), QUESTIONS[1:])
    write(tmp_path / "hub" / "socratic" / "train-00000-of-00001.parquet", QUESTIONS[:1])
    assert main(["gsm8k", "--out", str(tmp_path / "out"), "--local", str(tmp_path / "hub")]) == 0
    rows = read(tmp_path / "out" / "train.parquet")
    assert rows[1] == {
        "data_source": "openai/gsm8k",
        "prompt": [
            {
                "role": "user",
                "content": 'A thousand and one? Let\'s think step by step and output the final answer after "####".',
            }
        ],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "1001"},
        "extra_info": {"split": "train", "index": 1, "answer": "It is so.\n#### 1,001"},
    }
    assert [row["extra_info"]["index"] for row in rows] == [0, 1, 2]
    assert [row["extra_info"]["split"] for row in read(tmp_path / "out" / "test.parquet")] == ["test", "test"]
    assert "left out: 1 (the answer has no ####)" in capsys.readouterr().out
    # The task's reward accepts the source's own solutions.
    for row, question in zip(rows, QUESTIONS, strict=True):
        assert math.compute_score("x", question["answer"], row["reward_model"]["ground_truth"])["score"] == 1


def test_dapo_math_writes_each_prompt_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = [dapo("One?", "1", "a"), dapo("Two?", "2", "b")] * 100 + [dapo("Three?", "3", "c")]
    write(tmp_path / "hub" / "data" / "dapo-math-17k.parquet", train)
    write(tmp_path / "hub" / "data" / "aime-2024.parquet", [dapo("Four?", "4", "d")] * 32)
    assert main(["dapo_math", "--out", str(tmp_path), "--local", str(tmp_path / "hub")]) == 0
    rows = read(tmp_path / "train.parquet")
    assert [row["reward_model"] for row in rows] == [{"style": "rule", "ground_truth": n} for n in "123"]
    assert [row["extra_info"] for row in rows] == [
        {"split": "train", "index": n, "source_index": source} for n, source in enumerate("abc")
    ]
    assert {(row["data_source"], row["ability"]) for row in rows} == {("math_dapo", "math")}
    assert len(read(tmp_path / "test.parquet")) == 1
    assert "left out: 198 (repeats a prompt)" in capsys.readouterr().out
    # A problem's index does not depend on how many are written.
    assert main(["dapo_math", "--out", str(tmp_path / "few"), "--local", str(tmp_path / "hub"), "--limit", "2"]) == 0
    assert read(tmp_path / "few" / "train.parquet") == rows[:2]


def test_eurus_is_split_by_ability(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "validation"):
        rows = [
            eurus("numina_olympiads", "math", "\\frac{1}{2}", split, 0),
            eurus("taco", "code", PROGRAM_CASES, split, 1),
            eurus("apps", "code", FUNCTION_CASES, split, 2),
            eurus("apps", "code", '{"inputs": []}', split, 3),
            eurus("numina_cn_k12", "math", "7", split, 4),
        ]
        write(tmp_path / "hub" / "data" / f"{split}-00000-of-00002.parquet", rows[:2])
        write(tmp_path / "hub" / "data" / f"{split}-00001-of-00002.parquet", rows[2:])
    for task in ("eurus_math", "eurus_code"):
        assert main([task, "--out", str(tmp_path / task), "--local", str(tmp_path / "hub")]) == 0
    mathematics = read(tmp_path / "eurus_math" / "test.parquet")
    assert [row["extra_info"] for row in mathematics] == [
        {"split": "test", "index": 0, "source_index": "0"},
        {"split": "test", "index": 1, "source_index": "4"},
    ]
    assert [message["role"] for message in mathematics[0]["prompt"]] == ["system", "user"]
    programs = read(tmp_path / "eurus_code" / "train.parquet")
    assert [row["data_source"] for row in programs] == ["taco", "apps"]
    assert "left out: 1 (its test cases cannot be read)" in capsys.readouterr().out
    answers = ["a, b = map(int, input().split())\nprint(a + b)", "def add(a, b): return a + b"]
    for row, answer in zip(programs, answers, strict=True):
        truth = row["reward_model"]["ground_truth"]
        assert code.compute_score(row["data_source"], f"```python\n{answer}\n```", truth)["score"] == 1


SUITES: dict[str, tuple[str, dict[str, Any], str]] = {
    "aime24": ("train-00000-of-00001.parquet", {"id": 60, "problem": "P", "answer": "025", "solution": "S"}, "025"),
    "aime25": ("test.jsonl", {"id": "0", "problem": "P", "answer": "70"}, "70"),
    "amc23": ("test-00000-of-00001.parquet", {"id": 0, "question": "P", "answer": 27.0, "url": "U"}, "27"),
    "math500": ("test.jsonl", {"problem": "P", "answer": "\\pi", "unique_id": "u", "level": 2}, "\\pi"),
    "minerva": ("test.jsonl", {"question": "P", "answer": "1.6e-7"}, "1.6e-7"),
    "olympiadbench": (
        "test.parquet",
        {"id": 1606, "question": "P", "final_answer": ["$\\frac{1}{2}$"]},
        "\\frac{1}{2}",
    ),
}


@pytest.mark.parametrize("task", SUITES)
def test_suites(task: str, tmp_path: Path) -> None:
    name, row, truth = SUITES[task]
    write(tmp_path / "hub" / name, [row])
    assert main([task, "--out", str(tmp_path), "--local", str(tmp_path / "hub")]) == 0
    (written,) = read(tmp_path / "test.parquet")
    assert written["data_source"] == task
    assert written["prompt"][0]["content"].startswith("P\n\nPlease reason step by step")
    assert written["reward_model"] == {"style": "rule", "ground_truth": truth}


def test_every_task_has_a_test() -> None:
    assert {*TASKS} == {"gsm8k", "dapo_math", "eurus_math", "eurus_code", *SUITES}


def ready(**columns: Any) -> dict[str, Any]:
    return {**dapo("One?", "1", "a"), **columns}


def truth(value: Any) -> dict[str, Any]:
    return {"ground_truth": value, "style": "rule"}


MATH = {"question": "One?", "answer": "#### 1"}
SUITE = {"problem": "P", "answer": "1"}
# Task, rows, number of the wrong one, its column, what is wrong.
WRONG: dict[str, tuple[str, list[dict[str, Any]], int, str, str]] = {
    "no message": ("dapo_math", [ready(), ready(prompt=[])], 2, "prompt", "a list of one or more messages"),
    "no prompt": ("dapo_math", [ready(), ready(prompt=None)], 2, "prompt", "a list of one or more messages"),
    "a prompt of text": ("eurus_math", [ready(prompt="One?")], 1, "prompt", "got str 'One?'"),
    "a blank prompt": (
        "eurus_math",
        [ready(), ready(prompt=[{"content": " \n", "role": "user"}])],
        2,
        "prompt[0].content",
        "must be text that is not blank",
    ),
    "no content": (
        "dapo_math",
        [ready(prompt=[{"content": "One?", "role": "user"}, {"content": None, "role": "user"}])],
        1,
        "prompt[1].content",
        "must be text, or a list of its parts",
    ),
    "no role": (
        "dapo_math",
        [ready(), ready(prompt=[{"content": "One?", "role": None}])],
        2,
        "prompt[0].role",
        "must be text that is not blank",
    ),
    "an image": (
        "dapo_math",
        [ready(prompt=[{"content": [{"type": kind, "text": "One?"}], "role": "user"}]) for kind in ("text", "image")],
        2,
        "prompt[0].content",
        "must be text, or a list of parts",
    ),
    "no ability": ("dapo_math", [ready(), ready(ability=None)], 2, "ability", "text that is not blank"),
    "no reward_model": ("dapo_math", [ready(), ready(reward_model=None)], 2, "reward_model", "must be a mapping"),
    "a reward_model of text": ("dapo_math", [ready(reward_model="1")], 1, "reward_model", "must be a mapping, got str"),
    "a blank data_source": ("dapo_math", [ready(), ready(data_source="")], 2, "data_source", "text that is not blank"),
    "extra_info of text": ("dapo_math", [ready(extra_info="7")], 1, "extra_info", "must be a mapping, got str '7'"),
    "a truth of NaN": (
        "dapo_math",
        [ready(reward_model=truth(0.5)), ready(reward_model=truth(float("nan")))],
        2,
        "reward_model.ground_truth",
        "must be text or a finite number, got float nan",
    ),
    "a truth of a list": (
        "eurus_math",
        [ready(reward_model=truth(["1"]))],
        1,
        "reward_model.ground_truth",
        "must be text or a finite number, got list ['1']",
    ),
    "a truth of a mapping": (
        "eurus_math",
        [ready(reward_model=truth({"target": "1"}))],
        1,
        "reward_model.ground_truth",
        "must be text or a finite number, got dict",
    ),
    "a truth of yes or no": (
        "dapo_math",
        [ready(reward_model=truth(True))],
        1,
        "reward_model.ground_truth",
        "must be text or a finite number, got bool True",
    ),
    "an infinite answer": (
        "amc23",
        [{**SUITE, "answer": 1.0}, {**SUITE, "answer": float("inf")}],
        2,
        "answer",
        "must be text or a finite number, got float inf",
    ),
    "a nested answer": (
        "minerva",
        [{"question": "P", "final_answer": [["1"], ["2"]]}, {"question": "P", "final_answer": [["1"]]}],
        2,
        "final_answer",
        "must be text or a finite number, got list",
    ),
    "no problem": ("math500", [SUITE, {**SUITE, "problem": None}], 2, "problem", "must be text that is not blank"),
    "a blank question": (
        "minerva",
        [{"question": "P", "answer": "1"}, {"question": " ", "answer": "1"}],
        2,
        "question",
        "must be text that is not blank, got str ' '",
    ),
    "no question": ("gsm8k", [MATH, {**MATH, "question": None}], 2, "question", "must be text that is not blank"),
    "no solution": ("gsm8k", [MATH, {**MATH, "answer": None}], 2, "answer", "must be text that is not blank"),
    "a solution of a number": ("gsm8k", [{**MATH, "answer": 1}], 1, "answer", "text that is not blank, got int 1"),
}


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
@pytest.mark.parametrize("case", WRONG.values(), ids=list(WRONG))
def test_a_row_of_another_format_is_refused_by_file_row_and_column(
    case: tuple[str, list[dict[str, Any]], int, str, str], kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task, rows, number, column, wrong = case
    file, out = tmp_path / f"rows.{kind}", tmp_path / "out"
    write(file, rows)
    split = next(iter(TASKS[task].sources))
    assert main([task, "--out", str(out), "--split", split, "--local", str(file)]) == 1
    error = capsys.readouterr().err
    assert f"{file}, row {number}, column {column}: must be " in error
    assert wrong in error
    assert not list(out.iterdir())


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_the_row_is_counted_in_its_own_file(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / f"train-0.{kind}", [ready()] * 3)
    write(tmp_path / f"train-1.{kind}", [ready(), ready(prompt=[])])
    write(tmp_path / f"train-2.{kind}", [ready()] * 3)
    arguments = ["eurus_math", "--out", str(tmp_path / "out"), "--split", "train", "--local", str(tmp_path)]
    assert main(arguments) == 1
    assert f"{tmp_path / f'train-1.{kind}'}, row 2, column prompt: " in capsys.readouterr().err


def test_on_the_hub_the_row_is_named_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import datasets

    found = datasets.Dataset.from_list([MATH, {**MATH, "question": ""}])
    monkeypatch.setattr(datasets, "load_dataset", lambda *given, **named: found)
    assert main(["gsm8k", "--out", str(tmp_path), "--split", "train"]) == 1
    assert "openai/gsm8k main on the hub, split train, row 2, column question: must be" in capsys.readouterr().err


def test_answers_of_several_types_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.jsonl"
    write(file, [{"problem": "P", "answer": answer} for answer in (1, "2", {"x": 3})])
    assert main(["math500", "--out", str(tmp_path / "out"), "--local", str(file)]) == 1
    assert f"{file}, row 3, column answer: must be text or a finite number, got dict" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, "0"), (7, "7"), (0.0, "0"), (0.25, "0.25"), (-3.0, "-3"), ("0", "0"), (10**17 + 1, "100000000000000001")],
)
def test_a_truth_may_be_a_number(value: Any, expected: str, kind: str, tmp_path: Path) -> None:
    write(tmp_path / f"ready.{kind}", [ready(reward_model=truth(value))])
    write(tmp_path / f"suite.{kind}", [{"problem": "P", "answer": value}])
    for task, name, split in (("dapo_math", "ready", "train"), ("math500", "suite", "test")):
        arguments = [task, "--out", str(tmp_path / task), "--split", split, "--local", str(tmp_path / f"{name}.{kind}")]
        assert main(arguments) == 0
        assert read(tmp_path / task / f"{split}.parquet")[0]["reward_model"]["ground_truth"] == expected


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_content_in_parts_is_joined(kind: str, tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "One"}, {"type": "text", "text": " and two?"}]
    write(tmp_path / f"a.{kind}", [ready(prompt=[{"role": "user", "content": parts}])])
    arguments = ["dapo_math", "--out", str(tmp_path), "--split", "train", "--local", str(tmp_path / f"a.{kind}")]
    assert main(arguments) == 0
    assert read(tmp_path / "train.parquet")[0]["prompt"] == [{"role": "user", "content": "One and two?"}]


@pytest.mark.parametrize("empty", ["", " ", "\n", "####", "#### ", None])
def test_an_empty_truth_is_left_out_and_named(
    empty: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.jsonl"
    write(file, [ready(), *[ready(reward_model=truth(empty))] * 2])
    arguments = ["dapo_math", "--out", str(tmp_path), "--split", "train", "--local", str(file)]
    assert main(arguments) == 0
    place = f"{file}, row 2, column reward_model.ground_truth"
    assert f"left out: 2 (the answer is empty), the first: {place}\n" in capsys.readouterr().out
    assert len(read(tmp_path / "train.parquet")) == 1
    write(file, [ready(reward_model=truth(empty))])
    assert main(arguments) == 1
    assert f"{file}, row 1, column reward_model.ground_truth" in capsys.readouterr().err


def test_cases_may_be_a_mapping(tmp_path: Path) -> None:
    rows = [eurus("taco", "code", json.loads(text), "train", 0) for text in (PROGRAM_CASES,)]
    write(tmp_path / "a.jsonl", rows)
    arguments = ["eurus_code", "--out", str(tmp_path), "--split", "train", "--local", str(tmp_path / "a.jsonl")]
    assert main(arguments) == 0
    (row,) = read(tmp_path / "train.parquet")
    assert json.loads(row["reward_model"]["ground_truth"]) == json.loads(PROGRAM_CASES)


def test_missing_column_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "train.jsonl", [{"question": "?", "solution": "7"}])
    assert main(["gsm8k", "--out", str(tmp_path / "out"), "--split", "train", "--local", str(tmp_path)]) == 1
    message = "gsm8k, split train: missing column answer; its columns are ['question', 'solution']"
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gsm8k", "--local", "/nowhere"], "no such file or folder"),
        (["gsm8k", "--local", "{}"], "no file for the split train; looked for train*.parquet, train*.jsonl"),
        (["math500", "--local", "{}/a.csv"], "files end in ['.csv']; one of ['.jsonl', '.parquet'] can be read"),
        (["math500", "--local", "{}/broken.jsonl"], "cannot read"),
        (["aime25", "--local", "{}/empty.jsonl"], "no row is left of 1; left out: {'the answer is empty': 1}"),
    ],
)
def test_unusable_source_is_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.csv").write_text("problem,answer\n")
    (tmp_path / "broken.jsonl").write_text("{")
    write(tmp_path / "empty.jsonl", [{"problem": "P", "answer": ""}])
    arguments = [argument.format(tmp_path) for argument in arguments]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.parquet*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gsm8k", "--local", __file__], "is one file: pass --split to say which of train, test it is"),
        (["math500", "--split", "train"], "math500 has no split train, only test"),
        (["gsm9k"], "invalid choice: 'gsm9k'"),
        (["gsm8k", "--limit", "0"], "must be at least 1"),
    ],
)
def test_unusable_arguments_are_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([*arguments, "--out", str(tmp_path)])
    assert message in capsys.readouterr().err


def test_without_a_connection_the_message_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["math500", "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "cannot read HuggingFaceH4/MATH-500 on the hub" in error
    assert "fetch its files elsewhere and pass --local PATH" in error


def test_interrupted_run_leaves_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "hub" / "train.jsonl", QUESTIONS)
    arguments = ["gsm8k", "--out", str(tmp_path / "out"), "--split", "train", "--local", str(tmp_path / "hub")]
    assert main(arguments) == 0
    before = (tmp_path / "out" / "train.parquet").read_bytes()
    monkeypatch.setattr(prepare, "BATCH", 1)
    real = prepare._write
    calls = []

    def interrupted(*given: Any) -> Any:
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(prepare, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(arguments)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train.parquet"]
    assert (tmp_path / "out" / "train.parquet").read_bytes() == before
