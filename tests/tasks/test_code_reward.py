"""The reward for programs: what counts as right, and how outputs are compared."""

from __future__ import annotations

import json
import math
import sys
import textwrap
from decimal import Decimal
from typing import Any

import pytest

from benchmarks.processes import run
from verl_troll.tasks.rewards import code
from verl_troll.tasks.rewards.cases import exact_json, read_cases, same_text, same_value


def score(source: str, inputs: list[Any], outputs: list[Any], function: str | None = None, **settings: Any) -> float:
    truth = {"inputs": inputs, "outputs": outputs} | ({"fn_name": function} if function else {})
    result = code.compute_score("taco", f"So:\n```python\n{source}\n```", json.dumps(truth), {}, **settings)
    assert result["acc"] == result["score"]
    return result["score"]


@pytest.mark.parametrize(
    "source",
    [
        "a, b = map(int, input().split())\nprint(a + b)",
        "import sys\nprint(sum(map(int, sys.stdin.read().split())))",
        "import sys\nif __name__ == '__main__':\n    print(sum(map(int, open(0).read().split())))\n    sys.exit(0)",
        "import numpy\nprint(numpy.array(input().split(), int).sum())",
        "import sys, threading\nsys.setrecursionlimit(10**6)\nthreading.stack_size(1 << 27)\n"
        "def f(n): return n and f(n - 1)\n"
        "def main():\n    f(50000)\n    print(sum(map(int, input().split())))\n"
        "t = threading.Thread(target=main)\nt.start()\nt.join()",
    ],
    ids=["input", "stdin", "main", "numpy", "thread with a large stack"],
)
def test_right_program_scores_one(source: str) -> None:
    assert score(source, ["1 2\n", "40 2\n"], ["3\n", "42\n"]) == 1


def test_one_wrong_output_scores_zero() -> None:
    assert score("print(3)", ["1 2\n", "40 2\n"], ["3\n", "42\n"]) == 0


@pytest.mark.parametrize(
    ("source", "arguments", "output"),
    [
        ("def f(a: List[int], k): return sorted(a)[:k]", [[3, 1, 2], 2], [1, 2]),
        ("def f(a, k): return sorted(a)[:k]", "[3, 1, 2]\n2", "[1, 2]"),
        (
            "class Solution:\n    def f(self, a, k): print('noise'); return tuple(sorted(a)[:k])",
            [[3, 1, 2], 2],
            [[1, 2]],
        ),
        ("def f(): return 'text'", [], "text"),
        ("def f(): return {1: 0.1 + 0.2}", [], {"1": 0.3}),
        ("import sys\nsys.set_int_max_str_digits(0)\ndef f(): return int('9' * 10000)", [], "9" * 10000),
        ("import numpy\ndef f(): return numpy.arange(3)", [], [0, 1, 2]),
    ],
)
def test_right_function_scores_one(source: str, arguments: Any, output: Any) -> None:
    assert score(source, [arguments], [output], "f") == 1


@pytest.mark.parametrize(
    "source",
    [
        "def f(): return 8",
        "def f(): return '7'",
        "def f(): return [7, 7]",
        "def f(): return float('nan')",
        "def f(): return f",
        "def f(): print(7)",
        "def g(): return 7",
        "def f(): exit(0)",
        "print(7)\nexit(0)",
        "def f():\n    a = 7\n    for _ in range(500): a = [a]\n    return a",
        "class A(int):\n    def __eq__(self, other): return True\ndef f(): return A(8)",
    ],
)
def test_wrong_function_scores_zero(source: str) -> None:
    assert score(source, [[]], [7], "f") == 0


@pytest.mark.parametrize(
    "source",
    [
        "print(25); exit()",
        "print(25)\nquit(0)",
        "import sys\nprint(25)\nsys.exit()",
        "print(25)\nraise SystemExit",
        "from os import _exit\nprint(25)\n_exit(0)",
        "import os, threading\ndef f():\n    print(25)\n    os._exit(0)\nthreading.Thread(target=f).start()\ninput()",
        "def main():\n    print(25)\nexit(main())",
    ],
)
def test_program_that_exits_after_the_right_output_scores_one(source: str) -> None:
    assert score(source, [""], ["25"]) == 1


