"""Numbers as people and models write them, by their exact value; and answers as math-verify can read them.

math-verify reads a space between two numbers as a sum or a product (``1 234`` as 235), and compares decimals to an
absolute number of places, so numbers are read here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import accumulate
from math import trunc

MAX_EXPONENT = 5000
"""A number with a larger exponent is not read."""
MIN_PLACE = Fraction(1, 10**6)
"""The last place that a decimal must state to stand for a fraction."""
TOLERANCE = Fraction(1, 10**5)
"""Relative tolerance for decimals: that of Minerva's own scorer."""

_DIGITS = r"(?:[0-9]{1,3}(?:(?:,|\{,\}|\ )[0-9]{3})+(?![0-9])|[0-9]+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.[0-9]*)?|\.[0-9]+)"
_TIMES = r"\ ?(?:\\times|\\cdot|[\u00d7\u00b7\u22c5*])"
_FRACTION = r"""\\[dtc]?frac\ ?(?:\{\ ?(?P<minus>-?)\ ?(?P<top>[0-9]+)\ ?\}|(?P<top_digit>[0-9]))
                \ ?(?:\{\ ?(?P<bottom>[0-9]+)\ ?\}|(?P<bottom_digit>[0-9]))"""
# A unit's name, alone or in braces; then what LaTeX sets upright, which holds no number but an exponent.
_UNIT = r"""(?:[cmk]?m|[mkµμ]?g|m?s|m?l|ft|in|mi|lb|oz|hr?|min|mph|km/?h|Hz|k?eV|k?J|kcal|mol|rad|deg|N|W|V|A|K|C|F)"""
_UPRIGHT = r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|hbox|operatorname)\ ?\{[^{}0-9]*[23]?\}"
_POWER = r"(?:\ ?\^\ ?(?:\{\ ?-?[0-9]\ ?\}|-?[0-9])|[²³])?"
_UNITS = rf"""(?:\ ?(?:\\cdot|[/·*])?\ ?
              (?:{_UPRIGHT}{_POWER} | \{{?~?\b{_UNIT}\b\}}?{_POWER} | \\(?:AA|mu|Omega|degree)(?![a-zA-Z]) | °
               | (?:\{{\ ?\}})?\^\ ?\{{?\ ?(?:\\circ|\\prime|')\ ?(?:\\prime)?\ ?\}}? | [€£¥₹] ))"""
# Words after an answer, but not those that make it another number.
_NOT_WORDS = r"""sin|cos|tan|cot|sec|csc|log|exp|mod|gcd|lcm|max|min|sqrt|inf|and|not|plus|minus|times|over|than|squared
                |cubed|factorial|half|dozen|hundred|zero|one|two|three|four|five|six|seven|eight|nine|ten|maybe|possibly"""
