"""Attacks on the rewards: numbers that are nearly right, and programs and system calls against the sandbox."""

from __future__ import annotations

import decimal
import errno
import json
import math
import os
import platform
import random
import re
import sys
from collections.abc import Callable, Sequence
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

from benchmarks.attack.attack import Attack, Extent, Outcome
from verl_troll.tasks.rewards import cases, sandbox

PAIRS = 200_000
PROGRAMS = 20


def reward_numbers(extent: Extent) -> Outcome:
    """Random expected numbers, each with an output that is nearly or exactly it; first compared, then in programs."""
    from verl_troll.tasks.rewards import code

    chance = random.Random(extent.seed)
    outcome = Outcome()
    for _ in range(extent.tries(PAIRS)):
        expected, got, nest = _pair(chance)
        printed = cases.same_text(f"1 {got}\nx", f"1 {expected}\nx")
        returned = cases.same_value(cases.exact_json(nest(got)), cases.exact_json(nest(expected)))
        for how, paid, right in (
            ("printed", printed, _is_right(got, expected, Fraction)),
            ("returned", returned, _is_right(got, expected, _as_json)),
        ):
            if right is not None:
                outcome.count(1, [] if paid == right else [f"{got} {how} for {expected}: {paid}"])
    for _ in range(extent.tries(PROGRAMS)):
        expected, got, nest = _pair(chance)
        program = f"print('{got}')"
        truth: dict[str, object] = {"inputs": [""], "outputs": [expected]}
        right = _is_right(got, expected, Fraction)
        if chance.random() < 0.5:
            program = f"import json\ndef f(): return json.loads('{nest(got)}')"
            truth = {"fn_name": "f", "inputs": [[]], "outputs": [nest(expected)]}
            right = _is_right(got, expected, _as_json)
        if right is not None:
            paid = code.compute_score("", f"```python\n{program}\n```", json.dumps(truth))["score"] == 1
            outcome.record(paid == right, f"{program!r} for {truth['outputs']}: {paid}")
    return outcome


NESTS: list[Callable[[str], str]] = ["{}".format, "[1, {}]".format, '{{"a": [[{}], "x"]}}'.format, "[[[{}]]]".format]


def _pair(chance: random.Random) -> tuple[str, str, Callable[[str], str]]:
    """An expected number, an output, both also in JSON's grammar, and what to put them into as JSON."""
    size = 10 ** chance.choice([1, 3, 9, 10, 16, 17, 22, 40])
    whole = chance.choice([chance.randrange(size), 2 ** chance.randrange(1, 130), 998244353, size])
    expected = str(whole * chance.choice([1, -1]))
    if chance.random() < 0.4:
        fraction = chance.choice(["0", "5", "25", "000001", str(chance.randrange(10**6))])
        expected += chance.choice([f".{fraction}", f"e{chance.randrange(-12, 3)}"])
    return expected, chance.choice([_rewritten, _shifted, _computed])(expected, chance), chance.choice(NESTS)


def _rewritten(number: str, chance: random.Random) -> str:
    """The same value in another notation."""
    value = Decimal(number)
    return chance.choice([f"{value:f}", f"{value:e}", f"{value:f}" + ("0" if "." in f"{value:f}" else ".0")])


def _shifted(number: str, chance: random.Random) -> str:
    """Another value, with all its digits."""
    with decimal.localcontext(decimal.Context(prec=200)):
        value = Decimal(number)
        step = chance.choice([Decimal(text) for text in ("1", "0.5", "0.05", "1e-7", "1e-15")])
        step = chance.choice([step, value * step / 1000])
        return f"{value + step * chance.choice([1, -1]):f}"


def _computed(number: str, chance: random.Random) -> str:
    """A float near it, as Python prints it."""
    value = float(number)
    return repr(chance.choice([value, math.nextafter(value, math.inf), value * (1 + 1e-9), value + 1, value - 0.5]))


def _is_right(got: str, expected: str, read: Callable[[str], Fraction]) -> bool | None:
    """By exact fractions; None so close to the tolerance's edge that a float's rounding decides."""
    distance = abs(read(got) - read(expected))
    if _is_whole(expected):
        # Two integers are the same only if their digits are.
        return distance == 0 and not (_is_whole(got) and got != expected)
    if distance == 0:
        return True
    size = abs(read(expected))
    tolerance = max(size / 10**6, Fraction(1, 10**9))
    if size < 2**53:
        tolerance = min(tolerance, Fraction(1, 10))
    near = tolerance / 10 + 2 * Fraction(math.ulp(float(expected)))
    return None if abs(distance - tolerance) < near else distance < tolerance


def _is_whole(text: str) -> bool:
    return re.fullmatch("-?[0-9]+", text) is not None


def _as_json(text: str) -> Fraction:
    return Fraction(text if _is_whole(text) else float(text))


def sandbox_programs(extent: Extent) -> Outcome:
    """Every hostile program of the tests, run for this process's user and for an ordinary one."""
    from tests.tasks import hostile

    outcome = Outcome()
    names = list(hostile.PROGRAMS)
    random.Random(extent.seed).shuffle(names)
    names = names[: extent.tries(len(names))]
    for another_user in _users():
        who = "an ordinary user" if another_user else "this user"
        for name, gained in hostile.gains(names, another_user=another_user).items():
            outcome.record(not gained, f"{name}, for {who}: {'; '.join(gained)}")
    return outcome


