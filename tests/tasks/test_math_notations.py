"""The notations that the reward for mathematics reads, and the neighbours that it must not pay."""

from __future__ import annotations

import pytest

from verl_troll.tasks.rewards import math
from verl_troll.tasks.rewards.answers import final_answer


def paid(response: str, truth: str) -> bool:
    result = math.compute_score("x", response, truth, {}, seconds=60.0, workers=1)
    assert result["stopped"] == 0
    return result["score"] == 1


RIGHT: dict[str, list[str]] = {
    # Scientific notation.
    "4.5e33": [
        "4.5\\times 10^{33}",
        "4.5\\times10^{33}",
        "4.5 \\cdot 10^{33}",
        "4.5E33",
        "45e32",
        "4.5\u00d710^33",
        "4.5*10^33",
    ],
    "1.6e-7": [
        "1.6\\times 10^{-7}",
        "1.6E-7",
        "1.6e-07",
        "0.00000016",
        "1.6 \\times 10^-7",
        "$1.6 \\cdot 10^{\u22127}$",
    ],
    "9e11": ["9\\times 10^{11}", "900000000000", "900,000,000,000", "\\frac{9}{10} \\times 10^{12}"],
    "1e-5": ["10^{-5}", "0.00001", "1\\times10^{-5}", "\\frac{1}{100000}", "\\frac{1}{10^5}"],
    "7e37": [
        "7e+37 \\mathrm{erg} \\cdot \\mathrm{s}^{-1}",
        "7 \\times 10^{37}\\text{ erg/s}",
        "3.5 \\cdot 2 \\cdot 10^{37}",
    ],
    "-1.5e-3": ["-1.5 \\times 10^{-3}", "-0.0015", "- 1.5e-3", "\u22120.0015"],
    "1.4903e4": ["14903", "1.4903 \\times 10^{4} \\text{ cm}^{-1}", "14903.0"],
    "(1e-5, 2)": ["(10^{-5}, 2)", "(1\\times 10^{-5}, 2)"],
    # Units, signs and stops.
    "43": [
        "43.",
        "43.\\text{ }",
        "43\\text{ cm}.",
        "43 \\text{ cm}",
        "43\\,\\mathrm{cm}^2",
        "43 cm",
        "43 km/h",
        "43 m/s",
        "43 \\text{ dollars per day}",
        "43 dollars",
        "43 apples",
        "\\$43",
        "$43",
        "43\\$",
        "€43",
        "43€",
        "43.00",
        "+43",
        "\\text{43}",
        "\\mathbf{43}",
        "43\\text{ m}/\\text{s}^2",
        "043",
        "\\boxed{43}",
        "x = 43",
        "n=43.",
        "40 + 3 = 43",
    ],
    "25": ["25\\%", "25%", "25 \\%", "25 percent", "25\\text{ percent}", "25\\text{%}"],
    "73": ["73°", "73^\\circ", "73^{\\circ}", "73 ^ { \\circ }", "73^\\circ\\text{C}", "73 degrees", "73°."],
    "62.5%": ["62.5\\%", "62.5", "62.5%", "0.625", "\\frac{5}{8}", "62.50\\%"],
    "0.25": ["25\\%", "1/4", "\\frac14", ".25", "\\frac{1}{4}"],
    "44^{\\circ}": ["44", "44°", "44 degrees"],
    "1234567": ["1,234,567", "1{,}234{,}567", "1\\,234\\,567", "1 234 567", "1,\\!234,\\!567", "1.234567e6"],
    "7000000": ["7 million", "7\\text{ million}", "\\$7 million"],
    # Fractions and mixed numbers.
    "3.5": ["3 1/2", "3\\frac{1}{2}", "3 \\frac12", "7/2", "3\\,1/2", "\\frac{7}{2}", "\\dfrac{7}{2}"],
    "\\frac{9}{32}": [
        "\\mathbf{\\frac{9}{32}}",
        "\\text{\\frac{9}{32}}",
        "\\underline{9/32}",
        "\\approx \\frac{9}{32}",
        "9/32,",
    ],
    "\\frac{x}{2}": ["\\boldsymbol{\\frac{x}{2}}", "\\frac{x}{2};", "\\text{\\mathbf{x/2}.}"],
    "-\\frac{3}{2}": ["-1.5", "-3/2", "\\frac{-3}{2}", "-1 1/2", "-\\frac32"],
    "-1./3": ["-\\frac{1}{3}", "-1/3"],
    "\\frac{1}{3}": ["0.333333", "0.3333333", "1/3", "2/6"],
    "\\sqrt{2}": ["1.414214", "2^{1/2}", "\\sqrt 2"],
    # Rounded to the digits of the truth, within Minerva's own tolerance.
    "671.02": ["671.02", "671.0203", "671.020"],
    "0.333333": ["1/3", "\\frac13", "0.3333333333"],
    # Other kinds.
    "2 n-1": ["2n-1", "-1+2n"],
    "1,3,5": ["1, 3, 5", "\\{5,3,1\\}", "1, 3 \\text{ and } 5"],
    "(2,4)": ["(2, 4)", "(2.0,\\ 4)"],
    "k=1": ["1", "k = 1", "k = 1.", "k = \\frac{2}{2}", "k = 3 - 2 = 1"],
    "N=n": ["N = n", "n", "N=n."],
    "x \\geq 2$.": ["x \\geq 2.", "x\\ge 2", "2 \\le x"],
    "69$,$84": ["69, 84", "\\{84, 69\\}"],
    "2e - 3": ["2e-3", "2 e - 3", "-3 + 2e"],
    "2^{1009}": ["2^{1009}", "4\\cdot 2^{1007}", str(2**1009)],
    "\\frac{100!}{2^{50}}": ["\\frac{100!}{2^{50}}"],
    "\\text{East}": ["east", "\\text{east}"],
}

