"""``verl-troll report`` on files that no trainer would write, on mutations of good ones, and on large ones."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import stat
import struct
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks import processes
from benchmarks.attack.attack import Attack, Extent, Outcome
from verl_troll.tools import cli
from verl_troll.tools.report import comparison, metrics, page
from verl_troll.tools.report.errors import ReportError
from verl_troll.tools.report.read import read_runs

HELD_OUT = "val-core/chain/acc/mean@8"
GOOD = "good-arm"


def _row(step: Any, **data: Any) -> str:
    return json.dumps({"step": step, "data": {HELD_OUT: 0.5, **data}}) + "\n"


def _log(path: Path, *lines: str | bytes) -> None:
    path.write_bytes(b"".join(line.encode() if isinstance(line, str) else line for line in lines))


def _record(body: bytes) -> bytes:
    """A record of an event file."""
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    length = struct.pack("<Q", len(body))
    return length + struct.pack("<I", masked_crc32c(length)) + body + struct.pack("<I", masked_crc32c(body))


def _event(step: int, tag: str, value: float) -> bytes:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    event = Event(step=step, summary=Summary(value=[Summary.Value(tag=tag, simple_value=value)]))
    return _record(event.SerializeToString())


def _collected(path: Path, arm: str, steps: Sequence[Any] = (0, 1), success: Any = (0.2, 0.4), **run: Any) -> None:
    described = {"arm": arm, "seed": 0, "task": "chain", **run}
    _log(path, json.dumps({"run": described, "metrics": {"step": steps, HELD_OUT: success}}) + "\n")


def _configured(path: Path, config: str) -> None:
    _log(path, _row(0), _row(1))
    (path.parent / ".hydra").mkdir()
    (path.parent / ".hydra" / "config.yaml").write_text(config)


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


LEFT_OUT, NOTED, READ = "left out", "noted", "read"


@dataclass(frozen=True)
class Kind:
    """A hostile file.

    Attributes:
        expected: whether it is left out (exit status 1), left out as expected or in part (0), or read (0).
        make: writes it.
        file: its name.
    """

    expected: str
    make: Callable[[Path], object]
    file: str = "metrics.jsonl"


_LR = "actor_rollout_ref: {actor: {optim: {lr: %s}}}"
_HUGE = "9" * 5000

_STEPS: dict[str, Any] = {
    "10^30": 10**30,
    "-1": -1,
    "0.5": 0.5,
    "true": True,
    "null": None,
    "1e400": float("inf"),
    "a list": [1],
}


def _with_step(step: Any) -> Callable[[Path], None]:
    return lambda path: _log(path, _row(0), _row(step), _row(2))


KINDS: dict[str, Kind] = {
    "pipe": Kind(LEFT_OUT, os.mkfifo),
    "socket": Kind(LEFT_OUT, lambda path: os.mknod(path, stat.S_IFSOCK | 0o600)),
    "device": Kind(LEFT_OUT, lambda path: path.symlink_to("/dev/zero")),
    "dangling link": Kind(LEFT_OUT, lambda path: path.symlink_to("gone")),
    "link to itself": Kind(LEFT_OUT, _loop),
    "folder of that name": Kind(READ, Path.mkdir),
    "empty": Kind(NOTED, lambda path: _log(path)),
    "zeros": Kind(NOTED, lambda path: _log(path, bytes(5000))),
    "zeros after a step": Kind(NOTED, lambda path: _log(path, _row(0), bytes(5000))),
    "zeros between steps": Kind(LEFT_OUT, lambda path: _log(path, _row(0), bytes(50), _row(1), _row(2))),
    "invalid UTF-8": Kind(LEFT_OUT, lambda path: _log(path, _row(0), b'{"step": 1, "data": {"\xff": 1}}\n', _row(2))),
    "binary": Kind(NOTED, lambda path: _log(path, bytes(range(256)) * 40)),
    "rollouts": Kind(NOTED, lambda path: _log(path, '{"input": "2+2", "output": "4", "step": 1}\n' * 100)),
    "rollouts under verl's names": Kind(
        NOTED, lambda path: _log(path, '{"step": 1, "data": {"input": "2+2"}}\n' * 100)
    ),
    "first line of 40 MB": Kind(NOTED, lambda path: _log(path, "[", "1, " * 14_000_000, "1]\n", _row(0))),
    "UTF-16": Kind(LEFT_OUT, lambda path: _log(path, (_row(0) + _row(1) + _row(2)).encode("utf-16"))),
    "byte-order mark": Kind(READ, lambda path: _log(path, b"\xef\xbb\xbf", _row(0), _row(1))),
    "lone surrogates": Kind(READ, lambda path: _log(path, _row(0, **{"\ud800": 1.0}), _row(1))),
    "metric of 5,000 digits of samples": Kind(READ, lambda path: _log(path, _row(0, **{f"{HELD_OUT}{_HUGE}": 0.1}))),
    "metric of 100,000 characters": Kind(
        READ, lambda path: _log(path, _row(0, **{"val-core/" + "x/" * 50_000 + "mean@1": 0.1}))
    ),
    "metric of markup": Kind(READ, lambda path: _log(path, _row(0, **{"val-core/<script>/mean@1": 0.1}))),
    "100,000 metrics": Kind(READ, lambda path: _log(path, _row(0, **{f"m{n}": 1 for n in range(100_000)}))),
    "20,000 data sources": Kind(
        READ, lambda path: _log(path, _row(0, **{f"val-core/{n}/mean@1": 1 for n in range(20_000)}))
    ),
    "number of 5,000 digits": Kind(
        LEFT_OUT, lambda path: _log(path, _row(0), '{"step": 1, "data": {"x": ' + _HUGE + "}}\n", _row(2))
    ),
    "number of 4,000 digits": Kind(READ, lambda path: _log(path, _row(0, **{"actor/grad_norm": 10**4000}), _row(1))),
    "values of 1e308": Kind(
        READ, lambda path: _log(path, *(_row(n, **dict.fromkeys(metrics.SHOWN, 1e308 * (-1) ** n)) for n in range(5)))
    ),
    "values of 1e38": Kind(
        READ, lambda path: _log(path, *(_row(n, **dict.fromkeys(metrics.SHOWN, 3e38 * (-1) ** n)) for n in range(5)))
    ),
    "success of 1e308": Kind(READ, lambda path: _log(path, *(_row(n, **{HELD_OUT: 1e308}) for n in range(5)))),
    "values of 1e-320": Kind(
        READ, lambda path: _log(path, *(_row(n, **dict.fromkeys(metrics.SHOWN, 1e-320)) for n in range(5)))
    ),
    "values from 1e-45 to 1e38": Kind(
        READ, lambda path: _log(path, *(_row(n, **dict.fromkeys(metrics.SHOWN, 10.0 ** (n - 45))) for n in range(84)))
    ),
    "NaN and infinities": Kind(
        READ,
        lambda path: _log(
            path, *(f'{{"step": {n}, "data": {{"{HELD_OUT}": {v}}}}}\n' for n, v in enumerate(("NaN", "-Infinity")))
        ),
    ),
    **{f"step {text}": Kind(LEFT_OUT, _with_step(value)) for text, value in _STEPS.items()},
    "step 10^12": Kind(READ, lambda path: _log(path, _row(0), _row(10**12))),
    "nested 100,000 deep": Kind(LEFT_OUT, lambda path: _log(path, "[" * 100_000, "]" * 100_000, "\n", _row(1))),
    "value nested 400 deep": Kind(
        LEFT_OUT, lambda path: _log(path, '{"step": 0, "data": {"actor/entropy": ' + "[" * 400 + "]" * 400 + "}}\n")
    ),
    "line of 40 MB": Kind(LEFT_OUT, lambda path: _log(path, _row(0), b" " * 40_000_000)),
    "arm of 100,000 characters": Kind(READ, lambda path: _collected(path, "a" * 100_000)),
    "arm of control characters": Kind(READ, lambda path: _collected(path, "\x1b[31m\x00\u202e\n")),
    "collected step 10^30": Kind(LEFT_OUT, lambda path: _collected(path, "a", steps=[0, 10**30])),
    "collected values of 1e308": Kind(READ, lambda path: _collected(path, "a", success=[1e308, -1e308])),
    "seed of 4,000 digits": Kind(LEFT_OUT, lambda path: _collected(path, "a", seed=10**4000)),
    "learning rate NaN": Kind(LEFT_OUT, lambda path: _collected(path, "a", lr=float("nan"))),
    "learning rate 1e308": Kind(LEFT_OUT, lambda path: _collected(path, "a", lr=1e308)),
    "learning rate 1e-320": Kind(READ, lambda path: _collected(path, "a", lr=1e-320)),
    "bound of infinity": Kind(READ, lambda path: _collected(path, "a", settings={"kl_bound": float("inf")})),
    "settings nested 200 deep": Kind(
        READ, lambda path: _collected(path, "a", settings=json.loads('{"s":' * 200 + "1" + "}" * 200))
    ),
    "600 arms": Kind(
        READ,
        lambda path: _log(
            path,
            *(
                f'{{"run": {{"arm": "a{n % 400}", "seed": {n}}}, "metrics": {{"step": [0], "{HELD_OUT}": [1]}}}}\n'
                for n in range(600)
            ),
        ),
    ),
    "configuration that is no YAML": Kind(LEFT_OUT, lambda path: _configured(path, "a: [")),
    "configuration of a wrong tag": Kind(LEFT_OUT, lambda path: _configured(path, "a: !!int ''")),
    "configuration nested deep": Kind(LEFT_OUT, lambda path: _configured(path, "[" * 5000)),
    "configured rate of a date": Kind(LEFT_OUT, lambda path: _configured(path, _LR % "2026-01-01")),
    "configured rate of infinity": Kind(LEFT_OUT, lambda path: _configured(path, _LR % ".inf")),
    "configured seed of 5,000 digits": Kind(READ, lambda path: _configured(path, f"data: {{seed: 0x{_HUGE}}}")),
    **{
        f"event file: {text}": Kind(expected, make, "events.out.tfevents.1")
        for text, expected, make in (
            ("pipe", LEFT_OUT, os.mkfifo),
            ("dangling link", LEFT_OUT, lambda path: path.symlink_to("gone")),
            ("empty", NOTED, lambda path: _log(path)),
            (
                "cut in a record",
                NOTED,
                lambda path: _log(path, _event(0, HELD_OUT, 0.5), _event(1, HELD_OUT, 0.5)[:-3]),
            ),
            ("zeros at the end", NOTED, lambda path: _log(path, _event(0, HELD_OUT, 0.5), bytes(4096))),
            (
                "a bit flipped",
                LEFT_OUT,
                lambda path: _log(path, b"\x01" + _event(0, HELD_OUT, 0.5)[1:], _event(1, HELD_OUT, 0.5)),
            ),
            ("record that is no event", LEFT_OUT, lambda path: _log(path, _record(b"\xff" * 9), _record(b""))),
            ("record said to have 2^62 bytes", LEFT_OUT, lambda path: _log(path, _long_header(), bytes(100))),
            ("negative step", LEFT_OUT, lambda path: _log(path, _event(-5, HELD_OUT, 0.5))),
            ("step 2^62", LEFT_OUT, lambda path: _log(path, _event(2**62, HELD_OUT, 0.5))),
            ("infinite values", READ, lambda path: _log(path, *(_event(n, HELD_OUT, float("inf")) for n in range(3)))),
            ("not an event file", LEFT_OUT, lambda path: _log(path, b"hello\n" * 100)),
        )
    },
}


def _long_header() -> bytes:
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    length = struct.pack("<Q", 2**62)
    return length + struct.pack("<I", masked_crc32c(length))


def _good(path: Path) -> None:
    lines = [
        {"run": {"arm": GOOD, "seed": seed, "task": "chain"}, "metrics": {"step": [0, 1], HELD_OUT: [0.2, 0.1 * seed]}}
        for seed in range(3)
    ]
    _log(path, *(json.dumps(line) + "\n" for line in lines))


@contextlib.contextmanager
def _opened_by(path: Path) -> Iterator[Callable[[], bool]]:
    """Says whether someone opened a pipe for reading; opens its other end then, so that none waits."""
    end = threading.Event()
    seen = threading.Event()

    def watch() -> None:
        while not end.wait(0.05):
            # Without a reader there is an error.
            with contextlib.suppress(OSError):
                os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
                seen.set()

    watching = threading.Thread(target=watch)
    if path.is_fifo():
        watching.start()
    try:
        yield seen.is_set
    finally:
        end.set()
        if watching.ident:
            watching.join()


def _report(arguments: list[str]) -> tuple[int | str, str]:
    """Exit status, or the exception that escaped, and what stderr got."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            return cli.main(["report", *arguments]), said.getvalue()
        except (Exception, SystemExit) as error:
            return f"{type(error).__name__}: {str(error)[:200]}", said.getvalue()


