"""Kills parts of verl's trainer in the middle of a run: TransferQueue, workers, a node.

Each run is the real trainer on tiny assets, with a checkpoint after each step, and goes on from the checkpoint of the
run that was killed before it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks import guardian
from benchmarks.attack.attack import Attack, Extent, Outcome
from benchmarks.processes import HungError, Tree

IDLE = 300.0
"""Seconds without progress after which a run counts as hung. TransferQueue waits 200 for a storage unit."""
LATEST = "latest_checkpointed_iteration.txt"
"""verl's file that says which checkpoint to resume from."""
STEPS = 2
"""Steps that a run logs before something is killed."""
GRACE = 60
"""Seconds for the daemons of a command that ended to notice it."""
# Runs the command, then waits for a line of input: what the command leaves is seen before the tree is ended with it.
_SHELL = ("bash", "-c", '"$@"; echo $? >code.new; mv code.new code; read', "-")
# Ray's own processes, which stay with a node.
_RAYS_OWN = re.compile(r"ray::(IDLE|DashboardAgent|RuntimeEnvAgent)")


@dataclass(frozen=True)
class Ending:
    """How a command ended after a fault.

    Attributes:
        code: exit status; None if it hung.
        seconds: from the fault to the end.
        log: what it printed after the fault.
        left: processes that it left behind.
    """

    code: int | None
    seconds: float
    log: str
    left: Sequence[str]

    def broken(self, cause: str) -> str:
        """Which promise was not kept, or nothing.

        Args:
            cause: regular expression of a line that says what was lost.
        """
        if self.code is None:
            return f"hung for {IDLE:g} s"
        if self.code == 0:
            return "ended as if nothing had happened"
        if not re.search(cause, self.log):
            return f"no line of the log matches {cause!r}"
        return f"left {', '.join(self.left)}" if self.left else ""


def titles(processes: Sequence[int]) -> dict[int, str]:
    """The command line of each process that still runs."""
    found = {}
    for process in processes:
        with contextlib.suppress(OSError):
            if title := Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"):
                found[process] = title.strip()
    return found


def run_with_fault(
    command: Sequence[str],
    folder: Path,
    environment: dict[str, str],
    ready: Callable[[], bool],
    fault: Callable[[], None],
    left: Callable[[list[int]], list[str]] = lambda processes: list(titles(processes).values()),
    idle: float = IDLE,
) -> Ending:
    """Run a command, cause a fault when it is ready, and wait for its end.

    Args:
        left: of the processes that still run after the command, those that should not.

    Raises:
        RuntimeError: it ended, or hung, before it was ready; the message ends with its log.
    """
    log, code = folder / "trainer.log", folder / "code"
    with (
        log.open("wb") as file,
        Tree([*_SHELL, *command], cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=file, stderr=file) as tree,
    ):
        progress = tree.progress([log], idle=idle)
        try:
            while not ready():
                progress.check()
                if code.exists():
                    raise RuntimeError(f"ended with {code.read_text()}before it was ready:\n{_tail(log)}")
                time.sleep(0.1)
        except HungError as error:
            raise RuntimeError(f"hung before it was ready: {error}\n{_tail(log)}") from None
        printed, start = log.stat().st_size, time.monotonic()
        fault()
        hung = False
        try:
            while not code.exists():
                progress.check()
                time.sleep(0.1)
        except HungError:
            hung = True
        seconds = time.monotonic() - start
        remaining: list[str] = []
        for _ in range(0 if hung else GRACE):
            if not (remaining := left(tree.processes()[1:])):
                break
            time.sleep(1)
        said = log.read_bytes()[printed:].decode(errors="replace")
    return Ending(None if hung else int(code.read_text()), seconds, said, remaining)


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-3000:]


@dataclass(frozen=True)
class Victim:
    """Something to kill.

    Attributes:
        name: what it is.
        find: its processes, among the titles of all.
        cause: regular expression of a line that says that it was lost.
    """

    name: str
    find: Callable[[dict[int, str]], list[int]]
    cause: str


def _called(title: str) -> Callable[[dict[int, str]], list[int]]:
    return lambda processes: [process for process, own in processes.items() if own.startswith(title)][:1]


def _of_node(address: str) -> Callable[[dict[int, str]], list[int]]:
    def find(processes: dict[int, str]) -> list[int]:
        roots = [process for process, title in processes.items() if f"--node-ip-address={address} " in f"{title} "]
        return [*roots, *guardian.descendants(*roots)]

    return find


