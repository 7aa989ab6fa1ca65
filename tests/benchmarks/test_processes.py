"""Process trees: hung ones are told from slow ones, and none outlives the process that started it."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.processes import WORK_SHARE, HungError, Progress, Tree, run

IDLE = 3.0


def python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


def test_a_hung_command_is_ended_within_seconds_and_its_last_words_are_told() -> None:
    with pytest.raises(HungError, match=r"(?s)no progress for 3 s.*last words"):
        run(python("import time; print('last words', flush=True); time.sleep(1000)"), idle=IDLE)


def test_a_command_that_writes_may_take_its_time(tmp_path: Path) -> None:
    log = tmp_path / "log"
    slow = f"import time\nfor _ in range(24): time.sleep({IDLE / 12}); print('.', end='', flush=True)"
    with log.open("w") as stream, Tree(python(slow), stdout=stream) as tree:
        assert tree.wait([log], idle=IDLE) == 0
    assert len(log.read_text()) == 24


def test_a_command_that_computes_may_take_its_time() -> None:
    # In a child: what counts is the work of the whole tree.
    child = f"import time\nwhile time.process_time() < {2 * IDLE}: pass"
    slow = f"import subprocess, sys\nsys.exit(subprocess.run([sys.executable, '-c', {child!r}]).returncode)"
    assert run(python(slow), idle=IDLE).returncode == 0


def test_what_little_is_done_in_passing_is_no_progress() -> None:
    # As Ray's daemons do.
    waiting = f"""
import time
while True:
    time.sleep(0.2)
    end = time.process_time() + {0.2 * WORK_SHARE / 3}
    while time.process_time() < end:
        pass
"""
    with pytest.raises(HungError, match="no progress"):
        run(python(waiting), idle=IDLE)


def test_time_that_the_watcher_did_not_run_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    progress = Progress(list, idle=IDLE)
    now += 1000
    progress.check()
    now += IDLE / 2
    progress.check()


def test_a_command_over_its_limit_is_ended() -> None:
    with Tree(python("while True: pass")) as tree, pytest.raises(HungError, match="not done within 1 s"):
        tree.wait(limit=1)
    assert tree.process.returncode != 0


def test_output_and_exit_status_come_back() -> None:
    done = run(python("import os, sys; print(os.getcwd()); print('oh', file=sys.stderr); sys.exit(7)"), cwd=Path("/"))
    assert (done.returncode, done.stdout, done.stderr) == (7, "/\n", "oh\n")
    assert run(python("import os; print(os.environ['ONLY'])"), env={"ONLY": "this"}).stdout == "this\n"
    assert run(python("import sys; print(repr(sys.stdin.read()))")).stdout == "''\n"


# Starts a child, and a grandchild in its own session whose parent has ended; all write their ids.
FAMILY = """
import os, sys, time
def live(name):
    print(os.getpid(), file=open(name + ".part", "w"), flush=True)
    os.rename(name + ".part", name)
    time.sleep(1000)
if os.fork() == 0:
    live("child")
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        live("grandchild")
    os._exit(0)
live("parent")
"""
NAMES = ("parent", "child", "grandchild")


def ids(folder: Path) -> list[int]:
    """Wait until the whole family is running."""
    while not all((folder / name).exists() for name in NAMES):
        time.sleep(0.01)
    found = [int((folder / name).read_text()) for name in NAMES]
    assert all(psutil.pid_exists(process) for process in found)
    assert os.getsid(found[2]) != os.getsid(found[0])
    return found


def gone(processes: list[int]) -> bool:
    """Whether they have ended, allowing them a moment."""
    for _ in range(1000):
        if not any(psutil.pid_exists(process) for process in processes):
            return True
        time.sleep(0.01)
    return False


def test_a_tree_ends_as_a_whole(tmp_path: Path) -> None:
    with Tree(python(FAMILY), cwd=tmp_path) as tree:
        family = ids(tmp_path)
        assert set(family) <= set(tree.processes())
    assert not any(psutil.pid_exists(process) for process in family)
    assert tree.processes() == []


def test_a_tree_ends_with_its_command(tmp_path: Path) -> None:
    with Tree(python(FAMILY), cwd=tmp_path) as tree:
        family = ids(tmp_path)
        os.kill(family[0], signal.SIGUSR1)
        assert tree.wait() == 128 + signal.SIGUSR1
        assert not any(psutil.pid_exists(process) for process in family)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_tree_ends_with_the_process_that_runs_it(tmp_path: Path, number: signal.Signals) -> None:
    """As when pytest is interrupted, or a pytest-xdist worker is killed."""
    # A shell starts background jobs with SIGINT ignored, which processes inherit.
    watcher = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    watcher += f"from benchmarks.processes import run; run({python(FAMILY)!r}, cwd={str(tmp_path)!r})"
    with Tree(python(watcher)) as tree:
        family = ids(tmp_path)
        watcher_id = tree.processes()[0]
        # Stop the outer tree's process, which would end what the inner one leaves.
        os.kill(tree.process.pid, signal.SIGSTOP)
        try:
            os.kill(watcher_id, number)
            assert gone(family)
        finally:
            os.kill(tree.process.pid, signal.SIGCONT)