def _verdict(kind: Kind, folder: Path, report: Callable[[list[str]], tuple[int | str, str]] = _report) -> str:
    """What is wrong, or nothing."""
    (folder / "hostile").mkdir(parents=True)
    _good(folder / "good.jsonl")
    hostile, out = folder / "hostile" / kind.file, folder / "report.html"
    kind.make(hostile)
    with _opened_by(hostile) as was_opened:
        status, said = report([str(folder), "--out", str(out)])
    if was_opened():
        return "it waits for a pipe"
    if status != (1 if kind.expected == LEFT_OUT else 0):
        return f"exit status {status}: {said[-300:]}"
    if kind.expected != READ and f"{folder}/hostile" not in said:
        return f"not named: {said[-300:]}"
    text = out.read_text(encoding="utf-8")
    if GOOD not in text or (kind.expected == LEFT_OUT) != ("Could not be read" in text):
        return "the page does not say it"
    return ""


def files(extent: Extent) -> Outcome:
    """Each kind of hostile file beside a good one, found in a folder."""
    outcome = Outcome()
    names = random.Random(extent.seed).sample(list(KINDS), min(len(KINDS), extent.tries(len(KINDS))))
    for number, name in enumerate(names):
        wrong = _verdict(KINDS[name], extent.folder / str(number))
        outcome.record(not wrong, f"{name}: {wrong}")
    return outcome


