"""Process trees: a hung one is told from a slow one."""

from __future__ import annotations

import sys
import time
from pathlib import Path

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
    # In a child: it is the work of the whole tree that counts.
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
