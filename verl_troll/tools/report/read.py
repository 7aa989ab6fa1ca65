"""Reads runs from verl's file logger, from TensorBoard, or from a file of collected runs, one per line.

Files are read as a stream; of their metrics only those that the report shows are kept.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import re
import reprlib
import stat
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from verl_troll.tools.report import events

INSTALL = "pip install 'verl_troll[report]'"

REWARDS = ("critic/score/mean", "critic/rewards/mean")
ENTROPY = "actor/entropy"
GRAD_NORM = "actor/grad_norm"
PPO_KL = "actor/ppo_kl"
KL_BEFORE, KL_BEFORE_MAX = "troll/kl_before", "troll/kl_before_max"
KL_AFTER, KL_AFTER_MAX = "troll/kl_after", "troll/kl_after_max"
PROJECTED_SHARE = "troll/projected_share"
SUPPORT_SIZE = "troll/support_size"
OLD_KEPT_MASS, NEW_KEPT_MASS = "troll/old_kept_mass", "troll/new_kept_mass"
STEP_SECONDS = "timing_s/step"
RESPONSE_LENGTH = "response_length/mean"
# Not one of verl's: a trainer logs it under a prefix of its own.
DISTINCT_ANSWERS = "distinct_answers"
READ = frozenset(
    (
        *REWARDS,
        ENTROPY,
        GRAD_NORM,
        PPO_KL,
        KL_BEFORE,
        KL_BEFORE_MAX,
        KL_AFTER,
        KL_AFTER_MAX,
        PROJECTED_SHARE,
        SUPPORT_SIZE,
        OLD_KEPT_MASS,
        NEW_KEPT_MASS,
        STEP_SECONDS,
        RESPONSE_LENGTH,
        DISTINCT_ANSWERS,
    )
)

MAX_LINE_BYTES = 32 * 2**20
"""A longer line is refused: parsed, it may take twenty times as much memory."""
MAX_VALUES = 20_000_000
"""Values kept of one file, at about 40 bytes each."""
MAX_RUNS = 100_000
"""Runs of one file of collected runs."""
MAX_CONFIG_BYTES = 16 * 2**20
HEAD_BYTES = 64 * 2**10
HEAD_LINES = 100
"""What a file is looked at to tell whether it is a log at all: bytes of a line, lines."""
MAX_FOREIGN_NAMED = 3
"""Files of other kinds in one folder that are named; of more, the others are counted."""
MIN_LINES_BETWEEN_RESTARTS = 3
"""Fewer, on average, are no resumed run: two runs wrote to the file at once."""
MAX_STEP = 10**12
LARGEST, SMALLEST = 3.4028234663852886e38, 1.401298464324817e-45
"""float32's range, in which verl computes its metrics: a value beyond counts as infinite, one below as 0."""

_HELD_OUT = re.compile(r"val-core/(?P<source>.+?)(?:/(?P<variable>[^/]+))?/mean@(?P<samples>[0-9]+)", re.DOTALL)
_SEED_IN_NAME = re.compile(r"(?:^|[-_. ])seed[-_=]?(\d+)(?=$|[-_. ])", re.IGNORECASE)
_RATE_IN_NAME = re.compile(r"(?:^|[-_ ])lr[-_=]?(\d+(?:\.\d+)?(?:e[-+]?\d+)?)(?=$|[-_ ])", re.IGNORECASE)
_NAMES_OF_NO_ARM = frozenset(("metrics", "tensorboard", "logs"))
_EVENT_FILE = "tfevents"

# verl's settings that distinguish arms, by their short name here.
_SETTINGS = {
    "loss_mode": "actor_rollout_ref.actor.policy_loss.loss_mode",
    "support": "actor_rollout_ref.actor.policy_loss.troll.support",
    "kl_bound": "actor_rollout_ref.actor.policy_loss.troll.kl_bound",
    "alpha": "actor_rollout_ref.actor.policy_loss.troll.alpha",
    "k": "actor_rollout_ref.actor.policy_loss.troll.k",
    "dropped_mass": "actor_rollout_ref.actor.policy_loss.troll.dropped_mass",
    "max_log_ratio": "actor_rollout_ref.actor.policy_loss.troll.max_log_ratio",
    "importance_ratio": "actor_rollout_ref.actor.policy_loss.troll.importance_ratio",
    "step_size_gradient": "actor_rollout_ref.actor.policy_loss.troll.step_size_gradient",
    "one_sided": "actor_rollout_ref.actor.policy_loss.troll.one_sided",
    "clip_ratio_low": "actor_rollout_ref.actor.clip_ratio_low",
    "clip_ratio_high": "actor_rollout_ref.actor.clip_ratio_high",
    "strategy": "actor_rollout_ref.actor.strategy",
    "loss_agg_mode": "actor_rollout_ref.actor.loss_agg_mode",
    "ppo_epochs": "actor_rollout_ref.actor.ppo_epochs",
    "ppo_mini_batch_size": "actor_rollout_ref.actor.ppo_mini_batch_size",
    "entropy_coeff": "actor_rollout_ref.actor.entropy_coeff",
    "use_kl_loss": "actor_rollout_ref.actor.use_kl_loss",
    "rollout": "actor_rollout_ref.rollout.name",
    "samples": "actor_rollout_ref.rollout.n",
    "train_batch_size": "data.train_batch_size",
    "adv_estimator": "algorithm.adv_estimator",
}