WRONG: dict[str, list[str]] = {
    "4.5e33": [
        "4.5\\times 10^{32}",
        "4.6\\times 10^{33}",
        "4.5",
        "4.5\\times 10^{-33}",
        "4500",
        "\\frac{91}{20} \\times 10^{33}",
    ],
    "1.6e-19": [
        "9.1\\times10^{-19}",
        "9.1e-19",
        "1.7\\times 10^{-19}",
        "1.6\\times 10^{-20}",
        "0",
        "\\frac{1}{10^{19}}",
    ],
    "9.1\\times10^{-19}": ["1.6\\times10^{-19}", "\\frac{8}{10^{19}}"],
    "0.0000003": ["0.0000001", "0", "1e-7", "\\frac{1}{10^7}", "0.0000004"],
    "0.0000001": ["0.0000003", "3e-7", "\\frac{3}{10^7}", "\\sqrt{10^{-13}}"],
    "\\frac{1}{2^{80}}": ["\\frac{1}{2^{81}}", "\\frac1{2^{79}}", "0", "2^{-81}"],
    "\\frac{x}{2^{80}}": ["\\frac{x}{2^{81}}"],
    "(\\frac{1}{2^{80}}, 3)": ["(\\frac{1}{2^{81}}, 3)"],
    "\\sqrt{2}\\times 10^{-20}": ["\\sqrt{3}\\times 10^{-20}", "1.5\\times 10^{-20}"],
    "2^{80}": [str(2**80 + 1), "2^{80}+1", "1.2e24"],
    "123456789012345678901": ["123456789012345678902", "123456789012345678901.5", "1.23456789012345678902e20"],
    "1234567": ["1234568", "1234567.4", "1234566.9999"],
    "400000": ["400001", "4.00001e5"],
    "1.2345678": ["1.2345679", "1.2345677"],
    "0.49": ["0.50", "0.48", "0.4901", "0.4899"],
    "671.02": ["671.03", "671.01", "671.028"],
    "7": ["7.0000001", "7.5", "0.7", "70", "-7", "6.9999999"],
    "\\frac{1}{3}": ["0.3", "0.333", "0.33333", "0.333334", "\\frac{1}{4}"],
    "-3": ["3", "-4"],
    "25": ["0.25", "250\\%", "0.25\\%"],
    "0.25": ["25", "0.25\\text{ million}\\cdot 2", "2.5\\%"],
    "62.5%": ["0.625%", "6.25", "62.6%", "6250"],
    "7000000": ["7.1 million", "7 thousand"],
    # White space joins no numbers, and adds none.
    "31/2": ["3 1/2", "3\\,1/2", "3\\frac12"],
    "10": ["1 0", "1\\,0", "1\n0", "1 0.", "1~0"],
    "23": ["2 3", "2\\quad 3"],
    "5": ["2 3", "6=5", "x=6=5", "2+2=5", "4.9=5"],
    "235": ["1 234", "1\\,234"],
    "2": ["3 1/2", "1 1", "1 + 1 = 3"],
    "0": ["1 0", "1 000"],
    "1234": ["12, 34", "12 34", "123 4", "1, 234", "1 2 3 4", "1234 5"],
    "3.5": ["3 .5", "3. 5", "35", "3 5"],
    "0.5": ["0 .5", "0. 5"],
    "(12, 3)": ["(1 2, 3)", "(1, 23)"],
    "\\{1, 23\\}": ["\\{12, 3\\}", "\\{1 2, 3\\}", "\\{1, 2 3\\}"],
    "9": ["6=9", "6 = 9", "6=3=9", "\\frac{1}{2} = 9", "9=6", "\\sqrt{36}=9"],
    # One answer, not several.
    "8": [
        "7 or 8",
        "7 \\text{ or } 8",
        "7, 8",
        "7 | 8",
        "7 \\lor 8",
        "7 \\to 8",
        "7\\;8",
        "7=8",
        "8 \\text{ or 7}",
        "7/8",
        "\\{7, 8\\}",
        "7 \\mid 8",
        "7; 8",
        "(7, 8)",
        "8 xy",
        "8x",
        "8 \\pi",
        "8 squared",
        "8 or seven",
        "8!",
    ],
    "7.6 Z": ["7.6", "7.6 Y"],
    "2e - 3": ["0.002", "2 \\times 10^{-3}"],
    "(2,4)": ["(4,2)", "2,4,6"],
    "k=1": ["k=2", "2", "k=1=2", "m=2"],
    "N=n": ["N=n+1", "n+1"],
    "\\frac{1}{3} E_{1}+\\frac{2}{3} E_{2}": ["\\frac{2}{3} E_{1}+\\frac{2}{3} E_{2}", "\\frac{2}{3}"],
    "1,3,5": ["1,3", "1,3,6", "135", "1.3.5"],
}