@pytest.mark.parametrize(
    "source",
    [
        "print(25); exit(1)",
        "print(25); exit('text')",
        "import os\nprint(25)\nos._exit(1)",
        "import os\nprint(25)\nos.abort()",
        "exit()\nprint(25)",
        "print(2, end='')\nexit()\nprint(5)",
    ],
)
def test_exit_with_an_error_or_before_the_output_scores_zero(source: str) -> None:
    assert score(source, [""], ["25"]) == 0


@pytest.mark.parametrize("leave", ["exit()", "quit()", "sys.exit()", "os._exit(0)"])
@pytest.mark.parametrize("output", [7, None, "", []])
def test_function_that_was_not_called_scores_zero(leave: str, output: Any) -> None:
    """Whether the exit is at the top level, in the function or in its class."""
    for source in (
        f"def f(): return {output!r}\nprint({output!r})\n{leave}",
        f"def f():\n    print({output!r})\n    {leave}",
        f"class Solution:\n    def __init__(self): {leave}\n    def f(self): return {output!r}",
    ):
        assert score(f"import os, sys\n{source}", [[]], [output], "f") == 0


# As docs/tasks.md lists them.
NAMES = """
heapq heappush heappop heapify nlargest math inf gcd comb sqrt ceil isqrt lru_cache cache reduce cmp_to_key partial
accumulate product permutations combinations chain groupby zip_longest defaultdict deque Counter OrderedDict namedtuple
List Optional Dict Tuple Set Any Union bisect bisect_left insort string ascii_lowercase re collections itertools
functools operator itemgetter add xor random randint statistics median copy deepcopy datetime timedelta json loads io
StringIO sys maxsize stdin setrecursionlimit typing
"""


@pytest.mark.parametrize("function", [None, "f"])
def test_names_of_graders_are_there(function: str | None) -> None:
    body = f"len([{', '.join(NAMES.split())}])"
    source = f"def f(): return {body}" if function else f"print({body})"
    assert score(source, [[]] if function else [""], [len(NAMES.split())], function) == 1


@pytest.mark.parametrize(
    "expression",
    [
        "pow(3, 2, 7)",
        "open is __builtins__['open'] and 2",
        "(datetime.datetime(2024, 1, 3) - datetime.datetime(2024, 1, 1)).days",
        "bisect.bisect_left([1, 2, 3], 3)",
        "len(copy.copy([1, 2]))",
        "random.randint(2, 2)",
        "Counter('aab')['a'] * isinstance(Counter(), dict) if type(Counter()) is Counter else 0",
        "exit and quit and 2",
    ],
)
def test_provided_names_hide_no_built_in_and_no_module(expression: str) -> None:
    assert score(f"def f(): return {expression}", [[]], [2], "f") == 1


def test_definitions_of_the_program_win() -> None:
    source = """
from random import random as gcd
def product(a): return a[0] * a[1]
class Solution:
    def f(self):
        inf = 3
        return product([inf, heapq.heappop([2])]) * (gcd() < 1)
"""
    assert score(source, [[]], [6], "f") == 1


def test_recursion_may_be_as_deep_as_an_input_is_long() -> None:
    assert score("def f(n): return n and 1 + f(n - 1)", [[30000]], [30000], "f") == 1


def test_10000_digits_are_compared_exactly() -> None:
    assert score("print('9' * 10000)", [""], ["9" * 10000]) == 1
    assert score("print('9' * 9999 + '8')", [""], ["9" * 10000]) == 0


PROGRAM = "n = int(input())\nif n:\n    print(n * n)\n"