Warn = Callable[[str], None]
Note = Callable[["str | _ForeignError"], None]

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200
_MAX_FAULTS_SHOWN = 20


class ReportError(ValueError):
    """The inputs give no report; the message says why and what to do."""


class _ForeignError(ReportError):
    """A file is of another kind; ``note`` says that it is left out."""

    def __init__(self, path: Path, reason: str):
        shown = _shown_path(path)
        super().__init__(f"{shown}{reason}")
        self.path = path
        self.note = f"{shown} is left out: it is neither a log of verl's file logger nor a file of collected runs"


def _several_foreign(folder: Path, errors: Sequence[_ForeignError]) -> _ForeignError:
    """One error for many foreign files of a folder, such as rollouts dumped at each step."""
    names = ", ".join(_shown_path(error.path.name) for error in errors[:MAX_FOREIGN_NAMED])
    which = f": {names} and {len(errors) - MAX_FOREIGN_NAMED} more"
    told = _ForeignError(folder, f"{which} are of another kind; the first: {errors[0]}")
    told.note = (
        f"{_shown_path(folder)}{which} are left out: they are neither logs of verl's file logger nor files of "
        "collected runs"
    )
    return told


@dataclass(frozen=True)
class Series:
    """One metric of one run; ``steps`` increase. Values may be NaN or infinite if they were logged so."""

    steps: tuple[int, ...] = ()
    values: tuple[float, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.steps)

    def finite(self) -> Series:
        """The points whose value is finite."""
        if all(map(math.isfinite, self.values)):
            return self
        return _series(
            {step: value for step, value in zip(self.steps, self.values, strict=True) if math.isfinite(value)}
        )


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        task: what was trained on; empty if unknown.
        arm: the method, e.g. ``vanilla``.
        seed: None if unknown; such a run is never paired.
        lr: the actor's learning rate; None if unknown.
        status: ``diverged``, or another word for how it ended; empty if unknown.
        settings: other settings that distinguish the run, by name.
        metrics: those that the report shows, by verl's metric name.
        section: what it is compared within; runs of different sections are never averaged.
        source: file or folder, as given.
        argument: the command-line argument that it was found under.
        kind: format of the source.
        earlier: ends the arm's name if a later run is in the same file or folder; else empty.
    """

    task: str
    arm: str
    seed: int | None
    lr: float | None
    status: str
    settings: Mapping[str, Any]
    metrics: Mapping[str, Series]
    section: str = ""
    source: str = ""
    argument: str = ""
    kind: str = ""
    earlier: str = ""
    _derived: dict[str, Series] = field(default_factory=dict, repr=False, compare=False)

    def metric(self, *names: str) -> Series:
        """The first named metric that the run has, else an empty series; a name without a prefix matches any."""
        found = (series for name in names for key, series in self.metrics.items() if name in _names(key))
        return next(found, Series())

    def held_out(self) -> Series:
        """Held-out success, averaged over data sources at the steps that measured all of them."""
        if "held_out" not in self._derived:
            self._derived["held_out"] = _average([self.metrics[key] for key in held_out_keys(self.metrics).values()])
        return self._derived["held_out"]

    def kl_bound(self) -> float | None:
        """The projection's KL bound per token, in nats; None for a run without one, or with none that is finite."""
        for name, value in self.settings.items():
            if name.split(".")[-1] == "kl_bound":
                bound = _as_float(value)
                return None if bound is None or not math.isfinite(bound) else bound
        return None


def _names(key: str) -> tuple[str, str]:
    """What a metric is found by: its name with and without prefix."""
    return key, key.rsplit("/", 1)[-1]


def held_out_keys(metrics: Mapping[str, Any]) -> dict[str, str]:
    """The held-out success metric of each data source: the one with most samples, then with the longest name."""
    found: dict[str, tuple[int, str, int, str]] = {}
    for key in metrics:
        match = _HELD_OUT.fullmatch(key)
        if match:
            # Compared as text: Python converts at most 4,300 digits.
            samples = match["samples"].lstrip("0")
            rank = (len(samples), samples, len(key), key)
            found[match["source"]] = max(rank, found.get(match["source"], rank))
    return {source: rank[3] for source, rank in sorted(found.items())}