@pytest.mark.parametrize(("truth", "answer"), [(truth, answer) for truth in RIGHT for answer in RIGHT[truth]])
def test_honest_notation_is_paid(truth: str, answer: str) -> None:
    assert paid(f"So \\boxed{{{answer}}}.", truth)


@pytest.mark.parametrize(("truth", "answer"), [(truth, answer) for truth in WRONG for answer in WRONG[truth]])
def test_neighbour_is_not_paid(truth: str, answer: str) -> None:
    assert not paid(f"So \\boxed{{{answer}}}.", truth)


MARKED = [
    "#### {}",
    "####{}",
    "#### **{}**",
    "#### ${}$",
    "#### \\boxed{{{}}}",
    "#### Answer: {}",
    "#### {}.",
    "Answer: {}",
    "Answer: **{}**",
    "Answer: \\({}\\).",
    "**Answer**: {}",
    "**Answer:** {}",
    "**Answer: {}**",
    "**Final Answer:** {}",
    "answer: {}",
    "Final answer : {}",
    "ANSWER: {}",
    "Hence FINAL ANSWER: {}",
    "So the answer: {}.",
    "Answer:\n{}",
    "Answer:\n\n{}\n",
    "**Answer:**\n\n{}",
    "**Answer**\n\n{}",
    "### Final Answer\n\n${}$",
    "Answer:\n$$\n{}\n$$",
    "Answer:\n\\[\n{}\n\\]",
    "####\n{}",
    "\\boxed{{{}}}",
    "\\boxed {{{}}}",
    "$\\fbox{{{}}}$",
    "\\[ \\boxed{{\n{}\n}} \\]",
]
AFTER = [
    "",
    "\n\n#### Explanation\nWe added 20 and 23.",
    "\n#### Verification",
    "\n#### 1. Check the sum\n20 + 23 is that.",
    "\n#### Step 2: Check",
    "\n#### Case 1",
    "\nAnswer:",
    "\n\\boxed{}",
    "\nI could box it again: \\boxed{4",
    "\nLet me double check the answer: it is right.",
    "\nAnswer: see the explanation that I gave above.",
    "\n####",
]