def _mutated(content: bytes, dice: random.Random) -> bytes:
    """One to five random changes."""
    parts = bytearray(content)
    for _ in range(dice.randint(1, 5)):
        place = dice.randrange(len(parts) + 1)
        until = min(len(parts), place + dice.choice((1, 1, 2, 8, 60, 500)))
        change = dice.randrange(7)
        if change == 0:
            parts[place:until] = dice.randbytes(until - place)
        elif change == 1:
            del parts[place:until]
        elif change == 2:
            parts[place:place] = parts[place:until]
        elif change == 3:
            parts[place:place] = dice.choice(_TOKENS)
        elif change == 4:
            del parts[place:]
        elif change == 5:
            parts[place:until] = bytes(until - place)
        elif numbers := [(found.start(), found.end()) for found in _NUMBER.finditer(parts)]:
            start, end = dice.choice(numbers)
            parts[start:end] = dice.choice(_TOKENS)
    return bytes(parts)


_NUMBER = re.compile(rb"-?[0-9][0-9.e-]*")
_TOKENS = (
    b"1e308",
    b"-1e308",
    b"1e-320",
    b"1e400",
    b"NaN",
    b"Infinity",
    b"-Infinity",
    b"null",
    b"true",
    b"{}",
    b"[]",
    b"[[[[]]]]",
    b'""',
    b'"\\ud800"',
    b"-1",
    b"0",
    b"0.5",
    b"1" * 30,
    b"7" * 5000,
    b"\n",
    b",",
    b"}",
    b"{",
    b"\x00",
    b"\xff\xfe",
)


