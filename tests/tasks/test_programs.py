"""Which block of a response is the program, and where it ends."""

from __future__ import annotations

import textwrap

import pytest

from verl_troll.tasks.rewards.programs import last_program

PROGRAM = 'def f(n):\n    """Square.\n\n\tn: number\n    """\n    return n * n\n\n\nprint(f(int(input())))\n'
OUTPUT = "Output:\n```\n25\n```\n"


def quoted(text: str) -> str:
    return "".join(f"> {line}\n" if line else ">\n" for line in text.splitlines())


@pytest.mark.parametrize(
    ("response", "program"),
    [
        ("a\n```python\nx\n```\nb", "x\n"),
        ("```python\nx\n```\n```py\ny\n```", "y\n"),
        ("```\nx\n```", "x\n"),
        ("```python\nx", "x"),
        ("x", None),
        ("", None),
        ("```", ""),
    ],
)
def test_last_program(response: str, program: str | None) -> None:
    assert last_program(response) == program


@pytest.mark.parametrize(
    "tag",
    [
        *("python", "py", "python3", "py3", "Python", "PYTHON", " python", "python ", "python\r", "python3.11"),
        *('python title="main.py" linenums="1"', "python {.numberLines}", "{.python}", "{python}", "python:main.py"),
        *("main.py", "src/main.py"),
    ],
)
@pytest.mark.parametrize(
    "after", [OUTPUT, "```text\n25\n```\n", "```bash\npython x.py\n```", "~~~\n25\n~~~", "```\n25"]
)
def test_last_block_tagged_as_python_counts(tag: str, after: str) -> None:
    assert last_program(f"First\n```python\n1\n```\nno:\n```{tag}\n{PROGRAM}```\n{after}") == PROGRAM
    assert last_program(f"First\n~~~{tag}\n{PROGRAM}~~~\n{after}") == PROGRAM


@pytest.mark.parametrize(
    "tag",
    ["pycon", "python-repl", "pytb", "pyx", "javascript", "text", "main.pyx", "main.py-output", "console", "output"],
)
def test_block_with_another_tag_does_not_count_beside_the_program(tag: str) -> None:
    other = f"```{tag}\n25\n```\n"
    assert last_program(f"```python\n{PROGRAM}```\n{other}") == PROGRAM
    assert last_program(f"```\n{PROGRAM}```\n{other}") == PROGRAM
    assert last_program(other) == "25\n"


@pytest.mark.parametrize("tag", ["", "python"])
@pytest.mark.parametrize("other", [">>> f(5)\n25\n", "$ python main.py\n25\n", "\n \n", ""])
def test_session_and_empty_block_do_not_count_beside_the_program(tag: str, other: str) -> None:
    assert last_program(f"```{tag}\n{PROGRAM}```\n```{tag}\n{other}```") == PROGRAM


def test_for_a_function_the_last_block_that_defines_it_counts() -> None:
    define = "def g(n): return n\n"
    usage = "```python\nprint(f(5))\n```\n```python\ndef test_f(): assert f(5) == 25\n```"
    response = f"```python\n{define}```\n```python\n{PROGRAM}```\n{usage}"
    assert last_program(response, "f") == PROGRAM
    assert last_program(response, "g") == define
    assert (
        last_program("```python\nf = lambda n: n * n\n```\n```python\nprint(f(5))\n```", "f") == "f = lambda n: n * n\n"
    )
    assert last_program("```python\nimport x\n```\n```python\nprint(5)\n```", "f") == "print(5)\n"


@pytest.mark.parametrize("fence", ["```", "````", "~~~", "~~~~~"])
@pytest.mark.parametrize(
    "before",
    ["1. Code:\n\n   {}", "- Code:\n    {}", "- a\n  - b\n\n    {}", "\t{}", "          {}"],
)
def test_indentation_of_the_fence_is_removed(before: str, fence: str) -> None:
    space = before.rpartition("\n")[2].partition("{")[0]
    block = textwrap.indent(f"{fence}python\n{PROGRAM}{fence}\n", space)
    assert (
        last_program(f"{before.format('')}{block.removeprefix(space)}2. More.\n\n   {fence}\n   25\n   {fence}")
        == PROGRAM
    )
    cut = block.removeprefix(space).rstrip()[: -len(fence)].rstrip()
    assert last_program(before.format("") + cut) == PROGRAM.rstrip("\n"), "cut off"


