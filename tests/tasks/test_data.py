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


def eurus(source: str, ability: str, truth: str, split: str, index: int) -> dict[str, Any]:
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