@pytest.mark.parametrize(
    "response",
    [
        "So:\n```python\n{}```\nIt prints\n```\n25\n```",
        "1. So:\n   ```python\n   n = int(input())\n   print(n * n)\n   ```\n2. Run it.",
        "```python\nn = int(input())\nprint(n * n)```\nUsage:\n```bash\npython solution.py\n```",
    ],
)
def test_program_among_other_text_scores_one(response: str) -> None:
    truth = json.dumps({"inputs": ["5"], "outputs": ["25"]})
    assert code.compute_score("x", response.format(PROGRAM), truth)["score"] == 1


def test_function_beside_its_usage_scores_one() -> None:
    response = "```python\ndef f(n): return n * n\n```\nUsage:\n```python\nprint(f(5))\n```"
    truth = json.dumps({"fn_name": "f", "inputs": [[5]], "outputs": [25]})
    assert code.compute_score("x", response, truth)["score"] == 1


SQUARE = json.dumps({"inputs": ["5\n"], "outputs": ["25\n"]})
FUNCTION = json.dumps({"fn_name": "f", "inputs": ["5"], "outputs": ["25"]})
# Response and ground truth, and what verl's scorer and this one give.
BESIDE_VERL = {
    "a block": (f"```python\n{PROGRAM}```", SQUARE, 1, 1),
    "output after it": (f"```python\n{PROGRAM}```\nOutput:\n```\n25\n```", SQUARE, 1, 1),
    "in a list": ("1. It:\n" + textwrap.indent(f"```python\n{PROGRAM}```\n", "   "), SQUARE, 1, 1),
    "after text": (f"Code:```python\n{PROGRAM}```", SQUARE, 1, 1),
    "on one line": ("```python print(int(input())**2)```", SQUARE, 1, 1),
    "no closing fence": (f"```python\n{PROGRAM}", SQUARE, 1, 1),
    "names": ("```python\nn = int(stdin.readline())\nprint(reduce(mul, [n, n]))\n```", SQUARE, 1, 1),
    "names for a function": (
        "```python\ndef f(n): return heapq.heappop([n * comb(n, 1)])\n```",
        FUNCTION,
        1,
        1,
    ),
    "deep recursion": ("```python\ndef f(n, k=5000): return f(n, k - 1) if k else n * n\n```", FUNCTION, 1, 1),
    "sys.exit": (f"```python\nimport sys\n{PROGRAM}sys.exit()\n```", SQUARE, 1, 1),
    # docs/tasks.md says why.
    "no fence": (PROGRAM, SQUARE, 1, 0),
    "error status": (f"```python\nimport sys\n{PROGRAM}sys.exit(1)\n```", SQUARE, 1, 0),
    "exit": (f"```python\n{PROGRAM}exit()\n```", SQUARE, 0, 1),
    "no tag": (f"```\n{PROGRAM}```", SQUARE, 0, 1),
    "usage": ("```python\ndef f(n): return n * n\n```\n```python\nprint(f(5))\n```", FUNCTION, 0, 1),
    # Neither pays.
    "crash": (f"```python\n{PROGRAM}raise ValueError\n```", SQUARE, 0, 0),
    "exit before the function is called": ("```python\ndef f(n): return n * n\nexit()\n```", FUNCTION, 0, 0),
}


@pytest.mark.slow
def test_beside_the_scorer_of_verl() -> None:
    # In a process of its own, since it forks. Of a wrong program it loses its details, and says so.
    program = """
import json, sys
from verl.utils.reward_score import prime_code

def paid(response, truth, *_):
    try:
        return int(prime_code.compute_score(response, truth)[0])
    except UnboundLocalError:
        return 0

print("PAID", json.dumps({name: paid(*row) for name, row in json.loads(sys.argv[1]).items()}))
"""
    done = run([sys.executable, "-c", program, json.dumps(BESIDE_VERL)])
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("PAID "))
    paid = json.loads(line.removeprefix("PAID "))
    for name, (response, truth, verl, ours) in BESIDE_VERL.items():
        assert (paid[name], code.compute_score("x", response, truth)["score"]) == (verl, ours), name


