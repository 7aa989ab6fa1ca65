"""Score the right answers of whole suites in many notations, and wrong ones beside them, with the mathematics reward.

    python -m benchmarks.rewards --data FOLDER [--suite NAME ...] [--limit N] [--examples N] [--markdown]

FOLDER holds ``NAME.jsonl`` for the suites: gsm8k_train, gsm8k_test, minerva_math, amc23, aime24, olympiadbench. Missing
ones are skipped. Beside the reward stands verl's own scorer for the same data source; where verl has none, the one it
uses for MATH-500. Exits with 1 if a right answer was not paid or a wrong one was.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

from verl_troll.tasks import catalog
from verl_troll.tasks.rewards import math

MARKS = {
    "boxed": "So \\boxed{%s}.",
    "boxed, stop inside": "So \\boxed{%s.}",
    "boxed, in dollars": "So \\boxed{$%s$}.",
    "boxed, then #### Verification": "\\boxed{%s}\n\n#### Verification\nIt holds.",
    "#### X": "#### %s",
    "#### **X**": "#### **%s**",
    "#### X, then #### Explanation": "#### %s\n\n#### Explanation\nWe added.",
    "Answer: X": "Answer: %s",
    "Answer: $X$.": "Answer: $%s$.",
    "**Answer**: X": "**Answer**: %s",
    "**Answer:** X": "**Answer:** %s",
    "answer: X": "answer: %s",
    "ANSWER: X": "ANSWER: %s",
    "Answer:, next line": "Answer:\n%s",
}
"""How an answer stands in a response."""


@dataclass(frozen=True)
class Suite:
    """A suite of problems.

    Attributes:
        truth: the ground truth of a row.
        data_source: by which verl finds its scorer.
    """

    truth: Callable[[dict[str, Any]], str]
    data_source: str


def _converted(convert: Callable[[catalog.Row], catalog.Row | None]) -> Callable[[dict[str, Any]], str]:
    def truth(row: dict[str, Any]) -> str:
        made = convert(row)
        assert made is not None
        return str(made["reward_model"]["ground_truth"])

    return truth


def _last_box(row: dict[str, Any]) -> str:
    """The answer of a Minerva row that has none of its own."""
    from verl.utils.reward_score.math_dapo import last_boxed_only_string, remove_boxed

    return str(remove_boxed(last_boxed_only_string(row["solution"])))


MATH_500 = "HuggingFaceH4/MATH-500"
SUITES = {
    "gsm8k_train": Suite(_converted(catalog.gsm8k), "openai/gsm8k"),
    "gsm8k_test": Suite(_converted(catalog.gsm8k), "openai/gsm8k"),
    "minerva_math": Suite(_last_box, MATH_500),
    "amc23": Suite(_converted(catalog.problem_and_answer("amc23")), MATH_500),
    "aime24": Suite(_converted(catalog.problem_and_answer("aime24")), "aime24"),
    "olympiadbench": Suite(_converted(catalog.problem_and_answer("olympiadbench")), MATH_500),
}


def decimal(truth: str) -> Decimal | None:
    """The number that a truth is, if it is an integer, a decimal or in e-notation."""
    return Decimal(truth) if re.fullmatch(r"[-+]?[0-9]+(\.[0-9]+)?([eE][-+]?[0-9]+)?", truth) else None


def right(truth: str) -> Iterator[tuple[str, str]]:
    """Notations of a truth: each one's name, and a response."""
    for name, mark in MARKS.items():
        yield name, mark % truth
    number = decimal(truth)
    if number is None:
        return
    mantissa, _, power = f"{number:E}".partition("E")
    for name, text in {
        "m\\times 10^{n}": f"{mantissa}\\times 10^{{{int(power)}}}",
        "m \\cdot 10^{n}": f"{mantissa} \\cdot 10^{{{int(power)}}}",
        "mEn": f"{mantissa}E{int(power)}",
        "me-0n": f"{mantissa}e{int(power):+03d}",
        "X\\%": f"{truth}\\%",
        "X%": f"{truth}%",
        "X^\\circ": f"{truth}^\\circ",
        "X\u00b0": f"{truth}\u00b0",
        "X \\text{ cm}": f"{truth} \\text{{ cm}}",
        "X\\,\\mathrm{m/s}^2": f"{truth}\\,\\mathrm{{m/s}}^2",
        "X cm": f"{truth} cm",
        "\\$X": f"\\${truth}",
        "x = X": f"x = {truth}",
    }.items():
        yield name, f"So \\boxed{{{text}}}."
    whole, point, places = truth.partition(".")
    if re.fullmatch("-?[0-9]{4,}", whole) and "e" not in places.lower():
        for comma in (",", "{,}", "\\,"):
            text = f"{int(whole):,}".replace(",", comma) + point + places
            yield f"1{comma}234", f"So \\boxed{{{text}}}."
        yield "#### 1,234", f"#### {int(whole):,}{point}{places}"


