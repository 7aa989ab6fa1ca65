"""How the attack on a running trainer tells its endings apart, on a stand-in for the trainer.

The attack itself runs verl's trainer for minutes: ``python -m benchmarks.attack --only transfer_queue_killed``.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import guardian
from benchmarks.attack import cluster
from benchmarks.attack.attack import Extent
from benchmarks.attack.cluster import Ending, Victim
from benchmarks.processes import IDLE_SECONDS

# Starts a part, says that it is ready, and does as it is told once the part has been killed.
TRAINER = """
import subprocess, sys, time

part = subprocess.Popen(["sleep", "2000000"])
print("ready", flush=True)
part.wait()
{then}
"""


def killed(folder: Path, then: str, idle: float = IDLE_SECONDS) -> Ending:
    def ready() -> bool:
        return "ready" in (folder / "trainer.log").read_text()

    def kill() -> None:
        # Of this process: the guardian, the shell, the trainer, its part.
        (part,) = [
            process
            for process, title in cluster.titles(guardian.descendants(os.getpid())).items()
            if title == "sleep 2000000"
        ]
        os.kill(part, signal.SIGKILL)

    command = [sys.executable, "-c", TRAINER.format(then=then)]
    return cluster.run_with_fault(command, folder, dict(os.environ), ready, kill, idle=idle)


@pytest.mark.parametrize(
    ("then", "broken"),
    [
        ("sys.exit('the part died')", ""),
        ("print('the part died')", "ended as if nothing had happened"),
        ("sys.exit(1)", "no line of the log matches 'part died'"),
    ],
)
def test_endings(tmp_path: Path, then: str, broken: str) -> None:
    ending = killed(tmp_path, then)
    assert ending.broken("part died") == broken
    assert "ready" not in ending.log


def test_a_run_that_hangs(tmp_path: Path) -> None:
    ending = killed(tmp_path, "print('the part died', flush=True); time.sleep(10**6)", idle=1)
    assert ending.code is None
    assert ending.broken("part died").startswith("hung")


def test_a_process_that_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "GRACE", 1)
    stay = "subprocess.Popen(['sleep', '1000000'], start_new_session=True); sys.exit('the part died')"
    assert killed(tmp_path, stay).broken("part died") == "left sleep 1000000"


def test_a_run_that_ends_too_early(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ended with 3"):
        cluster.run_with_fault(
            [sys.executable, "-c", "raise SystemExit(3)"], tmp_path, dict(os.environ), lambda: False, lambda: None
        )


def runs(endings: list[Ending], steps: list[list[int]], saved: list[int]) -> Callable[..., Ending]:
    """Stands in for runs of the trainer that log ``steps`` and leave checkpoints of the steps ``saved``."""

    def train(assets: Path, out: Path, checkpoints: Path, *_: object) -> Ending:
        out.mkdir(parents=True)
        checkpoints.mkdir(exist_ok=True)
        (checkpoints / cluster.LATEST).write_text(str(saved.pop(0)))
        (out / "metrics.jsonl").write_text("".join(f'{{"step": {step}, "data": {{}}}}\n' for step in steps.pop(0)))
        return endings.pop(0)

    return train


NAMED, FINISHED, HUNG = Ending(1, 5, "the part died", []), Ending(0, 5, "", []), Ending(None, 120, "", [])


@pytest.mark.parametrize(
    ("endings", "steps", "saved", "fell"),
    [
        ([NAMED, NAMED, FINISHED], [[1, 2], [3, 4], [5]], [2, 4, 5], 0),
        ([NAMED, NAMED, FINISHED], [[1, 2], [1, 2], [5]], [2, 4, 5], 1),
        ([NAMED, NAMED, FINISHED], [[1, 2], [4, 5], []], [2, 4, 5], 2),
        ([HUNG, NAMED, FINISHED], [[1, 2], [3, 4], [5]], [2, 4, 5], 1),
        ([NAMED, NAMED, NAMED], [[1, 2], [3, 4], [5]], [2, 4, 5], 1),
    ],
    ids=["held", "from the start again", "a step is missing", "hung", "does not finish"],
)
def test_what_is_counted(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    endings: list[Ending],
    steps: list[list[int]],
    saved: list[int],
    fell: int,
) -> None:
    monkeypatch.setattr(cluster, "train", runs(endings, steps, saved))
    monkeypatch.setattr("tests.trainer.run.make_assets", lambda _: None)
    victims = [Victim("one", lambda _: [], "part died"), Victim("other", lambda _: [], "part died")]
    outcome = cluster.attack(victims, 1, Extent(tmp_path))
    assert (outcome.tried, outcome.fell) == (2, fell), outcome.examples
