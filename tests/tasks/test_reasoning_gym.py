"""Problems of reasoning-gym: the files that the command line writes, and their reward."""

from __future__ import annotations

import copy
import dataclasses
import datetime
import enum
import json
import sys
import time
from collections.abc import Iterator, Mapping
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from tokenize import TokenError
from typing import Any

import pytest
import reasoning_gym as library
from reasoning_gym.factory import DATASETS

from benchmarks import processes
from tests.tasks.test_data import read
from verl_troll.tasks import prepare
from verl_troll.tasks import reasoning_gym as source
from verl_troll.tasks.__main__ import main
from verl_troll.tasks.rewards import _reasoning_gym_worker as inside
from verl_troll.tasks.rewards import reasoning_gym
from verl_troll.tasks.rewards.answers import last_number
from verl_troll.tasks.rewards.worker import Worker

NAMES = sorted(set(DATASETS) - {"composite"})
ONE_DIGIT = ["--set", "min_terms=2", "--set", "max_terms=2", "--set", "max_digits=1"]


class Shared(Worker):
    """A worker that outlives a run of the command line, since the library takes seconds to start."""

    def close(self) -> int:
        return 0


@pytest.fixture(scope="module")
def shared() -> Iterator[Worker]:
    worker = Shared(reasoning_gym.PROGRAM, source.MEMORY, source.PROBLEM_SECONDS)
    yield worker
    Worker.close(worker)


@pytest.fixture(autouse=True)
def one_worker(shared: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "Worker", lambda *given: shared)


def run(out: Path, *arguments: str) -> int:
    return main(["reasoning_gym", "--out", str(out), *arguments])


def questions(path: Path) -> list[str]:
    return [row["prompt"][0]["content"] for row in read(path)]


def score(row: Mapping[str, Any], response: str, **settings: Any) -> dict[str, float]:
    # A generous limit, since it is wall-clock time.
    settings = {"seconds": 120.0, "workers": 1, **settings}
    return reasoning_gym.compute_score(
        row["data_source"],
        response,
        row["reward_model"]["ground_truth"],
        {**row["extra_info"], "num_turns": None},
        **settings,
    )


def test_files(tmp_path: Path) -> None:
    sizes = ["--train-size", "120", "--test-size", "40"]
    assert run(tmp_path, "--dataset", "chain_sum", *ONE_DIGIT, *sizes, "--answer", "last-number") == 0
    train, test = (read(tmp_path / f"{split}.parquet") for split in ("train", "test"))
    assert (len(train), len(test)) == (120, 40)
    texts = [row["prompt"][0]["content"] for row in train + test]
    assert len(set(texts)) == 160
    row = train[7]
    left, sign, right = texts[7].removesuffix(" =").rsplit(": ", 1)[1].split()
    answer = int(left) + (int(right) if sign == "+" else -int(right))
    assert row["reward_model"] == {"style": "rule", "ground_truth": str(answer)}
    assert row["data_source"] == "reasoning_gym/chain_sum"
    about = row["extra_info"]
    assert (about["split"], about["index"], about["answer_from"], about["strict"]) == ("train", 7, "last-number", False)
    assert json.loads(about["settings"]) == {"min_terms": 2, "max_terms": 2, "max_digits": 1}
    assert score(row, f"It is {answer}.")["score"] == 1
    assert score(row, f"It is {answer + 1}.")["acc"] == 0


def test_same_seed_same_problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Its questions depend on the order of sets.
    words = ["--dataset", "isomorphic_strings", "--train-size", "20", "--test-size", "10"]
    assert run(tmp_path / "a", *words) == run(tmp_path / "c", *words, "--seed", "1") == 0
    with monkeypatch.context() as patch:
        patch.setattr(source, "Worker", Worker)
        assert run(tmp_path / "b", *words) == 0
    assert run(tmp_path / "d", *words, "--split", "test") == 0
    assert [path.name for path in (tmp_path / "d").iterdir()] == ["test.parquet"]
    for split in ("train", "test"):
        assert questions(tmp_path / "a" / f"{split}.parquet") == questions(tmp_path / "b" / f"{split}.parquet")
    assert questions(tmp_path / "a" / "test.parquet") == questions(tmp_path / "d" / "test.parquet")
    everything = [questions(tmp_path / name / f"{split}.parquet") for name in "ac" for split in ("train", "test")]
    assert not {*everything[0], *everything[1]} & {*everything[2], *everything[3]}