def _shown_metric(key: str) -> bool:
    """Whether the report shows a metric."""
    return not READ.isdisjoint(_names(key)) or (key.startswith("val-core/") and _HELD_OUT.fullmatch(key) is not None)


def short(value: object) -> str:
    """A value for a message, shortened."""
    try:
        return _SHORT.repr(value)
    except (ValueError, RecursionError):
        return f"{type(value).__name__} too long to show"


def _shown_path(path: str | Path) -> str:
    """A path for a message: as it is, if that fits on a line."""
    text = str(path)
    return text if text.isprintable() and len(text) <= 400 else short(text)


def warn_on_stderr(text: str) -> None:
    """Print a warning."""
    print(f"verl-troll report: {text}", file=sys.stderr)


def read_runs(paths: Sequence[str | Path], warn: Warn = warn_on_stderr, fault: Warn | None = None) -> list[Run]:
    """Every run under ``paths``, in order; of duplicates the later one.

    A file that is damaged or cannot be read is left out as a whole; the others are read.

    Args:
        paths: files, or folders to search; ``NAME=PATH`` sets the arm of every run under PATH.
        warn: called with what is as expected and yet left out, and with what is assumed: incomplete last lines,
            duplicates, files without a run or of another kind, several runs in one place.
        fault: called once for each file that is damaged or cannot be read, with the reason; ``warn`` by default.

    Raises:
        ReportError: there is no run; the message has the faults.
    """
    faults: list[str] = []
    notes: list[str | _ForeignError] = []
    runs = [run for argument in paths for run in _under(str(argument), notes.append, faults.append)]
    for note in notes:
        if isinstance(note, str):
            warn(note)
        elif runs:
            warn(note.note)
    if not runs:
        raise ReportError(_no_run(paths, [*faults, *(str(note) for note in notes if isinstance(note, _ForeignError))]))
    for text in faults:
        (fault or warn)(text)
    kept: dict[object, Run] = {}
    for number, run in enumerate(runs):
        key = number if run.seed is None else _description(run)
        if key in kept:
            former = kept.pop(key).source
            differ = (
                "the fields that tell them apart, such as run.settings"
                if former == run.source
                else "their arms different names with NAME=PATH"
            )
            warn(
                f"{_shown_path(run.source)}: {_words(run)} was read before, from {_shown_path(former)}; the later one "
                f"counts. If the runs differ, give {differ}"
            )
        kept[key] = run
    return list(kept.values())


def _no_run(paths: Sequence[str | Path], faults: Sequence[str]) -> str:
    if not faults:
        return (
            f"no run in {', '.join(map(_shown_path, paths)) or 'no path'}: give metrics.jsonl of verl's file logger, "
            "TensorBoard event files, a file of collected runs, or a folder that holds any of them"
        )
    more = len(faults) - _MAX_FAULTS_SHOWN
    return "\n".join([*faults[:_MAX_FAULTS_SHOWN], *([f"and {more} more"] if more > 0 else [])])


def _description(run: Run) -> tuple[object, ...]:
    settings = json.dumps(run.settings, sort_keys=True, default=str)
    return run.task, run.section, run.arm, run.seed, run.lr, settings


def _words(run: Run) -> str:
    rate = "" if run.lr is None else f", learning rate {run.lr:g}"
    return f"arm {short(run.arm)}, seed {run.seed}{rate}{f', task {short(run.task)}' if run.task else ''}"


def _under(argument: str, note: Note, fault: Warn) -> Iterator[Run]:
    name, path = None, Path(argument)
    try:
        if not argument:
            raise ReportError("'' is no path: give a file or a folder of a run")
        if not os.path.lexists(argument) and "=" in argument:
            name, _, rest = argument.partition("=")
            path = Path(rest)
            if not name or not rest:
                raise ReportError(f"{short(argument)}: an arm is named as NAME=PATH, with neither left out")
        folder = stat.S_ISDIR(_status(path, short(str(path))).st_mode)
    except ReportError as error:
        fault(str(error))
        return
    for run in _in_folder(path, note, fault) if folder else _in_file(path, note, fault):
        yield dataclasses.replace(run, argument=argument, arm=(run.arm if name is None else name) + run.earlier)