def wrong(truth: str) -> Iterator[tuple[str, str]]:
    """Neighbours of a truth: each one's name, and a response."""
    number = decimal(truth)
    if number is None:
        digits = [found.start() for found in re.finditer("[0-9]", truth)]
        if not digits:
            yield "X + 1", f"So \\boxed{{{truth}+1}}."
        for name, at in {"first digit": digits[:1], "last digit": digits[-1:]}.items():
            for place in at:
                other = str((int(truth[place]) + 1) % 10)
                yield name, f"So \\boxed{{{truth[:place]}{other}{truth[place + 1 :]}}}."
        return
    step = Decimal(1).scaleb(int(number.as_tuple().exponent))
    for name, neighbour in {
        "last place + 1": number + step,
        "last place - 1": number - step,
        "sign": -number if number else Decimal(1),
        "x 10": number.scaleb(1) if number else Decimal(10),
        "/ 10": number.scaleb(-1) if number else Decimal("0.1"),
    }.items():
        mantissa, _, power = f"{neighbour:E}".partition("E")
        yield name, f"So \\boxed{{{neighbour:f}}}."
        yield f"{name}, \\times", f"So \\boxed{{{mantissa}\\times 10^{{{int(power)}}}}}."
        yield f"{name}, ####", f"#### {neighbour:f}"


@dataclass
class Count:
    """What became of the answers in one notation; ``verl`` are those that verl's scorer pays."""

    tried: int = 0
    paid: int = 0
    verl: int = 0
    verl_alone: int = 0
    examples: list[str] = field(default_factory=list)


def count(
    suite: Suite, truths: Sequence[str], notations: Callable[[str], Iterator[tuple[str, str]]], pay: bool
) -> dict[str, Count]:
    """Score every truth in every notation."""
    from verl.utils.reward_score import default_compute_score

    counts: dict[str, Count] = {}
    for truth, problems in Counter(truths).items():
        for name, response in notations(truth):
            row = counts.setdefault(name, Count())
            paid = math.compute_score("", response, truth, seconds=60.0, workers=1)["score"] == 1
            score = default_compute_score(suite.data_source, response, truth)
            verl = (score["score"] if isinstance(score, dict) else score) > 0
            row.tried += problems
            row.paid += problems * paid
            row.verl += problems * verl
            row.verl_alone += problems * (verl and not paid)
            if paid != pay:
                row.examples.append(f"{truth!r}: {response!r}")
    return counts


def main(given: Sequence[str] | None = None) -> int:
    """Score the suites; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rewards", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER")
    parser.add_argument(
        "--suite", nargs="+", choices=SUITES, default=list(SUITES), metavar="NAME", help=", ".join(SUITES)
    )
    parser.add_argument("--limit", type=int, help="problems of each suite")
    parser.add_argument("--examples", type=int, default=5, help="failures shown for each notation")
    options = parser.parse_args(given)
    status = 0
    for name in options.suite:
        path = options.data / f"{name}.jsonl"
        if not path.is_file():
            print(f"{name}: no {path}\n")
            continue
        with path.open(encoding="utf-8") as lines:
            truths = [SUITES[name].truth(json.loads(line)) for line in lines if line.strip()][: options.limit]
        print(f"{name}: {len(truths)} problems, verl's scorer for {SUITES[name].data_source}\n")
        print("| answer | tried | paid | verl pays | verl alone |\n| --- | ---: | ---: | ---: | ---: |")
        shown: list[str] = []
        for kind, notations, pay in (("right", right, True), ("wrong", wrong, False)):
            counts = count(SUITES[name], truths, notations, pay)
            for notation, row in counts.items():
                cells = (row.tried, row.paid, row.verl, row.verl_alone)
                print(f"| {kind}: `{notation}` | " + " | ".join(f"{cell:,}" for cell in cells) + " |", flush=True)
                shown += [f"    {kind}, {notation}, truth {example}" for example in row.examples[: options.examples]]
                status |= bool(row.examples)
        print("\n" + "\n".join([*shown, ""]), flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