def test_too_few_problems(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--dataset", "chain_sum", *ONE_DIGIT, "--train-size", "300"]
    assert run(tmp_path, *given, "--test-size", "50") == 1
    message = capsys.readouterr().err
    # Two digits, two signs, two digits.
    assert "only 200 different problems with these settings, 50 of them for test" in message
    assert "lower the sizes, or choose settings (--set) with more problems, or --allow-repeats" in message
    assert not list(tmp_path.iterdir())
    assert run(tmp_path, *given, "--test-size", "50", "--allow-repeats") == 0
    train, test = (questions(tmp_path / f"{split}.parquet") for split in ("train", "test"))
    assert (len(train), len(test), len(set(test))) == (300, 50, 50)
    assert not set(train) & set(test) and len(set(train)) > 100
    # Repeats in train do not help where test has too few, or takes them all.
    for size in ("500", "200"):
        assert run(tmp_path, *given, "--test-size", size) == 1
        assert "--allow-repeats" not in capsys.readouterr().err
    # Test takes them all.
    assert run(tmp_path, *given, "--test-size", "200", "--allow-repeats") == 1
    assert "only 200 different problems with these settings, 200 of them for test" in capsys.readouterr().err


def test_generator_that_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The library's word ladders allow no more than 20,000.
    given = ["--dataset", "word_ladder", "--set", "min_word_length=3", "--set", "max_word_length=3"]
    assert run(tmp_path, *given, "--train-size", "20000", "--test-size", "1") == 1
    assert "refuses --set min_word_length=3 --set max_word_length=3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--dataset", "time_intervals", "--set", "min_date=2020-01-01", "--set", "max_date=2020-01-02"],
            "--dataset time_intervals: cannot make problem ",
        ),
        (["--dataset", "chain_sun"], "--dataset chain_sun: must be one of ab, acre, "),
        (
            ["--set", "min_term=2"],
            "--set min_term=2: no such setting; the settings are min_terms, max_terms, min_digits",
        ),
        (["--set", "min_terms=two"], "--set min_terms=two: must be of type int"),
        (["--set", "min_terms=2.5"], "--set min_terms=2.5: must be of type int"),
        (["--set", "min_terms=true"], "--set min_terms=true: must be of type int"),
        (["--set", "min_terms="], "--set min_terms=: must be of type int"),
        (["--set", "min_terms"], "--set min_terms: must be KEY=VALUE, such as min_terms=2"),
        (["--set", "min_terms=3", "--set", "min_terms=4"], "--set min_terms=4: min_terms is given twice"),
        (["--set", "allow_negation=2"], "--set allow_negation=2: must be of type bool"),
        (
            ["--set", "min_terms=9"],
            "refuses --set min_terms=9: AssertionError: max_terms must be >= min_terms (defaults: min_t",
        ),
        (["--set", "size=9"], "--set size=9: use --seed, --train-size and --test-size"),
        (["--set", "seed=9"], "--set seed=9: use --seed"),
        (["--dataset", "composite"], "refuses its defaults: AssertionError: Must specify at least one dataset"),
        (
            ["--dataset", "composite", "--set", "datasets=[{name: gcd}]"],
            "must be of type list[reasoning_gym.composite.Data",
        ),
        (["--dataset", "word_sorting", "--set", "transformation=up"], "must be one of ['lowercase', 'uppercase', "),
        (
            ["--dataset", "basic_arithmetic", "--set", "whitespace=tab"],
            "must be one of ['no_space', 'single', 'random']",
        ),
        (
            ["--dataset", "time_intervals", "--set", "min_date=1 May"],
            "--set min_date=1 May: must be a date in ISO format",
        ),
        (["--dataset", "aiw", "--set", "task_types=siblings"], "--set task_types=siblings: must be of type list["),
        (["--train-size", "0"], "--train-size 0: must be at least 1"),
        (["--test-size", "-1"], "--test-size -1: must be at least 1"),
        (["--answer", "last"], "--answer last: must be one of tags, last-number, response"),
    ],
)
def test_unusable_values_are_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "out", "--dataset", "chain_sum", *arguments) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["reasoning_gym"], "reasoning_gym needs --dataset, such as --dataset chain_sum"),
        (
            ["reasoning_gym", "--dataset", "gcd", "--limit", "7"],
            "--limit is not for reasoning_gym: use --train-size and",
        ),
        (["reasoning_gym", "--dataset", "gcd", "--local", "/x"], "--local is not for reasoning_gym: its problems are"),
        (["reasoning_gym", "--dataset", "gcd", "--seed", "x"], "argument --seed: invalid int value: 'x'"),
        (["gsm8k", "--dataset", "chain_sum"], "--dataset is for reasoning_gym alone"),
        (["gsm8k", "--strict"], "--strict is for reasoning_gym alone"),
        (["gsm8k", "--train-size", "7"], "--train-size is for reasoning_gym alone"),
    ],
)
def test_options_of_other_tasks_are_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([*arguments, "--out", str(tmp_path)])
    assert message in capsys.readouterr().err