def test_all_tests_together_have_a_limit() -> None:
    truth = json.dumps({"inputs": [""] * 50, "outputs": ["7"] * 50})
    program = "```python\nimport time\ntime.sleep(1)\nprint(7)\n```"
    result = code.compute_score("x", program, truth, total_seconds=2)
    assert (result["score"], result["stopped"]) == (0, 1)


def test_response_without_a_program_is_not_answered() -> None:
    result = code.compute_score("x", "print(7)", json.dumps({"inputs": [""], "outputs": ["7"]}))
    assert result == {"score": 0, "acc": 0, "answered": 0, "stopped": 0}


@pytest.mark.parametrize(
    ("got", "expected", "same"),
    [
        ("1 2\n3\n", "1 2 3", True),
        ("1", "1\n", True),
        ("1", "2", False),
        ("1", "1 1", False),
        ("Yes", "YES", False),
        # An integer: the same digits, or a fraction or an exponent of exactly that value.
        ("998244352.5", "998244353", False),
        ("998244353.0000001", "998244353", False),
        ("998244353.0", "998244353", True),
        ("100000001", "100000000", False),
        ("3.0", "3", True),
        ("3.", "3", True),
        ("2.9999999999999996", "3", False),
        ("1e-12", "0", False),
        ("-0.0", "0", True),
        ("1e+16", "1" + "0" * 16, True),
        ("9007199254740992.0", "9007199254740993", False),
        ("1.0e400", "1" + "0" * 400, True),
        ("1.0000000000000001e400", "1" + "0" * 400, False),
        ("1" * 5000 + ".0", "1" * 5000, True),
        ("1" * 4999 + "2.0", "1" * 5000, False),
        ("1e999999", "1", False),
        ("1e-999999", "0", False),
        ("1e99999999999999999999", "0", False),
        ("1e-99999999999999999999", "0", False),
        # Digits that are not written as an integer is: text.
        ("0011", "11", False),
        ("11", "0011", False),
        ("11.0", "0011", False),
        ("+3", "3", False),
        ("3.0", "+3", False),
        ("-0", "0", False),
        # A number with a fraction or an exponent: 1e-6 relatively, and never as far as another integer or half.
        ("0.33333334", "0.333333333", True),
        ("0.334", "0.333", False),
        ("2.9999999999999996", "3.0", True),
        ("3", "3.0", True),
        ("3", "3.00", True),
        ("100000", "1e5", True),
        ("998244352.5", "998244353.0", False),
        ("998244354", "998244353.0", False),
        ("998244353.5", "9.98244353e8", False),
        ("998244353.0000001", "998244353.0", True),
        ("1000000", "1000000.5", False),
        ("1000001.0", "1000000.5", False),
        ("1.0000000000000002e+16", "1e+16", True),
        ("1e-12", "0.0", True),
        ("-0.0", "0.0", True),
        ("-0.5", "0.5", False),
        ("1.0e999", "1e999", True),
        ("2e999", "1e999", False),
        ("inf", "1e999", False),
        ("1e999", "0.5", False),
        # Not numbers: text.
        ("nan", "nan", True),
        ("nan", "0.5", False),
        ("inf", "inf", True),
        ("Infinity", "inf", False),
        ("0.5", "nan", False),
        ("1_0.5", "10.5", False),
        ("1_0", "10", False),
        ("\u0663", "3", False),
        ("\u0663.0", "3", False),
        ("\u0663.5", "3.5", False),
        ("0x10", "16", False),
        ("0b1.0", "1", False),
        ("0.5j", "0.5", False),
        ("(3+0j)", "3", False),
        ("1,000", "1000", False),
        ("True", "1", False),
        ("1", "True", False),
        ("3/1", "3", False),
        ("1d2", "1e2", False),
        ("3.0.", "3", False),
        (".", "0", False),
        ("e5", "0", False),
        pytest.param("1" * 10**6 + "x", "5", False, id="million digits and a letter"),
    ],
)
def test_same_text(got: str, expected: str, same: bool) -> None:
    assert same_text(got, expected) is same