def _in_folder(folder: Path, note: Note, fault: Warn) -> Iterator[Run]:
    def unreadable(error: OSError) -> None:
        fault(f"{_shown_path(error.filename)} cannot be searched: {error.strerror}")

    for parent, folders, files in os.walk(folder, onerror=unreadable):
        folders.sort()
        if found := sorted(name for name in files if _EVENT_FILE in name):
            yield from _tensorboard(Path(parent), [Path(parent) / name for name in found], note, fault)
        foreign: list[_ForeignError] = []

        def noted(what: str | _ForeignError, foreign: list[_ForeignError] = foreign) -> None:
            if isinstance(what, str):
                note(what)
            else:
                foreign.append(what)

        for name in sorted(files):
            if name.endswith(".jsonl"):
                yield from _in_file(Path(parent) / name, noted, fault)
        for error in foreign if len(foreign) <= MAX_FOREIGN_NAMED else [_several_foreign(Path(parent), foreign)]:
            note(error)


def _in_file(path: Path, note: Note, fault: Warn) -> Iterator[Run]:
    if _EVENT_FILE in path.name:
        yield from _tensorboard(path, [path], note, fault)
    else:
        yield from _all_or_none(lambda: _runs_in_lines(path, note), path, note, fault)


def _all_or_none(read: Callable[[], Iterable[Run]], path: Path, note: Note, fault: Warn) -> list[Run]:
    """The runs, or none and a fault; a note if the file is of another kind."""
    try:
        return list(read())
    except _ForeignError as error:
        note(error)
    except ReportError as error:
        fault(str(error))
    except OSError as error:
        fault(f"{_shown_path(path)} cannot be read: {error.strerror}")
    except RecursionError:
        fault(f"{_shown_path(path)} is nested too deeply")
    return []