def test_other_tasks_do_not_import_the_library() -> None:
    code = (
        "import sys, verl_troll.tasks.__main__; sys.exit(bool({'reasoning_gym', 'sympy', 'yaml'} & set(sys.modules)))"
    )
    processes.run([sys.executable, "-c", code], check=True)


def test_missing_library_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, reasoning_gym.__name__)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run(tmp_path, "--dataset", "chain_sum") == 1
    assert "pip install 'verl_troll[reasoning-gym]'" in capsys.readouterr().err


def test_settings_of_several_kinds(tmp_path: Path) -> None:
    mixture = "datasets=[{name: gcd, weight: 1, config: {}}, {name: lcm, weight: 2.5, config: {max_value: 9}}]"
    few = ["--train-size", "6", "--test-size", "2"]
    assert run(tmp_path / "a", *few, "--dataset", "composite", "--set", mixture) == 0
    rows = read(tmp_path / "a" / "train.parquet")
    assert {row["data_source"] for row in rows} == {"reasoning_gym/composite"}
    assert {score(row, f"<answer>{row['reward_model']['ground_truth']}</answer>")["score"] for row in rows} == {1}
    dates = ["--set", "task_types=[date]", "--set", "min_date=2020-01-01", "--set", "max_date=2020-12-31"]
    assert run(tmp_path / "b", *few, "--dataset", "time_intervals", *dates) == 0
    assert all("2020" in question for question in questions(tmp_path / "b" / "train.parquet"))
    assert run(tmp_path / "c", *few, "--dataset", "word_sorting", "--set", "transformation=uppercase") == 0
    assert run(tmp_path / "d", *few, "--dataset", "complex_arithmetic", "--set", 'operations=["+", -]', "--set",
               "operations_weights=[.5, 0.5]") == 0  # fmt: skip


def plain(value: Any) -> Any:
    """A setting as YAML or JSON would hold it."""
    if isinstance(value, enum.Enum):
        return value.value
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


@pytest.fixture(scope="module")
def datasets() -> inside.Datasets:
    return inside.Datasets()


def test_every_setting_takes_its_default(datasets: inside.Datasets) -> None:
    for name in NAMES:
        made = DATASETS[name][1]()
        own = {field.name: getattr(made, field.name) for field in dataclasses.fields(made)}
        del own["size"], own["seed"]
        again = datasets.make(name, {key: json.loads(json.dumps(plain(value))) for key, value in own.items()}).config
        for key, value in own.items():
            # Some of the library's tuples stand where it asks for a list.
            assert getattr(again, key) in (value, plain(value)), (name, key)


ANSWER_KEYS = ("example_answer", "example_correct_answer", "possible_answer")


def answers(entry: dict[str, Any]) -> Iterator[str]:
    """The library's own answers, and one that is wrong in almost all of the data sets."""
    for answer in (entry["answer"], *(entry["metadata"].get(key) for key in ANSWER_KEYS)):
        if answer is not None:
            yield answer if isinstance(answer, str) else json.dumps(answer)
    yield "1 2\n3"


def direct(dataset: Any, answer: str, entry: dict[str, Any]) -> float:
    try:
        return dataset.score_answer(answer, copy.deepcopy(entry))
    except Exception:
        return 0.0