def sandbox_calls(extent: Extent) -> Outcome:
    """System calls by their numbers: all that are not allowed are made in the sandbox, with random arguments."""
    from tests.tasks import hostile

    chance = random.Random(extent.seed)
    names = _names(platform.machine())
    calls = [
        (number, *(chance.choice(ARGUMENTS) for _ in range(6)))
        for number in range(1024)
        if names.get(number, "") not in ALLOWED and number not in FATAL
        for _ in range(extent.tries(20))
    ]
    for number, name in names.items():
        for _ in range(extent.tries(100) if name in CONDITIONS else 0):
            arguments = _arguments(chance)
            if not CONDITIONS[name](arguments):
                calls.append((number, *arguments))
    program = (
        "import ctypes\n"
        "call = ctypes.CDLL(None, use_errno=True).syscall\n"
        f"for values in {calls!r}:\n"
        "    ctypes.set_errno(0)\n"
        f"    if call(*map(ctypes.c_long, values)) != -1 or ctypes.get_errno() != {errno.ENOSYS}:\n"
        "        print(values)\n"
    )
    source = extent.folder / "calls.py"
    source.write_text(program)
    outcome = Outcome()
    for another_user in _users():
        answer = hostile.as_another_user([sys.executable, "-c", RUN, str(source)]) if another_user else _answer(source)
        ended, output, errors = json.loads(answer)
        who = "an ordinary user" if another_user else "this user"
        outcome.count(len(calls), [f"for {who}, call {line} was not refused" for line in output.splitlines()])
        if ended != "finished":
            outcome.count(0, [f"for {who}, the program {ended} before the last call: {errors[-300:]}"])
    return outcome


RUN = """
import sys
from pathlib import Path
from benchmarks.attack.rewards import _answer
print(_answer(Path(sys.argv[1])))
"""


def _answer(source: Path) -> str:
    """A program's end, output and errors in the sandbox, as JSON."""
    run = sandbox.run(source.read_text(), limits=sandbox.Limits(processor_seconds=60, wall_seconds=600))
    return json.dumps([run.ended, run.output.decode(), run.errors])


def _users() -> tuple[bool, ...]:
    """Whether to run as another user: as this one, and if this is root then as both."""
    from tests.tasks import hostile

    return (False, True) if hostile.CAN_BE_ANOTHER_USER else (False,)


def sandbox_filters(extent: Extent) -> Outcome:
    """The filter of each machine, run in a simulation on random calls."""
    from tests.tasks import bpf

    chance = random.Random(extent.seed)
    outcome = Outcome()
    for machine, architecture in bpf.AUDIT_ARCH.items():
        program, names = sandbox.system_call_filter(machine), _names(machine)
        for _ in range(extent.tries(100_000)):
            any_number = chance.randrange(-(2**31), 2**31)
            number = chance.choice([chance.randrange(512), chance.choice(list(names)), any_number])
            arguments, name = _arguments(chance), names.get(number, "")
            right = name in ALLOWED and (name not in CONDITIONS or CONDITIONS[name](arguments))
            passed = bpf.decide(program, architecture, number, *arguments) == bpf.ALLOW
            outcome.record(passed == right, f"{name or number}{arguments} on {machine}: {passed}")
    return outcome


NOT_READING = os.O_ACCMODE | os.O_CREAT | os.O_TRUNC
CONDITIONS: dict[str, Callable[[Sequence[int]], bool]] = {
    "open": lambda values: not values[1] & NOT_READING,
    "openat": lambda values: not values[2] & NOT_READING,
    # CLONE_THREAD
    "clone": lambda values: bool(values[0] & 0x10000),
    "prlimit64": lambda values: values[0] == 0,
    "fcntl": lambda values: values[1] in (0, 1, 2, 3, 4, 1030),
    "ioctl": lambda values: values[1] in (0x5401, 0x5421, 0x541B, 0x5451),
}
"""When calls are allowed that are not always."""
ALLOWED = {*sandbox.ALLOWED_CALLS.split(), *CONDITIONS}
ARGUMENTS = [0, 1, -1, 2, 3, 8, 17, 4096, -100, 0x10000, 1 << 31, 1 << 62, os.O_CREAT, os.O_TRUNC, os.O_TMPFILE]
ARGUMENTS += [1030, 0x5401, 0x541B, 0x5412, 0x10100, 0x541B + (1 << 32)]
FATAL = {335, 336} if platform.machine() == "x86_64" else set()
"""Calls of the kernel's own probes: made by others, they end the program whatever the filter says."""


def _arguments(chance: random.Random) -> list[int]:
    return [chance.choice([chance.choice(ARGUMENTS), 1 << chance.randrange(63)]) for _ in range(6)]


def _names(machine: str) -> dict[int, str]:
    """The names of the calls that this module knows, by their numbers."""
    import pyseccomp

    architecture = getattr(pyseccomp.Arch, sandbox.ARCHITECTURES[machine])
    numbers = {pyseccomp.resolve_syscall(architecture, name): name for name in ALLOWED}
    return {number: name for number, name in numbers.items() if number >= 0}


ATTACKS = (
    Attack("reward_numbers", "integers are met exactly, floats within the tolerance", reward_numbers),
    Attack("sandbox_programs", "hostile programs gain nothing, for root and for ordinary users", sandbox_programs),
    Attack("sandbox_calls", "system calls that are not allowed are refused, for both", sandbox_calls),
    Attack("sandbox_filters", "the same by the filters of x86_64 and aarch64, simulated", sandbox_filters),
)