@pytest.mark.parametrize(
    ("got", "expected", "same"),
    [
        (7, 7, True),
        (7.0, 7, True),
        (-0.0, 0, True),
        (998244352.5, 998244353, False),
        (998244353.0000001, 998244353, False),
        ([1, (2, 998244352.5)], [1, [2, 998244353]], False),
        ({"a": [998244352.5]}, {"a": [998244353]}, False),
        ({"a": [998244353.0]}, {"a": [998244353]}, True),
        (2.0**53, 2**53 + 1, False),
        (1e22, 10**22, True),
        (1e23, 10**23 + 1, False),
        (math.inf, 10**400, False),
        (0.1 + 0.2, 0.3, True),
        (3, 3.0, True),
        (2.9999999999999996, 3.0, True),
        (998244352.5, 998244353.0, False),
        (998244354, 998244353.0, False),
        (1000000, 1000000.5, False),
        (1e16 + 2, 1e16, True),
        (10**400, 0.5, False),
        (math.inf, math.inf, True),
        (math.inf, 1e308, False),
        (1e308, math.inf, False),
        (math.nan, 0.5, False),
        (0.5, math.nan, False),
        (True, 1, False),
        (1, True, False),
        (1.0, True, False),
        (False, 0.0, False),
        (True, True, True),
        (None, 0, False),
        (0, None, False),
        ("7", 7, False),
        (7, [7], False),
        ("7.0", "7", False),
        ("0.30000001", "0.3", False),
        ({1: 2}, {"1": 2}, True),
        ({1.0: 2}, {"1": 2}, False),
    ],
)
def test_same_value(got: Any, expected: Any, same: bool) -> None:
    """As JSON carries them: tuples become lists, and keys text."""
    assert same_value(exact_json(json.dumps(got)), exact_json(json.dumps(expected))) is same


@pytest.mark.parametrize(
    ("form", "output"),
    [
        ("{}", 998244353),
        ("{}", "998244353"),
        ("{}", [998244353]),
        ("({},)", [[998244353]]),
        ("{{'a': [{}]}}", {"a": [998244353]}),
        ("numpy.array([{}])", "[998244353]"),
    ],
)
def test_function_does_not_earn_an_integer_by_a_fraction(form: str, output: Any) -> None:
    for value, right in {"998244352.5": 0, "998244353.0": 1, "998244353": 1}.items():
        assert score(f"import numpy\ndef f(): return {form.format(value)}", [[]], [output], "f") == right


def test_program_does_not_earn_an_integer_by_a_fraction() -> None:
    assert score("print(998244352.5)", [""], ["998244353"]) == 0
    assert score("print(998244353.0)", [""], ["998244353"]) == 1


def test_same_value_of_large_integers_is_exact() -> None:
    assert same_value(exact_json("9" * 5000), Decimal("9" * 5000))
    assert not same_value(exact_json("9" * 5000), Decimal("9" * 4999 + "8"))
    assert not same_value(True, Decimal(1))


@pytest.mark.parametrize(
    "truth",
    [
        "",
        "[]",
        "7",
        '{"inputs": []}',
        '{"inputs": [], "outputs": []}',
        '{"inputs": [1], "outputs": [1, 2]}',
        "null",
    ],
)
def test_unreadable_ground_truth_is_an_error(truth: str) -> None:
    with pytest.raises(ValueError, match="ground_truth is not JSON with the lists 'inputs' and 'outputs'"):
        read_cases(truth)


def test_expected_value_that_cannot_be_read_is_an_error_and_not_unanswerable() -> None:
    with pytest.raises(ValueError, match="4300 digits"):
        read_cases({"fn_name": "f", "inputs": [[]], "outputs": [10**5000]})
