"""Runs a command, and ends all that descends from it when the command ends, or when the process that asked for it does.

    python benchmarks/guardian.py FD COMMAND...

``FD`` is the reading end of a pipe whose writing end the asking process holds: it closes with that process, however
that ends. Descendants whose own parents have ended are adopted by this process (``PR_SET_CHILD_SUBREAPER``), so that
none escapes by starting a session of its own. Exits as the command did; after a signal with its number plus 128.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import NoReturn

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def _end_with_parent(number: signal.Signals) -> None:
    """Have the kernel send this process a signal when the thread that started it ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)


def descendants(*ancestors: int) -> list[int]:
    """Processes that descend from those given, zombies left out."""
    children: dict[int, list[int]] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/{name}/stat") as file:
            # The command's name, in parentheses, may hold anything.
            state, parent = file.read().rpartition(")")[2].split()[:2]
            if state != "Z":
                children.setdefault(int(parent), []).append(int(name))
    found, todo = list[int](), list(ancestors)
    while todo:
        todo = [child for parent in todo for child in children.get(parent, ())]
        found += todo
    return found


def end_descendants() -> None:
    """Kill until none is left: those found may start others meanwhile."""
    while left := descendants(os.getpid()):
        for process in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.01)
    # All were adopted. Their ids are free once they have been waited for.
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()


def _end(number: int, _: FrameType | None) -> NoReturn:
    end_descendants()
    os._exit(128 + number)


def fork() -> int:
    """Fork; the parent adopts what the child will leave, and is to go on to :func:`guard`."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    child = os.fork()
    if child == 0:
        _end_with_parent(signal.SIGKILL)
    return child


def guard(child: int) -> NoReturn:
    """Wait for a child, end all descendants, and exit as the child did; do so before when a signal asks for it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)
    ended, status = os.wait()
    while ended != child:
        ended, status = os.wait()
    end_descendants()
    code = os.waitstatus_to_exitcode(status)
    os._exit(code if code >= 0 else 128 - code)


def stay_behind() -> None:
    """Go on in a child; this process guards it, and ends all when its own parent ends."""
    if (child := fork()) != 0:
        _end_with_parent(signal.SIGTERM)
        guard(child)


def main() -> NoReturn:
    """Guard a command until it or the pipe ends."""
    pipe, command = int(sys.argv[1]), sys.argv[2:]
    child = fork()
    if child == 0:
        os.close(pipe)
        try:
            os.execvp(command[0], command)
        except OSError as error:
            print(f"{command[0]}: {error.strerror}", file=sys.stderr, flush=True)
            os._exit(127)

    def watch() -> None:
        os.read(pipe, 1)
        os.kill(os.getpid(), signal.SIGTERM)

    # The command's streams are its own: who reads them sees them end with it.
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nothing, stream)
    threading.Thread(target=watch, daemon=True).start()
    guard(child)


if __name__ == "__main__":
    main()