def _samples(dice: random.Random) -> dict[str, bytes]:
    """Good files by name."""
    names = [HELD_OUT, *sorted(metrics.SHOWN), "actor/pg_loss"]
    rows = [{"step": step, "data": {name: dice.uniform(0.01, 0.9) for name in names}} for step in range(4)]
    runs = [
        {
            "run": {"arm": arm, "seed": seed, "lr": rate, "task": "chain", "settings": {"kl_bound": 0.05}},
            "metrics": {"step": [0, 1, 2], **{name: [dice.uniform(0.01, 0.9) for _ in range(3)] for name in names}},
        }
        for arm in ("a", "b")
        for rate in (1e-4, 1e-3)
        for seed in range(3)
    ]
    return {
        "metrics.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode(),
        "runs.jsonl": "".join(json.dumps(run) + "\n" for run in runs).encode(),
        "events.out.tfevents.1": b"".join(_event(step, name, 0.5) for step in range(4) for name in names),
    }


PAGE_EVERY = 50
"""A page is written for one of so many mutations; the others are read, and their tables made."""


def fuzz(extent: Extent) -> Outcome:
    """Random changes of good files: they are read, or an error of the report's own says why not."""
    outcome = Outcome()
    dice = random.Random(extent.seed)
    samples = _samples(dice)
    ignore = mock.Mock()
    for number in range(extent.tries(10_000)):
        name = dice.choice(list(samples))
        file = extent.folder / name
        file.write_bytes(_mutated(samples[name], dice))
        try:
            runs = read_runs([file], ignore)
            compared = comparison.compare(runs)
            if number % PAGE_EVERY == 0:
                page.write(compared, runs, extent.folder / "report.html", "", [])
            else:
                for one in compared:
                    with mock.patch.object(page, "pictures", return_value=({}, [])):
                        page.part(one)
        except ReportError:
            wrong = ""
        except Exception as error:
            kept = extent.folder.parent / f"report-fuzz-{extent.seed}-{number}-{name}"
            kept.write_bytes(file.read_bytes())
            wrong = f"{kept}: {type(error).__name__}: {str(error)[:200]}"
        else:
            wrong = ""
        outcome.record(not wrong, wrong)
        file.unlink()
    return outcome