@pytest.mark.parametrize(
    ("response", "program"),
    [
        # As far as the fence at most, and lines to its left as they are.
        ("  ```python\n    if x:\n      y\n  ```", "if x:\n  y\n"),
        ("  ```python\nif x:\n  y\n  ```", "if x:\ny\n"),
        ("   ```python\nif x:\n     y\n   ```", "if x:\n  y\n"),
        # Tab stops are four columns apart.
        ("\t```python\n    if x:\n\t\ty\n\t```", "if x:\n\ty\n"),
        ("    ```python\n\tif x:\n\t    y\n    ```", "if x:\n    y\n"),
        ("  ```python\n  if x:\n  \ty\n  ```", "if x:\n\ty\n"),
        # After the mark of a list item.
        ("1. ```python\n   if x:\n       y\n   ```", "if x:\n    y\n"),
        ("- ```python\n  x\n  ```\n- ```\n  25\n  ```", "x\n"),
        # Further than the fence.
        ("```python\n    if x:\n        y\n```", "if x:\n    y\n"),
        ("1. ```python\n    if x:\n        y\n    ```", "if x:\n    y\n"),
    ],
)
def test_lines_lose_the_indentation_of_the_fence(response: str, program: str) -> None:
    assert last_program(response) == program


def test_block_in_a_quote() -> None:
    block = f"```python\n{PROGRAM}```\n"
    assert last_program(quoted(f"Code:\n\n{block}") + OUTPUT) == PROGRAM
    assert last_program(quoted(quoted(block)) + OUTPUT) == PROGRAM
    assert last_program(quoted("1. Code:\n" + textwrap.indent(block, "   ")) + OUTPUT) == PROGRAM
    assert last_program("- > " + quoted(block).removeprefix("> ").replace("\n>", "\n  >")) == PROGRAM
    # The quote's end closes it.
    assert last_program(quoted(f"```python\n{PROGRAM}") + OUTPUT) == PROGRAM.rstrip("\n")


@pytest.mark.parametrize(
    "response",
    [
        # Fences that are not alone on their line.
        "Here it is: ```python\n{}```\n" + OUTPUT,
        "Here `f` is:```\n{}```\n",
        "```python\n{}``` It prints 25.\n" + OUTPUT,
        "```python\n{0}print()```\n" + OUTPUT,
        # Fences that are missing.
        "```python\n{}```text\n25\n```\n",
        "```python\nx = (\n```python\n{}```\n",
        "```python\n{}    ```\nIt prints 25.",
        "```python\n{}    ```\nIt prints\n```text\n25\n```",
        # Fences around and within.
        "````markdown\nCode:\n```python\n{}```\n````\n",
        "```markdown\nCode:\n```python\n{}```\n```\n",
        "~~~\nCode:\n```python\n{}```\n~~~\n",
        "~~~~~~~~\nCode:\n```python\n{}```\n",
        "````python\n{}````\n" + OUTPUT,
        "`````\n{}`````\n",
        "Put it between ``` and ```.\n```python\n{}```\n",
        "Put it into ```python ... ```.\n```\n{}```\n",
        # White space.
        "```python   \n{}```   \n" + OUTPUT,
    ],
)
def test_program_ends_where_the_model_meant(response: str) -> None:
    expected = PROGRAM + "print()" * ("print()```" in response)
    program = last_program(response.format(PROGRAM))
    assert program is not None
    assert program.rstrip("\n") == expected.rstrip("\n")


@pytest.mark.parametrize("fence", ["```", "````", "~~~"])
def test_fences_in_a_program_are_part_of_it(fence: str) -> None:
    inside = f'print("```")\nx = """\n    ```\n    {fence[0]}{fence[0]}\n    ```python\n    """\n# `a` ```b``` `c`\n'
    assert last_program(f"{fence}python\n{inside}{fence}\n" + OUTPUT) == inside


def test_line_ends_of_windows() -> None:
    response = f"```python\n{PROGRAM}```\n{OUTPUT}".replace("\n", "\r\n")
    assert last_program(response) == PROGRAM.replace("\n", "\r\n")


@pytest.mark.parametrize(
    ("response", "program"),
    [("It is ```print(7)```.", "print(7)"), ("```python print(7)```", "print(7)"), ("``` ` ```", None)],
)
def test_program_on_one_line(response: str, program: str | None) -> None:
    assert last_program(response) == program


@pytest.mark.parametrize(
    "unit",
    [
        "`",
        "```",
        "``` ",
        "```\n",
        "```a\n",
        "~~~",
        "x ```",
        " ",
        "\t",
        "> ",
        ">",
        "- ",
        "1. ",
        "{",
        "}",
        "x",
        "``` x` ",
        "\n",
        " \n",
        "    ```\n",
        "```python\n>>> x\n```\n",
        "````\n```\n",
    ],
)
def test_time_is_linear_in_the_length(unit: str) -> None:
    """A quadratic search would take hours."""
    for before, after in (("", ""), ("```python\n", ""), ("```python\n", "x"), ("> ```python\n> ", " y")):
        last_program(before + unit * (200_000 // len(unit)) + after)
