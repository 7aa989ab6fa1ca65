"""Makes and scores problems of reasoning-gym, in a process of :mod:`verl_troll.tasks.rewards.worker`.

Several of the library's scorers pass the answer to ``eval``, themselves or through sympy. While they run, ``eval``
takes literals, arithmetic and sympy's expressions, nothing that could run a program (:func:`expressions_only`).

An entry is stored as JSON; :func:`pack` keeps the types that JSON has not, since scorers depend on them.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import dataclasses
import datetime
import enum
import json
import traceback
import typing
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any

Reply = dict[str, Any]

TAG = "!"
"""Key of a packed value's type."""
SEQUENCES: dict[str, Any] = {"tuple": tuple, "set": set, "frozenset": frozenset}
TEXTS: dict[str, Any] = {"Fraction": Fraction, "Decimal": Decimal, "complex": complex}
TIMES: dict[str, Any] = {"datetime": datetime.datetime, "date": datetime.date, "time": datetime.time}


class RefusedError(Exception):
    """A setting, or a problem, that the library or its storage does not allow."""


def pack(value: Any) -> Any:
    """A JSON value from which :func:`unpack` makes an equal one of the same type; NumPy's scalars become Python's.

    Raises:
        RefusedError: there is none.
    """
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if kind is list:
        return [pack(item) for item in value]
    if kind is dict:
        if TAG not in value and all(type(key) is str for key in value):
            return {key: pack(item) for key, item in value.items()}
        return {TAG: "dict", "of": [[pack(key), pack(item)] for key, item in value.items()]}
    if SEQUENCES.get(kind.__name__) is kind:
        return {TAG: kind.__name__, "of": [pack(item) for item in value]}
    if TEXTS.get(kind.__name__) is kind:
        return {TAG: kind.__name__, "of": str(value)}
    if TIMES.get(kind.__name__) is kind:
        return {TAG: kind.__name__, "of": value.isoformat()}
    if kind.__module__ == "numpy" and not getattr(value, "shape", None):
        return pack(value.item())
    raise RefusedError(f"an entry holds a {kind.__module__}.{kind.__qualname__}, which cannot be stored")


def unpack(value: Any) -> Any:
    """The value that :func:`pack` was given."""
    if isinstance(value, list):
        return [unpack(item) for item in value]
    if not isinstance(value, dict):
        return value
    if TAG not in value:
        return {key: unpack(item) for key, item in value.items()}
    name, content = value[TAG], value["of"]
    if name == "dict":
        return {unpack(key): unpack(item) for key, item in content}
    if name in SEQUENCES:
        return SEQUENCES[name](unpack(item) for item in content)
    return TEXTS[name](content) if name in TEXTS else TIMES[name].fromisoformat(content)


EXPRESSION = (
    *(ast.Constant, ast.Tuple, ast.List, ast.Set, ast.Dict, ast.Name, ast.Load, ast.Call, ast.keyword),
    *(ast.UnaryOp, ast.unaryop, ast.BinOp, ast.operator, ast.BoolOp, ast.boolop, ast.Compare, ast.cmpop),
)


def _is_mathematics(value: Any) -> bool:
    import sympy

    if isinstance(value, type):
        return issubclass(value, sympy.Expr)
    return isinstance(value, sympy.Basic) or value in (sympy.sqrt, sympy.cbrt, sympy.root, abs)


@contextlib.contextmanager
def expressions_only() -> Iterator[None]:
    """Replace ``eval`` by one that runs no program."""
    evaluate = builtins.eval

    def screened(source: Any, variables: dict[str, Any] | None = None, local: Any = None, /) -> Any:
        if not isinstance(source, str):
            raise ValueError("not text")
        names = {**(variables or {}), **(local or {})}
        tree = ast.parse(source.strip(), mode="eval")
        for node in ast.walk(tree.body):
            if not isinstance(node, EXPRESSION):
                raise ValueError(f"not an expression: {type(node).__name__}")
            if isinstance(node, ast.Name) and not _is_mathematics(names.get(node.id)):
                raise ValueError(f"not mathematics: {node.id}")
        return evaluate(compile(tree, "answer", "eval"), {"__builtins__": {}}, names)

    builtins.eval = screened
    try:
        yield
    finally:
        builtins.eval = evaluate


def describe(annotation: Any) -> str:
    """A type as messages show it."""
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return f"one of {[member.value for member in annotation]}"
    if typing.get_origin(annotation) is typing.Literal:
        return f"one of {list(typing.get_args(annotation))}"
    if dataclasses.is_dataclass(annotation):
        return f"a mapping with keys of {[field.name for field in dataclasses.fields(annotation)]}"
    if annotation in TIMES.values():
        return f"a {annotation.__name__} in ISO format"
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return f"of type {annotation.__name__}"
    return f"of type {annotation}".replace("typing.", "")


