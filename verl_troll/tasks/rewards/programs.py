"""Finds the program in a response, in time linear in its length."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field

# A fence may follow the marks of block quotes and list items.
_ITEMS = r"[ \t]*(?:(?:[-*+]|[0-9]{1,9}[.)])[ \t]+)*"
_OPENING = re.compile(
    rf"(?P<quotes>(?:{_ITEMS}>)*)(?P<indent>{_ITEMS})(?P<fence>`{{3,}}(?=[^`]*$)|~{{3,}})(?P<info>.*)", re.DOTALL
)
_SPAN = re.compile(r"```(?!`)(?:(?:python|py)[0-9]*\s)?([^`\n]+)```(?!`)", re.IGNORECASE)
_PYTHON = re.compile(r"(?:\{?\s*\.?(?:python|py)[0-9.]*|[\w./-]+\.py)(?![\w+#-])", re.IGNORECASE)
_TAG = re.compile(r"(?:[A-Za-z][\w+#.-]*|\{.*\})?")
_QUOTE = re.compile(r"[ \t]*>[ ]?")
# A session of an interpreter or a shell, which shows how a program is used.
_SESSION = re.compile(r"\s*(?:>>>|\$)[ \t]")
_TAB = 4


@dataclass
class _Block:
    """A fenced block.

    Attributes:
        fence: its opening backticks or tildes.
        info: what follows them.
        quotes: block quotes that it lies in.
        indent: columns before the fence, after the quotes' marks.
        lines: its content without these.
        deeper: number of lines before the first fence too far to the right to close the block.
        closed: whether a fence closed it.
    """

    fence: str
    info: str
    quotes: int
    indent: int
    lines: list[str] = field(default_factory=list)
    deeper: int | None = None
    closed: bool = False

    @property
    def program(self) -> str:
        lines = self.lines if self.closed or self.deeper is None else self.lines[: self.deeper]
        text = "\n".join(lines) + "\n" * (self.closed and bool(lines))
        # Python takes no program whose first line is indented.
        before = text[: len(text) - len(text.lstrip())]
        return textwrap.dedent(text) if before.endswith((" ", "\t")) else text

    @property
    def is_python(self) -> bool:
        return _PYTHON.match(self.info) is not None

    @property
    def rank(self) -> int:
        """How likely it is to be the program, by its tag and first characters."""
        if not self.program.strip() or _SESSION.match(self.program):
            return 0
        return 3 if self.is_python else 1 if self.info else 2


def last_program(response: str, function: str | None = None) -> str | None:
    """The program of a response: the last fenced block tagged as Python, else the last untagged one, else the last one.

    Fences are CommonMark's, of backticks or tildes, also in lists and block quotes; and as models write them, after
    text on the same line. The end of the response closes a block.

    Args:
        function: of several blocks tagged as Python, the last one that defines this function counts.

    Returns:
        The block's content, without the indentation and the quotes' marks before its fence; None without a block.
    """
    blocks = list(_blocks(response))
    if not blocks:
        spans = _SPAN.findall(response)
        return spans[-1].strip() if spans else None
    best = max(block.rank for block in blocks)
    candidates = [block.program for block in blocks if block.rank == best]
    if function is not None:
        defines = re.compile(rf"\b(?:def[ \t]+{re.escape(function)}\b|{re.escape(function)}[ \t]*=)")
        candidates = [program for program in candidates if defines.search(program)] or candidates
    return candidates[-1]


def _blocks(text: str, *, nested: bool = True) -> Iterator[_Block]:
    """The fenced blocks in order; those in a longer fence that is not a program's in place of it."""
    block: _Block | None = None
    for line in text.split("\n"):
        if block is not None:
            restart = _continue(block, line)
            if restart is None:
                continue
            yield from _parts(block, nested)
            block = None
            if not restart:
                continue
        block = _open(line)
    if block is not None:
        yield from _parts(block, nested)


def _parts(block: _Block, nested: bool) -> Iterator[_Block]:
    inner: list[_Block] = []
    if nested and block.fence != "```" and not block.is_python:
        inner = list(_blocks("\n".join(block.lines), nested=False))
    yield from inner or [block]


def _open(line: str) -> _Block | None:
    """The block that a line outside of blocks opens."""
    found = _OPENING.fullmatch(line)
    if found is not None:
        quotes = found["quotes"].count(">")
        before = found["indent"].removeprefix(" " if quotes else "")
        return _Block(found["fence"], found["info"].strip(), quotes, _columns(before))
    _, fence, rest = line.partition("```")
    info = rest.lstrip("`")
    fence += "`" * (len(rest) - len(info))
    opens = bool(fence) and "`" not in info and _TAG.fullmatch(info.strip()) is not None
    return _Block(fence, info.strip(), 0, 0) if opens else None


def _continue(block: _Block, line: str) -> bool | None:
    """Add a line to a block: None if the block goes on, else whether the line that ends it may open another one."""
    for _ in range(block.quotes):
        mark = _QUOTE.match(line)
        if mark is None:
            return True
        line = line[mark.end() :]
    bare = line.strip()
    if bare.startswith(block.fence):
        info = bare.lstrip(block.fence[0]).strip()
        if _columns(line[: len(line) - len(line.lstrip())]) > block.indent + 3:
            if not info and block.deeper is None:
                block.deeper = len(block.lines)
        else:
            block.closed = not info
            # Another tag: this block was not closed. Else: text after the fence.
            return bool(info) and (_TAG.fullmatch(info) is not None or _PYTHON.match(info) is not None)
    elif bare.endswith(block.fence) and block.fence[0] == "`":
        code = line.rstrip().rstrip("`")
        if "```" not in code:
            block.lines.append(_without_indent(code, block.indent))
            block.closed = True
            return False
    block.lines.append(_without_indent(line, block.indent))
    return None


def _columns(space: str) -> int:
    """Where a line stands after this text, with tab stops every four columns."""
    return len(space.expandtabs(_TAB))


def _without_indent(line: str, columns: int) -> str:
    """A line without up to this many columns of white space before it."""
    at = place = 0
    while at < columns and line[place : place + 1] in (" ", "\t"):
        at += 1 if line[place] == " " else _TAB - at % _TAB
        place += 1
    return " " * max(0, at - columns) + line[place:]