def test_file_and_reward_score_as_the_library_does(tmp_path: Path) -> None:
    expected: list[dict[str, float]] = []
    rows: list[dict[str, Any]] = []
    for name in NAMES:
        dataset = library.create_dataset(name, seed=3, size=10)
        problems = source.Problems(name, {}, answer_from="response")
        # Slow to make, each up to seconds.
        for index in range(1 if name in ("knight_swap", "sudoku", "zebra_puzzles", "quantum_lock") else 2):
            entry = dataset[index]
            stored = {"question": entry["question"], "answer": entry["answer"], "entry": json.dumps(inside.pack(entry))}
            rows.append(source._row(problems, "train", len(rows), stored))
            expected.append({answer: direct(dataset, answer.strip(), entry) for answer in answers(entry)})
    prepare.write(rows, "train", tmp_path)
    written = read(tmp_path / "train.parquet")
    full = 0
    for row, scores in zip(written, expected, strict=True):
        for answer, wanted in scores.items():
            result = score(row, answer)
            assert (result["score"], result["stopped"]) == (wanted, 0), (row["data_source"], answer)
            full += result["acc"] == 1
    assert full > 0.9 * len(rows)


@pytest.mark.parametrize(
    "value",
    [
        (1, [2, (3,)]),
        {"a": {1: (2.5, None)}, "!": True},
        {1, 2},
        frozenset({"x"}),
        {(1, 2): {0.5: "half"}},
        Fraction(1, 3),
        Decimal("0.10"),
        1 + 2j,
        datetime.datetime(2020, 1, 2, 3, 4, 5, 6, datetime.timezone.utc),
        datetime.date(2020, 1, 2),
        datetime.time(1, 2, 3),
        float("inf"),
        "\ud800",
    ],
)
def test_stored_value_is_the_same(value: Any) -> None:
    again = inside.unpack(json.loads(json.dumps(inside.pack(value))))
    assert again == value and type(again) is type(value)


def test_value_that_cannot_be_stored_is_named() -> None:
    with pytest.raises(inside.RefusedError, match=r"an entry holds a builtins\.bytes, which cannot be stored"):
        inside.pack({"a": [b"x"]})


@pytest.fixture(scope="module")
def chain_sum() -> dict[str, Any]:
    """A row whose answer is 12."""
    entry = {"question": "5 + 7 =", "answer": "12", "metadata": {}}
    stored = {**entry, "entry": json.dumps(entry)}
    return source._row(source.Problems("chain_sum", {}), "train", 0, stored)


@pytest.mark.parametrize(
    ("how", "response", "strict", "expected"),
    [
        ("tags", "So <answer> 12 </answer>.", False, (1, 1, 1)),
        ("tags", "<answer>7</answer> no <answer>12</answer>", True, (1, 1, 1)),
        ("tags", "<answer>12</answer> no <answer>7</answer>", False, (0, 0, 1)),
        ("tags", "<answer>It is 12</answer>", False, (0.25, 0, 1)),
        ("tags", "<answer>It is 12</answer>", True, (0, 0, 1)),
        ("tags", "12", False, (0, 0, 0)),
        ("tags", "<answer></answer>", False, (0, 0, 0)),
        ("last-number", "5 + 7 = 12.", False, (1, 1, 1)),
        ("last-number", "5 + 7 = 12.", True, (0, 0, 0)),
        ("last-number", " 12\n", True, (1, 1, 1)),
        ("last-number", "12 or 13", False, (0, 0, 1)),
        ("last-number", "twelve", False, (0, 0, 0)),
        ("response", " 12\n", True, (1, 1, 1)),
        ("response", "12 apples", False, (2 / 9, 0, 1)),
        ("response", "12 apples", True, (0, 0, 1)),
        ("response", " \n", False, (0, 0, 0)),
    ],
)
def test_where_the_answer_stands(
    how: str, response: str, strict: bool, expected: tuple[float, ...], chain_sum: dict[str, Any]
) -> None:
    row = {**chain_sum, "extra_info": {**chain_sum["extra_info"], "answer_from": how, "strict": strict}}
    result = score(row, response)
    assert (result["score"], result["acc"], result["answered"]) == pytest.approx(expected)
    assert result["stopped"] == 0


