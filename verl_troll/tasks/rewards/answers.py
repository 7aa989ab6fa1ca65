"""Extracts the final answer from a response, in time linear in its length."""

from __future__ import annotations

import re

_BOXED = "\\boxed{"
_NUMBER = re.compile(r"\s*\\?\$?\s*(-?(?:\d[\d,]*)?\.?\d+)")
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
    r"""The text after the last marker ``\boxed{``, ``Answer:`` or ``####``.

    The tasks' prompts ask for these forms. ``####`` is followed by a number, ``Answer:`` by the rest of its line.

    Returns:
        The answer without enclosing dollar signs, asterisks and a final full stop; None without a marker or if a brace
        is not closed.
    """
    position, mark = max((response.rfind(mark), mark) for mark in (_BOXED, "Answer:", "####"))
    if position < 0:
        return None
    begin = position + len(mark)
    if mark == _BOXED:
        return _in_braces(response, begin)
    line = response[begin:].lstrip(" \t").split("\n", 1)[0]
    if mark == "####":
        number = _NUMBER.match(line)
        return number.group(1).replace(",", "") if number else None
    return line.strip().strip("*$ ").rstrip(".").strip("*$ ") or None


def _in_braces(text: str, begin: int) -> str | None:
    depth = 1
    for brace in re.finditer(r"\\.|[{}]", text[begin:], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return text[begin : begin + brace.start()].strip() or None
    return None


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