@pytest.mark.parametrize("after", AFTER)
@pytest.mark.parametrize("mark", MARKED)
def test_later_mark_without_an_answer_hides_none(mark: str, after: str) -> None:
    response = "First I thought of \\boxed{7}.\n" + mark.format("43") + after
    assert paid(response, "43")
    assert not paid(response, "7")


@pytest.mark.parametrize(
    "truth", ["4.5e33", "-3", "1,234", "62.5\\%", "\\frac{3}{4}", "-\\frac{n+1}{2}", "2 \\sqrt{3}", "2^{k}"]
)
@pytest.mark.parametrize("mark", MARKED)
def test_marks_hold_every_kind(mark: str, truth: str) -> None:
    assert paid(f"It follows.\n{mark.format(truth)}", truth)


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("#### 18 dollars", "18"),
        ("#### 1,234 apples", "1234"),
        ("#### $18.50 per day", "18.50"),
        ("#### 43 (since 20 + 23)", "43"),
        ("#### 7 or 8", "7"),
        ("#### Explanation", None),
        ("#### Step-by-step check: x = 9", None),
        ("#### 1,3,5", "1,3,5"),
        ("#### 12,34", "12,34"),
        ("#### MR=SRMC", "MR=SRMC"),
        ("#### \\lambda_{\\text {red}} / 2", "\\lambda_{\\text {red}} / 2"),
        ("#### 2) Check", "2"),
        ("Answer:", None),
        ("the answer: it is right", "it is right"),
        ("\\boxed 7", "7"),
        ("\\boxed{a \\boxed{b}", "b"),
        ("\\boxed{6} and \\boxed{7", "6"),
        ("Answer: 5\nanswer: 6", "6"),
    ],
)
def test_final_answer(response: str, answer: str | None) -> None:
    assert final_answer(response) == answer


@pytest.mark.parametrize(
    "part", ["1", "1,", "1 ", "1,000", "\\frac", "1/", "e9", "=", "1=", "\\text{", "{", "^", " \\,", "m/", "1 1/"]
)
def test_long_answers_are_read(part: str) -> None:
    for text in (part * (2000 // len(part)), "1" + part * (1999 // len(part)), part * (1990 // len(part)) + "x"):
        assert math.compute_score("x", f"\\boxed{{{text}}}", "7", {}, seconds=5.0, workers=1)["score"] == 0


@pytest.mark.parametrize("answer", ["1e999999999", "1e-999999999", "10^{999999999}", "1" * 1999, "0.1e" + "9" * 1000])
def test_huge_exponents_are_harmless(answer: str) -> None:
    assert math.compute_score("x", f"\\boxed{{{answer}}}", "7", {}, seconds=5.0, workers=1)["score"] == 0