@pytest.mark.parametrize(
    ("given", "added"),
    [
        ([], "\nPut your final answer between <answer> and </answer>."),
        (["--answer", "last-number"], ""),
        (["--answer", "response", "--instruction", "Be brief."], "\nBe brief."),
        (["--instruction", ""], ""),
    ],
)
def test_instruction(given: list[str], added: str, tmp_path: Path) -> None:
    assert run(tmp_path, "--dataset", "gcd", "--train-size", "1", "--test-size", "1", "--strict", *given) == 0
    (row,) = read(tmp_path / "train.parquet")
    assert row["prompt"][0]["content"] == json.loads(row["extra_info"]["entry"])["question"] + added
    assert row["extra_info"]["strict"] is True


@pytest.mark.parametrize(
    ("response", "number"),
    [
        ("4 + 7 = 11", "11"),
        ("11.", "11"),
        ("The answer is...5", "5"),
        ("Answer: -3", "-3"),
        ("= - 3", "-3"),
        ("7 - 3", "3"),
        ("7-3", "3"),
        ("7 -3", "-3"),
        ("(2)-3", "3"),
        ("x-3", "3"),
        ("\u22123", "-3"),
        ("$-3$", "-3"),
        ("\\boxed{-3}", "-3"),
        ("The numbers:\n- 4", "4"),
        ("+5", "5"),
        ("1,234,567.50 apples", "1234567.50"),
        ("1,2,3", "3"),
        ("12,345, 6", "6"),
        ("-$1,000", "-1000"),
        ("\\$18", "18"),
        ("it costs \u20ac.75", ".75"),
        ("50%", "50"),
        ("5kg", "5"),
        ("1.5e-3", "1.5e-3"),
        ("2E5", "2E5"),
        ("three quarters, 3/4", "3/4"),
        ("-3/4", "-3/4"),
        ("0x1F", "0x1F"),
        ("0b101", "0b101"),
        ("**7**", "7"),
        ("7\u3002", "7"),
        ("\u7b54\u68488", "8"),
        ("x2 is unknown", None),
        ("version 1.2.3", "1.2"),
        ("none", None),
        ("", None),
    ],
)
def test_last_number(response: str, number: str | None) -> None:
    assert last_number(response) == number


@pytest.mark.parametrize("response", ["7", " -7\n", "1,234", "-3/4", "$5", ".5"])
def test_number_alone(response: str) -> None:
    assert last_number(response, alone=True) == last_number(response) is not None


@pytest.mark.parametrize("response", ["7.", "= 7", "7 8", "4 + 3", "7 apples", "**7**", ""])
def test_number_not_alone(response: str) -> None:
    assert last_number(response, alone=True) is None