def convert(value: Any, annotation: Any) -> Any:
    """A setting as its type, from what YAML or JSON can hold.

    Raises:
        ValueError: it is not of that type.
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return value
    if origin is typing.Union or type(None) in arguments:
        for option in arguments:
            if (value is None) == (option is type(None)):
                return value if value is None else convert(value, option)
    elif origin is typing.Literal:
        if value in arguments:
            return value
    elif annotation in (tuple, list) or origin in (tuple, list, Sequence):
        if isinstance(value, list):
            of = [argument for argument in arguments if argument is not Ellipsis]
            # The library writes tuple[str] for any number of them.
            of = of if len(of) == len(value) else (of or [Any])[:1] * len(value)
            made = [convert(item, kind) for item, kind in zip(value, of, strict=True)]
            return tuple(made) if tuple in (annotation, origin) else made
    elif dataclasses.is_dataclass(annotation):
        if isinstance(value, dict):
            kinds = typing.get_type_hints(annotation)
            return annotation(**{name: convert(item, kinds.get(name, Any)) for name, item in value.items()})  # type: ignore[operator]
    elif isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return annotation(value)
    elif annotation in TIMES.values():
        if isinstance(value, str):
            return annotation.fromisoformat(value)
    elif annotation is float:
        if type(value) in (int, float):
            return value
    elif annotation in (int, bool, str, dict):
        if type(value) is annotation:
            return value
    else:
        return value
    raise ValueError


class Datasets:
    """The library's data sets, made once for each name and settings."""

    def __init__(self) -> None:
        import reasoning_gym  # noqa: F401  registers the data sets
        from reasoning_gym.composite import CompositeDataset  # noqa: F401
        from reasoning_gym.factory import DATASETS

        self._kinds = DATASETS
        self._made: dict[str, Any] = {}

    def make(self, name: str, settings: dict[str, Any], **more: int) -> Any:
        """A data set.

        Args:
            settings: fields of its configuration, as JSON values.
            more: ``seed`` and ``size``, where they matter.

        Raises:
            RefusedError: no such data set or setting, or the library refuses it.
        """
        if name not in self._kinds:
            raise RefusedError(f"must be one of {', '.join(sorted(self._kinds))}")
        kind, configuration = self._kinds[name]
        annotations = typing.get_type_hints(configuration)
        fields = {field.name: field for field in dataclasses.fields(configuration)}
        own = [field for field in fields if field not in ("seed", "size")]
        given = {}
        for key, value in settings.items():
            shown = f"--set {key}={value if isinstance(value, str) else json.dumps(value)}"
            if key in ("seed", "size"):
                raise RefusedError(f"{shown}: use --seed, --train-size and --test-size")
            if key not in fields:
                raise RefusedError(f"{shown}: no such setting; the settings are {', '.join(own)}")
            try:
                given[key] = convert(value, annotations[key])
            except (ValueError, TypeError, AssertionError) as error:
                # Some annotations are wrong: an int whose default is 0.2.
                if annotations[key] in (int, tuple) and type(value) is type(fields[key].default) in (float, str):
                    given[key] = value
                    continue
                why = f" ({error})" if str(error) else ""
                raise RefusedError(f"{shown}: must be {describe(annotations[key])}{why}") from None
        try:
            made = configuration(**given, **more)
            if hasattr(made, "validate"):
                made.validate()
            return kind(config=made)
        except ImportError:
            raise
        except Exception as error:
            shown = " ".join(f"--set {key}={json.dumps(value)}" for key, value in settings.items()) or "its defaults"
            # Some of the library's assertions have no message.
            reason = str(error) or traceback.extract_tb(error.__traceback__)[-1].line
            defaults = [
                f"{key}={fields[key].default}" for key in own if type(fields[key].default) in (int, float, bool)
            ]
            raise RefusedError(
                f"refuses {shown}: {type(error).__name__}: {reason} (defaults: {', '.join(defaults) or 'none'})"
            ) from error

    def known(self, name: str, settings: dict[str, Any]) -> Any:
        """The same, kept; for scoring, which does not depend on seed and size."""
        key = json.dumps([name, settings])
        if key not in self._made:
            self._made[key] = self.make(name, settings, seed=0)
        return self._made[key]


def load() -> Callable[[Reply], Reply]:
    """Import the library; returns the function that answers the questions below, each named by ``do``."""
    from reasoning_gym.utils import extract_answer

    datasets = Datasets()
    made: Any = None

    def open_(question: Reply) -> Reply:
        """Make a data set with ``seed`` and ``size`` for ``entry``."""
        nonlocal made
        made = datasets.make(question["dataset"], question["settings"], seed=question["seed"], size=question["size"])
        return {}

    def entry(question: Reply) -> Reply:
        """The ``question``, the ``answer`` (None for some) and the whole ``entry`` at an ``index``."""
        try:
            found = made[question["index"]]
        except IndexError:
            return {"end": True}
        except ImportError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise RefusedError(f"cannot make problem {question['index']} with these settings: {reason}") from error
        return {"question": found["question"], "answer": found["answer"], "entry": json.dumps(pack(found))}

    def score(question: Reply) -> Reply:
        """The ``score`` and whether it was ``answered``: None or empty is no answer, and scores 0."""
        dataset = datasets.known(question["dataset"], question["settings"])
        stored = unpack(json.loads(question["entry"]))
        answer = extract_answer(question["response"]) if question["tags"] else question["response"]
        if not answer:
            return {"score": 0.0, "answered": False}
        try:
            with expressions_only():
                return {"score": float(dataset.score_answer(answer, stored)), "answered": True}
        except ImportError:
            raise
        except Exception:
            # Answers that a scorer cannot read are wrong.
            return {"score": 0.0, "answered": True}

    commands = {"open": open_, "entry": entry, "score": score}

    def answer(question: Reply) -> Reply:
        try:
            return commands[question["do"]](question)
        except RefusedError as refused:
            return {"refused": str(refused)}

    return answer