def _kill(victim: Victim, wait: float) -> None:
    time.sleep(wait)
    # The nodes of a cluster are not the trainer's own processes, but this process's.
    found = victim.find(titles(guardian.descendants(os.getpid())))
    if not found:
        raise RuntimeError(f"{victim.name} does not run")
    for process in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def attack(victims: Sequence[Victim], nodes: int, extent: Extent) -> Outcome:
    """Kill one victim after the other, each in a run that goes on from the checkpoint of the one before."""
    if missing := _missing():
        return Outcome(skipped=f"{missing} is not installed")
    from tests.trainer.run import make_assets

    os.environ.update(HF_HUB_OFFLINE="1", RAY_USAGE_STATS_ENABLED="0")
    outcome, random_ = Outcome(), random.Random(extent.seed)
    make_assets(extent.folder)
    for number in range(extent.tries(1)):
        _attack_in_turn(victims, nodes, extent.folder / str(number), outcome, random_)
    return outcome


def _attack_in_turn(
    victims: Sequence[Victim], nodes: int, folder: Path, outcome: Outcome, random_: random.Random
) -> None:
    checkpoints = folder / "checkpoints"
    saved, last, problem = 0, None, ""
    for number, victim in enumerate([*victims, None]):
        out = folder / f"run{number}"
        try:
            ending = train(folder.parent, out, checkpoints, nodes, saved, victim, random_.uniform(0, 3))
        except RuntimeError as error:
            outcome.record(False, f"after {last.name if last else 'the start'}: {error}")
            return
        if victim is None and ending.code != 0:
            problem = problem or f"the run that resumes ended with {ending.code}"
        steps = _steps(out)
        if last is not None:
            if not problem and steps[:1] != [saved + 1]:
                problem = f"resumed with steps {steps}, but the last checkpoint is that of step {saved}"
            outcome.record(not problem, f"{last.name}: {problem}")
        if victim is None:
            return
        last, problem = victim, ending.broken(victim.cause)
        saved = int((checkpoints / LATEST).read_text())
        print(f"{victim.name}: {problem or 'the run ended'} after {ending.seconds:.0f} s", file=sys.stderr, flush=True)


def train(
    assets: Path, out: Path, checkpoints: Path, nodes: int, saved: int, victim: Victim | None, wait: float
) -> Ending:
    """One run of the trainer, from the last checkpoint on: with a fault, or for one step."""
    from tests.trainer.run import trainer

    overrides = [
        "+troll=default",
        "trainer.save_freq=1",
        "trainer.max_actor_ckpt_to_keep=2",
        "trainer.resume_mode=auto",
        f"trainer.default_local_dir={checkpoints}",
        "trainer.total_epochs=1000000",
        f"trainer.total_training_steps={saved + (1 if victim is None else 1000)}",
    ]
    with _cluster(nodes, out) as joining:
        command, environment = trainer(assets, out, [*overrides, *joining])
        if victim is None:
            return run_with_fault(command, out, environment, lambda: True, lambda: None)
        return run_with_fault(
            command, out, environment, lambda: len(_steps(out)) >= STEPS, partial(_kill, victim, wait), _working
        )


def _steps(out: Path) -> list[int]:
    from tests.trainer.run import METRICS, metric_rows

    return [row["step"] for row in metric_rows(out)] if (out / METRICS).exists() else []


def _cluster(nodes: int, out: Path) -> contextlib.AbstractContextManager[list[str]]:
    """A Ray cluster, if the trainer is not to start one itself; gives the overrides that join it."""
    from tests.trainer.two_nodes import cluster, equipped

    return cluster([equipped(out)] * nodes) if nodes > 1 else contextlib.nullcontext([])


def _working(processes: list[int]) -> list[str]:
    """Titles of the trainer's processes; a cluster's are this process's own, and its daemons stay."""
    own = set(processes)
    found = titles(guardian.descendants(os.getpid()))
    return [
        title
        for process, title in found.items()
        if process in own or (title.startswith("ray::") and not _RAYS_OWN.match(title))
    ]


def _missing() -> str:
    """A package that a run needs and that is not installed, or nothing."""
    needed = ("verl", "ray", "transfer_queue", "transformers", "pandas")
    return next((name for name in needed if importlib.util.find_spec(name) is None), "")


CONTROLLER = Victim(
    "TransferQueue's controller", _called("ray::TransferQueueController"), r"has lost its actor TransferQueueController"
)
STORAGE = Victim(
    "a storage unit of TransferQueue",
    _called("ray::SimpleStorageUnit"),
    r"has lost its actor TransferQueueStorageUnit",
)
ACTOR = Victim("the actor's worker", _called("ray::WorkerDict"), r"class_name: .*WorkerDict")
SERVER = Victim("the rollout server", _called("ray::EmbeddedServer"), r"class_name: EmbeddedServer")
NODE = Victim("the second node", _of_node("127.0.0.3"), r"node 127\.0\.0\.3 .* does not answer")

_PROMISE = "the run ends, fails, says what was lost, leaves no process, and resumes with the next step"
ATTACKS = (
    Attack("transfer_queue_killed", _PROMISE, partial(attack, (CONTROLLER, STORAGE), 1)),
    Attack("workers_killed", _PROMISE, partial(attack, (ACTOR, SERVER), 1)),
    Attack("node_lost", _PROMISE, partial(attack, (NODE,), 2)),
)