LARGE_BYTES = 2 * 2**30
MEMORY_BYTES = 1.5 * 2**30
"""Of the whole process: less than the file."""
_MEASURED = """
import resource, sys
from verl_troll.tools import cli
status = cli.main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
sys.exit(status)
"""


def large(extent: Extent) -> Outcome:
    """Files of gigabytes: a log with many metrics, one line without an end, a file of zeros."""
    size = max(2**20, round(LARGE_BYTES * extent.scale))
    free = os.statvfs(extent.folder)
    if free.f_bavail * free.f_frsize < 2 * size:
        return Outcome(skipped=f"less than {2 * size / 2**30:.0f} GiB free")
    names = [HELD_OUT, *sorted(metrics.SHOWN), *(f"timing_s/part{number}" for number in range(80))]
    data = json.dumps(dict.fromkeys(names, 0.123456789))

    def log(path: Path) -> None:
        with path.open("w") as stream:
            step = 0
            while stream.tell() < size:
                stream.write(f'{{"step": {step}, "data": {data}}}\n')
                step += 1

    def endless(path: Path) -> None:
        with path.open("w") as stream:
            stream.write("[")
            while stream.tell() < size:
                stream.write("1, " * 2**18)

    def zeros(path: Path) -> None:
        with path.open("wb") as stream:
            stream.truncate(size)

    outcome = Outcome()
    for make, expected in ((log, READ), (endless, NOTED), (zeros, NOTED)):
        folder = extent.folder / make.__name__
        peaks = list[int]()

        def measured(arguments: list[str], peaks: list[int] = peaks) -> tuple[int | str, str]:
            done = processes.run([sys.executable, "-c", _MEASURED, "report", *arguments])
            if done.returncode in (0, 1, 2):
                peaks.append(1024 * int(done.stdout.split()[-1]))
            return done.returncode, done.stderr

        wrong = _verdict(Kind(expected, make), folder, measured)
        (folder / "hostile" / "metrics.jsonl").unlink()
        if not wrong and peaks[0] > MEMORY_BYTES:
            wrong = f"{peaks[0] / 2**20:.0f} MiB of memory"
        outcome.record(not wrong, f"{make.__name__} of {size:,} bytes: {wrong}")
    return outcome


ATTACKS: tuple[Attack, ...] = (
    Attack("report_files", "a hostile file is named, and the page made of the rest", files),
    Attack("report_fuzz", "a mutated file is read, or refused with the report's own error", fuzz),
    Attack("report_large", "files of 2 GiB take less than 1.5 GiB of memory", large),
)
