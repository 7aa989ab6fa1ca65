"""Extracts the final answer from a response, in time linear in its length."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

MAX_LINE = 4000
"""Characters read after ``Answer:`` and ``####``."""
MAX_MARKS = 100
"""Markers looked at, from the last."""
_MARK = re.compile(
    r"""(?P<box> \\{1,2}(?:boxed|fbox)\s*\{ ) | \\{1,2}boxed[ ](?P<bare> -?[\w./]+ ) | \\. | (?P<brace> [{}] )
      | (?P<line> ^[ \t]*(?:\#{1,6}[ ]*|\*\*)(?:Final[ ])?Answer[ ]*(?:\*\*)?[ \t]*$
                | (?<![A-Za-z])Answer[*_]{0,3}[ ]?: )
      | (?P<hashes> \#{4,} )""",
    re.VERBOSE | re.MULTILINE | re.DOTALL | re.IGNORECASE,
)
# What may stand before "answer:" on its line, for it to count as Answer: does.
_BEGINNING = re.compile(r"(?:^|\n)[ \t>#*_-]*(?:(?:the|my|so|final|correct),?[ ])*\Z", re.IGNORECASE)
_LINE = re.compile(rf"[^\n]{{0,{MAX_LINE}}}")
_SPACE = re.compile(r"\s*")
_LEADING = re.compile(
    r"""[ ]?\\?[$\u20ac\u00a3]?[ ]?
        ( [-\u2212]?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)(?!,?[0-9])
          (?: [eE][-+]?[0-9]+ | [ ]?(?:\\times|\\cdot|\u00d7)[ ]?10\^(?:\{-?[0-9]+\}|-?[0-9]+) | [ ]?/[ ]?[0-9]+ )?
          (?: [ ]?\\?% )? )""",
    re.VERBOSE,
)
# Names in a formula (dM/dt, MR = SRMC, sin(x)) are no words.
_WORD = re.compile(r"(?:^|(?<=[\s(]))[A-Za-z]{2,}[.,;:!?]?(?=[\s)]|$)|^[A-Za-z][a-z]{2,}\b(?![.(=^_])")
_PROSE = re.compile(r"(?:(?<![\\A-Za-z])(?:[A-Za-z]{2,}|[aI])[^A-Za-z\\${}]+){4}[A-Za-z]{2}")
_HEADING = re.compile(r"[0-9]+[.)][ ]+[^0-9]*[A-Za-z]{2}")
# A sign belongs to a number unless an operand stands before it; set apart, it does only after = or :.
_SIGNED = re.compile(
    r"""(?: (?<=[=:])[ \t]*[-+\u2212][ \t]* | (?<![A-Za-z0-9_.)\]}%])[-+\u2212] )?
        \\?[$\u20ac\u00a3]?
        (?: (?<![A-Za-z0-9_])(?<![0-9]\.)
            (?: 0[xX][0-9a-fA-F]+ | 0[bB][01]+
              | [0-9]+/[0-9]+
              | (?: [0-9]{1,3}(?:,[0-9]{3})+(?![0-9]) | [0-9]+ ) (?:\.[0-9]+)? (?:[eE][-+]?[0-9]+)? )
          | (?<![A-Za-z0-9_.])\.[0-9]+(?:[eE][-+]?[0-9]+)? )""",
    re.VERBOSE,
)


def final_answer(response: str) -> str | None:
    r"""The text of the last marker that has one: ``\boxed{``, ``Answer:`` in any case, or ``####``.

    The tasks' prompts ask for these forms. ``Answer:`` and ``####`` are followed by the rest of their line, or by the
    next one if that is empty; ``####`` by a formula, or by a number and then perhaps words. A sentence (``Answer: see
    the text above``), a heading (``#### 1. Check``) and ``answer:`` within a sentence count only if nothing else does.

    Returns:
        The answer without enclosing dollar signs, asterisks and a final full stop; None without one.
    """
    doubtful: dict[int, str] = {}
    for mark in sorted(_marks(response), reverse=True)[:MAX_MARKS]:
        text, doubt = _text(response, mark)
        if text and not doubt:
            return text
        if text:
            doubtful.setdefault(doubt, text)
    return doubtful[min(doubtful)] if doubtful else None


class _Mark(NamedTuple):
    position: int
    kind: str
    begin: int
    end: int
    """Of what a box holds; else -1."""


def _marks(response: str) -> Iterator[_Mark]:
    open_braces: list[tuple[int, int]] = []
    for found in _MARK.finditer(response):
        position, end, kind = found.start(), found.end(), found.lastgroup
        if kind == "box":
            open_braces.append((position, end))
        elif found["brace"] == "{":
            open_braces.append((-1, end))
        elif found["brace"] == "}" and open_braces:
            position, begin = open_braces.pop()
            if position >= 0:
                yield _Mark(position, "box", begin, found.start())
        elif kind == "bare":
            yield _Mark(position, "box", found.start("bare"), end)
        elif kind in ("line", "hashes"):
            yield _Mark(position, kind, end, -1)


def _text(response: str, mark: _Mark) -> tuple[str | None, int]:
    """The text of a mark, and how doubtful it is."""
    if mark.kind == "box":
        return response[mark.begin : mark.end].strip(), 0
    text = ""
    line = _LINE.match(response, mark.begin)
    for _ in range(3):
        assert line is not None
        text = _bare(line.group())
        if text:
            break
        # A display's opening may take a line of its own; a heading is no answer.
        line = _LINE.match(response, _SPACE.match(response, line.end()).end())  # type: ignore[union-attr]
        if line is None or line.group().startswith("#"):
            break
    if mark.kind == "hashes":
        return _formula(text)
    start = max(mark.position - 40, 0)
    prominent = response[mark.position].isupper() or _BEGINNING.search(response[start : mark.position])
    return text, 2 * bool(_PROSE.search(text)) + (0 if prominent else 1)


def _bare(line: str) -> str:
    line = re.sub(r"^\\[\[(]\s*|\s*\\[\])]$", "", line.strip().strip("*$_` ").rstrip(".").strip("*$_` "))
    return line.rstrip(".").strip("*$_` ")


def _formula(text: str) -> tuple[str | None, int]:
    """What ``####`` may be followed by."""
    number = _LEADING.match(text)
    if number and (number.end() == len(text) or _WORD.search(text)):
        return number.group(1).replace(",", ""), 2 * bool(_HEADING.match(text))
    if not _WORD.search(text) and re.search(r"[0-9\\=]|^[A-Za-z]$", text):
        return text, 0
    # A formula and its explanation.
    return (text if re.match(r"\S*[=\\]", text) else None), 2


def last_number(response: str, *, alone: bool = False) -> str | None:
    """The last number of a response: an integer, decimal, fraction ``3/4``, ``1e-3``, ``0x1f`` or ``0b101``.

    A minus between two operands is no sign, and digits in a name (``x2``) are no number.

    Args:
        alone: the number must be the whole response, but for space around it.

    Returns:
        The number without thousands separators, currency and plus sign, with an ASCII minus; None without one.
    """
    found: re.Match[str] | None = None
    if alone:
        found = _SIGNED.fullmatch(response.strip())
    else:
        for found in _SIGNED.finditer(response):  # noqa: B007
            pass
    return re.sub(r"[,+\s$\\\u20ac\u00a3]", "", found.group()).replace("\u2212", "-") if found else None