def test_last_number_of_a_long_response_takes_no_time() -> None:
    begin = time.process_time()
    for text in ("9", "1,", "1,234,", "- ", "= ", "1/", "1e", ".", "0x", "$", "=\t"):
        last_number(text * (10**6 // len(text)))
        last_number(text * (10**6 // len(text)), alone=True)
    assert time.process_time() - begin < 20


ARITHMETIC = {"string_insertion", "spiral_matrix", "binary_matrix", "n_queens"}
SYMBOLIC = {"simple_integration", "intermediate_integration", "polynomial_multiplication", "puzzle24", "countdown"}


@pytest.mark.parametrize("name", sorted(ARITHMETIC | SYMBOLIC))
def test_answer_that_is_a_program_does_not_run(name: str, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    attack = f'__import__("os").mkdir("{mark}")'
    dataset = library.create_dataset(name, seed=3, size=10)
    entry = dataset[0]
    stored = {"question": entry["question"], "answer": entry["answer"], "entry": json.dumps(inside.pack(entry))}
    row = source._row(source.Problems(name, {}, answer_from="response"), "train", 0, stored)
    assert score(row, attack)["acc"] == 0
    assert not mark.exists()
    # The library alone would have run it.
    dataset.score_answer(attack, entry)
    assert mark.exists()


@pytest.mark.parametrize(
    "answer",
    [
        '__import__("os").mkdir(PATH)',
        "eval(\"__import__('os').mkdir(PATH)\")",
        'exec("import os; os.mkdir(PATH)")',
        "sin(\"__import__('os').mkdir(PATH)\")",
        "Integer(2) + sympify(\"__import__('os').mkdir(PATH)\")",
        "(lambda: __import__('os').mkdir(PATH))()",
        "[__import__('os').mkdir(PATH) for _ in [1]]",
        "f'{__import__(\"os\").mkdir(PATH)}'",
        "(y := __import__('os')).mkdir(PATH)",
        "x.__class__.__init__.__globals__['__builtins__']['__import__']('os').mkdir(PATH)",
        "sqrt.__globals__['__builtins__']['__import__']('os').mkdir(PATH)",
        "getattr(__import__('os'), 'mkdir')(PATH)",
        "lambdify([], 'print', modules=[__import__('os').mkdir(PATH)])",
        "open(PATH, 'w')",
        "__build_class__",
    ],
)
def test_no_program_in_an_expression(answer: str, tmp_path: Path) -> None:
    import sympy

    text = answer.replace(
        "PATH", repr(str(tmp_path / "mark")).replace("'", '"') if "'" not in answer else f"'{tmp_path}/mark'"
    )
    with inside.expressions_only():
        for read_as in (eval, sympy.parse_expr):
            with pytest.raises((ValueError, SyntaxError, TypeError, AttributeError, TokenError)):
                read_as(text)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    "answer", ["sqrt(2)*x", "-log(Abs(x+1))/2 + C", "E**x*sin(pi*x)", "x!", "3*x**2", "max(1, x)", "f(x)"]
)
def test_expressions_are_read_as_before(answer: str) -> None:
    import sympy

    expected = sympy.parse_expr(answer)
    with inside.expressions_only():
        assert sympy.parse_expr(answer) == expected


@pytest.mark.parametrize(
    "answer", ["[1, -2.5, 'a', (None, True)]", " {'a': {1, 2}}", "(3 * (4 - 0x1f)) % 7 << 2", "1 < 2 and not 0"]
)
def test_literals_are_read_as_before(answer: str) -> None:
    expected = eval(answer)
    with inside.expressions_only():
        assert eval(answer) == expected


@pytest.mark.parametrize(
    ("name", "response"),
    [
        ("countdown", "9**9**9**9"),
        ("string_insertion", "9**9**9**9"),
        ("string_insertion", "(" * 100000),
        ("chain_sum", "9" * 10**6),
        ("chain_sum", "1e999999999"),
        ("chain_sum", "\ud800"),
    ],
)
def test_hostile_answer_scores_little_within_the_limit(name: str, response: str) -> None:
    dataset = library.create_dataset(name, seed=3, size=10)
    stored = {"question": "", "answer": dataset[0]["answer"], "entry": json.dumps(inside.pack(dataset[0]))}
    row = source._row(source.Problems(name, {}, answer_from="response"), "train", 0, stored)
    assert score(row, response, seconds=5.0)["acc"] == 0
    assert score(row, dataset[0]["answer"])["acc"] == 1


def test_tags_without_end_are_stopped(chain_sum: dict[str, Any]) -> None:
    # The library's pattern takes time quadratic in their number.
    assert score(chain_sum, "<answer>" * 10**6, seconds=2.0) == {"score": 0, "acc": 0, "answered": 1, "stopped": 1}


def test_row_of_another_task_is_an_error(chain_sum: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match="extra_info has no dataset, settings, entry, answer_from, strict: not a row of"
    ):
        reasoning_gym.compute_score("x", "7", "7", {"index": 0})
    with pytest.raises(ValueError, match="answer_from='anywhere'"):
        reasoning_gym.compute_score("x", "7", "7", {**chain_sum["extra_info"], "answer_from": "anywhere"})


def test_data_set_that_is_gone_is_an_error(chain_sum: dict[str, Any]) -> None:
    row = {**chain_sum, "extra_info": {**chain_sum["extra_info"], "settings": '{"terms": 7}'}}
    with pytest.raises(RuntimeError, match=r"cannot make this row's data set again: --set terms=7: no such setting"):
        score(row, "<answer>7</answer>")


def test_worker_answers_a_long_question() -> None:
    worker = Worker(reasoning_gym.PROGRAM, 4 << 30, 60.0)
    try:
        entry = json.dumps({"question": "", "answer": "7" * 10**6, "metadata": {}})
        question = {"do": "score", "dataset": "spell_backward", "settings": {}, "entry": entry, "tags": False}
        assert worker.ask({**question, "response": "7" * 10**6}, 60.0) == {"score": 1.0, "answered": True}
    finally:
        worker.close()