def _status(path: Path, shown: str) -> os.stat_result:
    """What is at ``path``.

    Raises:
        ReportError: nothing, or nothing that can be reached.
    """
    try:
        return os.stat(path)
    except OSError as error:
        if error.errno == errno.ENOENT and os.path.islink(path):
            raise ReportError(f"{shown} is a link to what does not exist") from None
        if error.errno == errno.ENOENT:
            raise ReportError(f"{shown} does not exist: give a file or a folder of a run") from None
        raise ReportError(f"{shown} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ReportError(f"{shown} cannot be read: {error}") from None


def _opened(path: Path) -> BinaryIO:
    """An open file. Others are refused: reading a pipe or a device may never end.

    Raises:
        ReportError: it is none, or cannot be read.
    """
    kind = stat.S_IFMT(_status(path, _shown_path(path)).st_mode)
    if kind != stat.S_IFREG:
        raise ReportError(f"{_shown_path(path)} is {_KINDS.get(kind, 'not a file')}: give a file or a folder of a run")
    try:
        # Were it replaced by a pipe just now, opening would not wait.
        return os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb")
    except OSError as error:
        raise ReportError(f"{_shown_path(path)} cannot be read: {error.strerror}") from None


_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


class _Kept:
    """Counts what is kept of one file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._values = 0

    def more(self, values: int) -> None:
        """Count values.

        Raises:
            ReportError: they are too many.
        """
        self._values += values
        if self._values > MAX_VALUES:
            raise ReportError(
                f"{_shown_path(self._path)} has more than {MAX_VALUES:,} values of the metrics shown: keep fewer steps"
            )


def _runs_in_lines(path: Path, warn: Warn) -> Iterator[Run]:
    lines = _json_lines(path, warn)
    number, first = next(lines, (0, None))
    if not number:
        warn(f"{_shown_path(path)} holds no step: the run ended before its first one")
        return
    line = first if isinstance(first, dict) else {}
    if isinstance(line.get("run"), dict) and isinstance(line.get("metrics"), dict):
        kept = _Kept(path)
        yield _collected(first, f"{_shown_path(path)}:{number}", path, kept)
        for count, (number, line) in enumerate(lines, 2):
            if count > MAX_RUNS:
                raise ReportError(f"{_shown_path(path)} has more than {MAX_RUNS:,} runs: split it")
            yield _collected(line, f"{_shown_path(path)}:{number}", path, kept)
    elif isinstance(line.get("data"), dict) and (_is_step(line.get("step")) or any(map(_shown_metric, line["data"]))):
        yield from _file_logger(number, first, lines, path, warn)
    else:
        raise _foreign(path, number, first)


def _foreign(path: Path, number: int, line: Any) -> _ForeignError:
    got = short(sorted(line)) if isinstance(line, dict) else type(line).__name__
    return _ForeignError(
        path,
        f":{number}: a line has either 'step' and 'data' with metrics (verl's file logger) or 'run' and 'metrics' "
        f"(collected runs), got {got}",
    )


def _may_be_a_log(*lines: bytes) -> bool:
    """Whether lines that cannot be read begin as a log does, in whatever encoding."""
    head = b"".join(line[:HEAD_BYTES].replace(b"\0", b"") for line in lines)
    return any(all(name in head for name in names) for names in ((b'"step"', b'"data"'), (b'"run"', b'"metrics"')))


def _json_lines(path: Path, warn: Warn) -> Iterator[tuple[int, Any]]:
    """Number and content of each line that is not blank."""
    damaged: tuple[int, Exception, bytes] | None = None
    sound = False
    for number, line in _lines(path):
        if damaged and not sound and not _may_be_a_log(damaged[2], line):
            raise _ForeignError(path, f":{damaged[0]}: not JSON ({damaged[1]})")
        if damaged:
            raise ReportError(
                f"{_shown_path(path)}:{damaged[0]}: not JSON ({damaged[1]}): only the last line of an interrupted run "
                "may be damaged; fix or remove the line"
            )
        try:
            value = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            damaged = number, error, line
            continue
        except (ValueError, RecursionError) as error:
            raise ReportError(f"{_shown_path(path)}:{number}: not JSON that can be read ({error})") from None
        sound = True
        yield number, value
    if damaged:
        warn(
            f"{_shown_path(path)}:{damaged[0]}: the last line is damaged and was skipped, as an interrupted run "
            "leaves it"
        )


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    number = 0
    with _opened(path) as stream:
        while line := stream.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                reason = f":{number}: a line of more than {MAX_LINE_BYTES / 2**20:g} MiB is not read"
                if number == 1 and not _may_be_a_log(line):
                    raise _ForeignError(path, reason)
                raise ReportError(f"{_shown_path(path)}{reason}")
            if line.strip():
                yield number, line


class _Points:
    """The points of one metric in the order read; a later one of the same step counts."""

    def __init__(self) -> None:
        self.steps = array("q")
        self.values = array("d")
        self.increase = True

    def add(self, step: int, value: float) -> None:
        if self.steps and step <= self.steps[-1]:
            self.increase = False
        self.steps.append(step)
        self.values.append(value)

    def without(self, first: int) -> _Points:
        """Those of steps before ``first``."""
        kept = _Points()
        for step, value in zip(self.steps, self.values, strict=True):
            if step < first:
                kept.add(step, value)
        return kept


def _as_series(points: dict[str, _Points]) -> dict[str, Series]:
    """The series of each metric; takes the points, which are large, one by one."""
    known: dict[tuple[int, int], list[tuple[int, ...]]] = {}
    found = {}
    for key in list(points):
        one = points.pop(key)
        if one.increase:
            steps, values = tuple(one.steps), tuple(one.values)
        else:
            by_step = dict(sorted(dict(zip(one.steps, one.values, strict=True)).items()))
            steps, values = tuple(by_step), tuple(by_step.values())
        # Most metrics are logged at the same steps.
        alike = known.setdefault((len(steps), sum(steps)), [])
        if (same := next((other for other in alike if other == steps), None)) is None:
            alike.append(steps)
        found[key] = Series(same or steps, values)
    return {key: series for key, series in found.items() if series}


def _file_logger(number: int, line: Any, rest: Iterator[tuple[int, Any]], path: Path, warn: Warn) -> Iterator[Run]:
    """The runs of one log: more than one if logs were joined."""
    runs: list[_Logged] = []
    kept = _Kept(path)
    first, start, read, restarts, named = line, number, 0, 0, False
    latest = -1
    while number:
        where = f"{_shown_path(path)}:{number}"
        if not isinstance(line, dict) or not isinstance(line.get("data"), dict) or not _is_step(line.get("step")):
            raise ReportError(
                f"{where}: expected {{'step': whole number, 'data': {{metric: number}}}}, with a step of at most "
                f"{MAX_STEP:,}"
            )
        step, data = line["step"], {key: value for key, value in line["data"].items() if _shown_metric(key)}
        read += 1
        named = named or not line["data"] or bool(data) or any("/" in key for key in line["data"])
        if not named and read == HEAD_LINES:
            break
        if not runs or step < latest or (step == latest and runs[-1].has(step, data)):
            restarts += 1
            if not runs or step <= runs[-1].first:
                runs.append(_Logged(step))
        latest = step
        for key, value in data.items():
            # verl's logger writes non-finite values as null.
            _add(runs[-1].points, kept, where, key, step, math.nan if value is None else value)
        number, line = next(rest, (0, None))
    if not named:
        raise _foreign(path, start, first["data"])
    if restarts > 3 and read < MIN_LINES_BETWEEN_RESTARTS * restarts:
        raise ReportError(
            f"{_shown_path(path)}: its steps start again {restarts - 1} times in {read} lines: two runs wrote to it at "
            "once; give each run a file of its own"
        )
    found = [metrics for run in runs if (metrics := _as_series(run.points))]
    if not found:
        warn(f"{_shown_path(path)} holds no metric that the report shows")
    if len(found) > 1:
        warn(_several(path, len(found), "its steps start again at or before the first one"))
    for index, metrics in enumerate(found):
        yield dataclasses.replace(_described(metrics, path, "verl's file logger"), earlier=_earlier(index, len(found)))


@dataclass
class _Logged:
    """What one run logged, from step ``first`` on."""

    first: int
    points: dict[str, _Points] = field(default_factory=dict)

    def has(self, step: int, names: Iterable[str]) -> bool:
        """Whether one of the metrics was just logged at ``step``."""
        return any(name in self.points and self.points[name].steps[-1] == step for name in names)


def _earlier(index: int, count: int) -> str:
    """The end of the name of an arm, for one of ``count`` runs in one place; the last has none."""
    if index == count - 1:
        return ""
    return ", earlier run" if count == 2 else f", earlier run {index + 1}"


def _several(path: Path, count: int, why: str) -> str:
    return (
        f"{_shown_path(path)} holds {count} runs: {why}. The last has the arm's name; an earlier one is an arm of its "
        "own, '..., earlier run', described by the same configuration or path. Give each run a folder of its own"
    )


def _add(points: dict[str, _Points], kept: _Kept, where: str, key: str, step: int, value: Any) -> None:
    number = _as_float(value)
    if number is None:
        raise ReportError(f"{where}: {_shown_path(key)} must be a number, got {short(value)}")
    kept.more(1)
    if key not in points:
        points[key] = _Points()
    points[key].add(step, number)


@dataclass
class _EventFile:
    """What one event file holds; ``restart`` is the first step of earlier files that it replaces."""

    path: Path
    points: dict[str, _Points]
    restart: int
    extent: events.Extent


class _Events:
    """One run, in one or more event files."""

    def __init__(self, file: _EventFile):
        self.first, self.last = file.extent.first, file.extent.last
        self.begun, self.ended = file.extent.begun, file.extent.ended
        self.points = file.points
        self.files = [file.path]

    def may_continue_in(self, file: _EventFile) -> bool:
        """Whether ``file`` may be a resumption: it begins after this run's first step, and after its last event."""
        return file.extent.first > self.first and file.extent.begun >= self.ended

    def add(self, file: _EventFile) -> None:
        """Add a resumption."""
        _drop_from(self.points, file.restart)
        for key, more in file.points.items():
            points = self.points.setdefault(key, _Points())
            for step, value in zip(more.steps, more.values, strict=True):
                points.add(step, value)
        self.last, self.ended = max(self.last, file.extent.last), max(self.ended, file.extent.ended)
        self.files.append(file.path)


def _tensorboard(path: Path, files: Sequence[Path], note: Note, fault: Warn) -> Iterator[Run]:
    """The runs whose event files are ``files``, all in or at ``path``."""
    read: list[_EventFile] = []
    for file in files:
        try:
            read.append(_scalars(file, note))
        except ReportError as error:
            fault(str(error))
        except OSError as error:
            fault(f"{_shown_path(file)} cannot be read: {error.strerror}")
    yield from _all_or_none(lambda: _runs_in_events(path, read, note), path, note, fault)


def _runs_in_events(path: Path, files: Sequence[_EventFile], warn: Warn) -> Iterator[Run]:
    """The runs of one folder's event files.

    Raises:
        ReportError: a file may be the resumption of either of two runs.
    """
    runs: list[_Events] = []
    for file in sorted(files, key=lambda file: (file.extent.begun, file.path.name)):
        if not file.extent:
            continue
        former = [run for run in runs if run.may_continue_in(file)]
        former = [run for run in former if file.extent.first <= run.last + 1] or former
        # Of runs one after the other, a checkpoint is the last one's.
        former = [run for run in former if all(other.begun <= run.ended for other in former if other is not run)]
        if len(former) > 1:
            names = " or ".join(_shown_path(run.files[-1].name) for run in former)
            raise ReportError(
                f"{_shown_path(file.path)} may resume the run of {names}: give each run a folder of its own"
            )
        if not former:
            runs.append(_Events(file))
            continue
        if file.extent.first > former[0].last + 1:
            warn(
                f"{_shown_path(file.path)} begins at step {file.extent.first}, and {former[0].files[-1].name} ends at "
                f"step {former[0].last}: read as one resumed run, without the steps between them"
            )
        former[0].add(file)
    found = [(metrics, run.files) for run in runs if (metrics := _as_series(run.points))]
    if not found and files:
        warn(f"{_shown_path(path)} holds no scalar that the report shows: the run ended before its first step")
    if len(found) > 1:
        names = "; ".join(_shown_path(", ".join(file.name for file in run)) for _, run in found)
        warn(_several(path, len(found), names))
    for index, (metrics, run) in enumerate(found):
        described = _described(metrics, path, "TensorBoard")
        source = described.source if len(found) == 1 else str(run[0])
        yield dataclasses.replace(described, earlier=_earlier(index, len(found)), source=source)


def _scalars(file: Path, warn: Warn) -> _EventFile:
    """What an event file holds."""
    shown = _shown_path(file)

    def cut() -> None:
        warn(f"{shown}: the last record is incomplete and was skipped, as an interrupted run leaves it")

    points: dict[str, _Points] = {}
    kept = _Kept(file)
    restart = MAX_STEP + 1
    extent = events.Extent()
    with _opened(file) as stream:
        try:
            for key, step, value in events.scalars(stream, _shown_metric, cut, extent):
                if not key:
                    restart = min(restart, step)
                    _drop_from(points, step)
                elif not _is_step(step):
                    raise ReportError(
                        f"{shown}: the step of {_shown_path(key)} must be from 0 to {MAX_STEP:,}, got {step}"
                    )
                else:
                    _add(points, kept, shown, key, step, value)
        except events.DamagedError as error:
            raise ReportError(f"{shown}: {error}") from None
        except ImportError:
            raise ReportError(
                f"{shown} holds TensorBoard events, and tensorboard is not installed: {INSTALL}"
            ) from None
    return _EventFile(file, points, restart, extent)


def _drop_from(points: dict[str, _Points], first: int) -> None:
    for key, one in points.items():
        if one.steps and max(one.steps) >= first:
            points[key] = one.without(first)


def _described(metrics: dict[str, Series], path: Path, kind: str) -> Run:
    """A run described by the configuration beside its log, or else by its path."""
    settings, seeds, rate = _configuration(path)
    named, named_seed, named_rate = _from_name(path)
    # verl's rollout.seed has a default, so a seed in the path takes precedence.
    data_seed, rollout_seed = seeds
    seed = next((value for value in (data_seed, named_seed, rollout_seed) if _whole(value)), None)
    if "loss_mode" in settings:
        arm = str(settings["loss_mode"])
        named = f"{arm} {settings['support']}" if arm == "troll" and "support" in settings else arm
    return Run(
        task=", ".join(held_out_keys(metrics)),
        arm=named,
        seed=seed,
        lr=named_rate if rate is None else rate,
        status="",
        settings=settings,
        metrics=metrics,
        source=str(path),
        kind=kind,
    )


def _configuration(path: Path) -> tuple[dict[str, Any], tuple[Any, Any], float | None]:
    folder = path if path.is_dir() else path.parent
    folders = [folder, folder.parent] if folder.name in _NAMES_OF_NO_ARM else [folder]
    candidates = [parent / part / "config.yaml" for parent in folders for part in (".hydra", "hydra/.hydra")]
    config = next(filter(_is_there, candidates), None)
    if config is None:
        return {}, (None, None), None
    shown = _shown_path(config)
    try:
        import yaml
    except ImportError:
        raise ReportError(f"{shown} says what the run is, and PyYAML is not installed: {INSTALL}") from None
    with _opened(config) as stream:
        content = stream.read(MAX_CONFIG_BYTES + 1)
    if len(content) > MAX_CONFIG_BYTES:
        raise ReportError(f"{shown} has more than {MAX_CONFIG_BYTES / 2**20:g} MiB")
    try:
        tree = yaml.safe_load(content.decode("utf-8"))
    # What it raises depends on the tag: IndexError for an empty `!!int`, KeyError for a `!!bool` that is none.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ReportError(f"{shown} is not YAML that can be read: {type(error).__name__}: {reason}") from None
    settings = {
        name: _setting(value, shown) for name, key in _SETTINGS.items() if (value := _select(tree, key)) is not None
    }
    if settings.get("loss_mode") != "troll":
        settings = {name: value for name, value in settings.items() if ".troll." not in _SETTINGS[name]}
    seeds = (_select(tree, "data.seed"), _select(tree, "actor_rollout_ref.rollout.seed"))
    return settings, seeds, _rate(_select(tree, "actor_rollout_ref.actor.optim.lr"), f"{shown}: the actor's optim.lr")


def _is_there(path: Path) -> bool:
    """Whether something has that name, a link to nothing included; what cannot be looked at counts."""
    try:
        os.lstat(path)
    except OSError as error:
        return error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)
    return True