_WORDS = rf"(?:\ (?!(?:{_NOT_WORDS})s?\b)[A-Za-z]{{3,}}|\ of|\ a|\ {_UNIT}\b){{1,5}}"
_SCALES = {"%": -2, "percent": -2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SCALE = rf"""(?:\\?%|\b(?:{"|".join(list(_SCALES)[1:])})\b)"""

_NUMBER = re.compile(
    rf"""(?P<sign>[-+]?)\ ?[€£¥₹]?\ ?
    (?: (?:(?P<whole>{_DIGITS})\ ?)? {_FRACTION}
      | (?:(?P<whole_before>{_DIGITS})\ )? (?P<above>[0-9]+\.?[0-9]*)\ ?/\ ?(?P<below>[0-9]+)(?![0-9.])
      | (?P<decimal>{_DECIMAL}) (?: [eE](?P<exponent>[-+]?[0-9]+)
          | {_TIMES}\ ?10\ ?(?:\^|\*\*)\ ?
            (?:\{{\ ?(?P<power>[-+]?\ ?[0-9]+)\ ?\}}|(?P<bare_power>[-+]?[0-9]+)) )?
      | 10\ ?\^\ ?(?:\{{\ ?(?P<ten_power>[-+]?\ ?[0-9]+)\ ?\}}|(?P<ten_digit>[0-9])(?![0-9])) )
    (?P<scale>\ ?{_SCALE}|\ ?\\(?:text|mathrm|mbox)\ ?\{{\ ?{_SCALE}\ ?\}})?
    (?P<units>(?:{_UNITS}){{0,8}}) (?P<words>(?:{_WORDS})?)""",
    re.VERBOSE,
)
_AROUND = re.compile(
    r"\\(?:text|textbf|textit|mathbf|mathrm|mbox|boldsymbol|bm|underline|boxed|fbox)\ ?\{(.*)\}", re.DOTALL
)
_TOGETHER = re.compile(r"(?<![\^_0-9.])[0-9.]*[0-9.]\ +[0-9.]|[0-9]\.[0-9]+\.[0-9]")


@dataclass(frozen=True)
class Number:
    """A number as it was written.

    Attributes:
        value: its value, without ``scale``.
        place: what one unit of a decimal's last digit is worth; None for an integer or a fraction, which are exact.
        scale: 1/100 for per cent, 10^6 for a million; otherwise 1.
        unit: whether a unit or words stand after it.
    """

    value: Fraction
    place: Fraction | None
    scale: Fraction = Fraction(1)
    unit: bool = False


def spaced(text: str) -> str:
    r"""An answer with one kind of space and minus, without dollar signs, a final stop and ``\mathbf{}`` around it."""
    text = re.sub(r"\\!|\\?\$|\\(?:displaystyle|left|right)(?![a-zA-Z])", "", text)
    text = re.sub(r"(?<!\\)\\[,;:\ ]|(?<!\\)\\(?:q?quad|thinspace|enspace)(?![a-zA-Z])|~|\s", " ", text)
    text = re.sub(r"\ +", " ", text.replace("\u2212", "-").replace("\u2013", "-"))
    for _ in range(3):
        text = re.sub(r"^(?:\\approx(?![a-zA-Z])|\u2248)|(?<![.\s])\ ?(?:\.{1,2}|[,;])$", "", text.strip()).strip()
        inner = _AROUND.fullmatch(text)
        # The last brace must close the first.
        if (
            not inner
            or not re.search(r"[0-9\\]", inner[1])
            or min(accumulate({"{": 1, "}": -1}.get(one, 0) for one in inner[1])) < 0
        ):
            break
        text = inner[1]
    return text


def same_text(first: str, second: str) -> bool:
    """Whether two answers have the same characters, but for space that separates no numbers."""
    first, second = (re.sub(r"(?<![0-9.])\ |\ (?![0-9.])", "", spaced(text)) for text in (first, second))
    return first == second


def read_number(text: str, *, words: bool = False) -> Number | None:
    r"""The number that a text is: ``-1,234.5``, ``3\frac{1}{2}``, ``4.5\times 10^{33}``, ``1.6e-7``, ``62.5\%``,
    ``73^\circ``, ``\$18``, ``5 \text{ cm}^2``.

    Args:
        text: the text.
        words: also with words after it: ``18 dollars per day``.

    Returns:
        None if it is anything else.
    """
    text = spaced(text)
    found = _NUMBER.fullmatch(text)
    if found is None or (found["words"] and not words):
        return None
    number = _value(found)
    return number and replace(number, unit=bool(found["units"] or found["words"]))


def _value(found: re.Match[str]) -> Number | None:
    scale = Fraction(1)
    if found["scale"]:
        scale = Fraction(10) ** next(power for name, power in _SCALES.items() if name in found["scale"])
    sign = -1 if found["sign"] == "-" else 1
    bottom = found["bottom"] or found["bottom_digit"] or found["below"]
    if bottom:
        top = Fraction(found["top"] or found["top_digit"] or found["above"].rstrip("."))
        whole = _plain(found["whole"] or found["whole_before"] or "0")
        if not int(bottom) or (found["minus"] and found["whole"]):
            return None
        return Number(sign * (-1 if found["minus"] else 1) * (Fraction(whole) + top / int(bottom)), None, scale)
    exponent = next(
        (found[name] for name in ("exponent", "power", "bare_power", "ten_power", "ten_digit") if found[name]), "0"
    )
    if len(exponent) > 6 or abs(int(exponent.replace(" ", ""))) > MAX_EXPONENT:
        return None
    power = Fraction(10) ** int(exponent.replace(" ", ""))
    digits = _plain(found["decimal"] or "1")
    places = len(digits.partition(".")[2])
    value = sign * Fraction(digits.rstrip(".") if digits[0] != "." else f"0{digits}") * power
    exact = found["decimal"] is None or (not places and exponent == "0")
    return Number(value, None if exact else power / 10**places, scale)


def _plain(digits: str) -> str:
    return re.sub(r"[,{}\ ]", "", digits)


def same_number(truth: Number, answer: Number) -> bool:
    """Whether an answer is the true number.

    Integers must be equal. A decimal is the true one if it rounds to it at the truth's last digit and within
    :data:`TOLERANCE`; it is a true fraction if it has six decimals and about five digits, and all are right. Per cent
    and ``million`` are factors or units: 25% is 25 and 0.25.
    """
    if truth.scale != answer.scale and _same(_scaled(truth), _scaled(answer)):
        return True
    return (truth.scale == answer.scale or 1 in (truth.scale, answer.scale)) and _same(truth, answer)


def rounds(number: Number, last: Number) -> bool:
    """Whether a side of an equation can be its last side: the same, rounded to it (``1/3 = 0.33``) or in a unit."""
    return number.unit or same_number(last, number) or abs(number.value - last.value) <= (last.place or 0) / 2


def is_shortened(text: str) -> bool:
    """Whether dots stand for a part of it."""
    return re.search(r"\\[lc]?dots|\.\.\.|\u2026", text) is not None


def latex(number: Number) -> str:
    """A number for math-verify, without its scale: ``7/2``, or ``16E-8`` for a decimal."""
    if number.place is None:
        return str(number.value)
    power = len(str(number.place.numerator)) - len(str(number.place.denominator))
    return f"{number.value / number.place}E{power}"


def _scaled(number: Number) -> Number:
    return Number(number.value * number.scale, number.place and number.place * number.scale)


def _same(truth: Number, answer: Number) -> bool:
    true, value, place = truth.value, answer.value, answer.place
    if true == value:
        return True
    if true.denominator == value.denominator == 1:
        return False
    if truth.place is not None:
        return abs(value - true) <= min(truth.place / 2, abs(true) * TOLERANCE)
    if place is None or place > min(MIN_PLACE, abs(true) * TOLERANCE * 10):
        return False
    return value / place in (round(true / place), trunc(true / place))


def sides(text: str) -> list[str]:
    """The sides of an equation; the whole text if it is none, or more than one."""
    depth, begin, found = 0, 0, []
    for sign in re.finditer(r"\\.|[{}()\[\]]|,|;|(?<![<>!:=])=(?!=)", text):
        character = sign.group()
        depth += (character in ("{", "(", "[")) - (character in ("}", ")", "]"))
        if depth == 0 and character in (",", ";"):
            return [text]
        if depth == 0 and character == "=":
            found.append(text[begin : sign.start()])
            begin = sign.end()
    found.append(text[begin:])
    return found if all(side.strip() for side in found) else [text]


def for_math_verify(text: str) -> str | None:
    r"""A text as math-verify reads it: ``1.6E-7``, groups of digits together, mixed numbers with ``\frac``.

    Returns:
        None if a space still separates numbers.
    """
    text = re.sub(r"\\frac\ ?([0-9])\ ([0-9])", r"\\frac{\1}{\2}", spaced(text))
    # Text with numbers is no unit: 7 \text{ or 8}.
    text = re.sub(r"(?<=.)\\(?:text|mbox|mathrm)\ ?\{([^{}]*[0-9][^{}]*)\}", r" \1 ", text)
    text = re.sub(r"(?<![0-9.,])[0-9]{1,3}(?:\ [0-9]{3})+(?![0-9])", lambda found: found.group().replace(" ", ""), text)
    text = re.sub(r"(?<![0-9.])([0-9]+)\ ([0-9]+)\ ?/\ ?([0-9]+)(?![0-9.])", r"\1\\frac{\2}{\3}", text)
    text = re.sub(r"(?<=[0-9])[eE]\+?(?=-?[0-9])", "E", text)
    return None if _TOGETHER.search(text) else text