def _select(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return None if isinstance(tree, (dict, list)) else tree


def _from_name(path: Path) -> tuple[str, int | None, float | None]:
    """Arm, seed and learning rate from file and folder names such as ``union-lr1e-4/seed0/metrics.jsonl``."""
    seed: int | None = None
    rate: float | None = None
    parts = list(path.resolve().parts)
    if _EVENT_FILE in path.name:
        parts.pop()
    elif not path.is_dir():
        parts[-1] = path.stem
    for part in reversed(parts):
        if seed is None and (match := _SEED_IN_NAME.search(part)):
            seed = int(match[1])
        if rate is None and (match := _RATE_IN_NAME.search(part)) and _is_rate(float(match[1])):
            rate = float(match[1])
        rest = _RATE_IN_NAME.sub("", _SEED_IN_NAME.sub("", part)).strip("-_. ")
        if rest and rest not in _NAMES_OF_NO_ARM:
            return rest, seed, rate
    return path.stem, seed, rate


def _collected(line: Any, where: str, path: Path, kept: _Kept) -> Run:
    if not isinstance(line, dict) or not isinstance(line.get("run"), dict) or not isinstance(line.get("metrics"), dict):
        raise ReportError(f"{where}: expected {{'run': {{...}}, 'metrics': {{...}}}}")
    run, columns = line["run"], line["metrics"]
    if not isinstance(run.get("arm"), str) or not run["arm"]:
        raise ReportError(f"{where}: run.arm must be a string, got {short(run.get('arm'))}")
    for key in ("task", "section", "status"):
        if not isinstance(run.get(key, ""), str):
            raise ReportError(f"{where}: run.{key} must be a string, got {short(run[key])}")
    if run.get("seed") is not None and not _whole(run["seed"]):
        raise ReportError(f"{where}: run.seed must be a whole number below 2^64, got {short(run['seed'])}")
    settings = run.get("settings", {})
    if not isinstance(settings, dict):
        raise ReportError(f"{where}: run.settings must be a mapping, got {short(settings)}")
    steps = columns.get("step")
    if not isinstance(steps, list) or not all(map(_is_step, steps)) or sorted(set(steps)) != steps:
        raise ReportError(f"{where}: metrics.step must be a list of increasing whole numbers from 0 to {MAX_STEP:,}")
    metrics = {name: _column(name, column, steps, where) for name, column in columns.items() if name != "step"}
    shown = {name: series for name, series in metrics.items() if _shown_metric(name)}
    kept.more(sum(len(series.steps) for series in shown.values()))
    return Run(
        task=run.get("task", ""),
        arm=run["arm"],
        seed=run.get("seed"),
        lr=_rate(run.get("lr"), f"{where}: run.lr"),
        status=run.get("status", ""),
        settings={name: _setting(value, where) for name, value in _flat(settings)},
        metrics=shown,
        section=run.get("section", ""),
        source=str(path),
        kind="collected runs",
    )


def _column(name: str, column: Any, steps: list[int], where: str) -> Series:
    if not isinstance(column, list) or len(column) != len(steps):
        got = f"{len(column)} values" if isinstance(column, list) else type(column).__name__
        raise ReportError(
            f"{where}: metrics[{short(name)}] must be a list of {len(steps)} values, one per step, got {got}"
        )
    points: dict[int, float] = {}
    for step, value in zip(steps, column, strict=True):
        if value is not None:
            number = _as_float(value)
            if number is None:
                raise ReportError(
                    f"{where}: metrics[{short(name)}] at step {step} must be a number or null, got {short(value)}"
                )
            points[step] = number
    return _series(points)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _average(parts: Sequence[Series]) -> Series:
    if len(parts) < 2:
        return parts[0] if parts else Series()
    by_step = [dict(zip(part.steps, part.values, strict=True)) for part in parts]
    shared = set.intersection(*(set(values) for values in by_step))
    return _series({step: sum(values[step] for values in by_step) / len(by_step) for step in shared})


def _series(points: Mapping[int, float]) -> Series:
    steps = tuple(sorted(points))
    return Series(steps, tuple(points[step] for step in steps))


def _is_step(value: Any) -> bool:
    return _whole(value) and 0 <= value <= MAX_STEP


def _whole(value: Any) -> bool:
    """Whether it is a whole number, in 64 bits and a sign."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**64


def _is_rate(value: float | None) -> bool:
    return value is not None and 0 <= value <= LARGEST


def _rate(value: Any, name: str) -> float | None:
    """A learning rate; None for None."""
    rate = _as_float(value)
    if value is not None and not _is_rate(rate):
        raise ReportError(f"{name} must be a learning rate of at least 0, got {short(value)}")
    return rate


def _setting(value: Any, where: str) -> Any:
    """A setting as a scalar: what is none becomes text."""
    if value is None or isinstance(value, (str, float, bool)) or _whole(value):
        return value
    try:
        return json.dumps(value, default=str)
    except (TypeError, ValueError, RecursionError):
        raise ReportError(f"{where}: a setting is too long or nested too deeply") from None


def _as_float(value: Any) -> float | None:
    """A number in float32's range (:data:`LARGEST`); None if it is none."""
    try:
        number = float(value)
    except OverflowError:
        number = math.inf if value > 0 else -math.inf
    except (TypeError, ValueError):
        return None
    if abs(number) > LARGEST:
        return math.copysign(math.inf, number)
    return 0.0 if abs(number) < SMALLEST else number
