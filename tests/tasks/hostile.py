"""Programs that try to do harm, for the sandbox's tests and the trainer's run on them.

``python -m tests.tasks.hostile NAME ...`` runs some of them in the sandbox and prints a JSON object: what each gained.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from benchmarks.processes import run

ROOT = Path(__file__).resolve().parents[2]

PROGRAMS = {
    "infinite loop": "while True: pass",
    "sleep": "import time\ntime.sleep(1000)",
    "loop in C": "9 ** 9 ** 9 ** 9",
    # Bounded: a failing sandbox must not take the machine down.
    "forks": """
import os
children = 0
for _ in range(200):
    try:
        if os.fork() == 0:
            os._exit(0)
        children += 1
    except OSError:
        pass
assert children
""",
    "daemon": """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(60)
    os._exit(0)
""",
    "subprocess": "import subprocess\nsubprocess.run(['true'])",
    "multiprocessing": "import multiprocessing as m\nm.Process(target=int).start()",
    "exec": "import os\nos.execv('/bin/sh', ['sh', '-c', 'echo right'])",
    "threads": """
import threading, time
threading.stack_size(32768)
for _ in range(2000):
    threading.Thread(target=time.sleep, args=(100,), daemon=True).start()
""",
    "huge output": "import sys\nwhile True: sys.stdout.write('right ' * 10000)",
    "huge error output": "import sys\nwhile True: sys.stderr.write('x' * 100000)",
    "memory": "x = bytearray(1 << 40)",
    "memory in steps": "x = []\nwhile True: x.append(bytearray(1 << 24))",
    "delete": "import os\nos.remove(PATH)",
    "overwrite": "open(PATH, 'w').write('gone')",
    "append": "open(PATH, 'a').write('gone')",
    "truncate": "import os\nos.truncate(PATH, 0)",
    "change mode": "import os\nos.chmod(PATH, 0o600)",
    "change time": "import os\nos.utime(PATH, (0, 0))",
    "rename": "import os\nos.rename(PATH, PATH + 'x')",
    "link": "import os\nos.link(PATH, PATH + 'x')",
    "new file": "open(PATH + 'x', 'w')",
    "new folder": "import os\nos.mkdir(PATH + 'x')",
    "read": "open(PATH).read()",
    "list": "import os\nos.listdir('/')",
    "network": "import socket\nsocket.create_connection(('127.0.0.1', PORT), timeout=2)",
    "datagram": "import socket\ns = socket.socket(type=socket.SOCK_DGRAM)\ns.sendto(b'x', ('127.0.0.1', PORT))",
    "signal the parent": "import os\nos.kill(os.getppid(), 0)",
    "kill the parent": "import os\nos.kill(os.getppid(), 9)",
    "kill everything": "import os\nos.kill(-1, 9)",
    "signal by file owner": "import fcntl, os\nfcntl.fcntl(0, fcntl.F_SETOWN, os.getppid())",
    "limit the parent": "import os, resource as r\nr.prlimit(os.getppid(), r.RLIMIT_CORE, r.getrlimit(r.RLIMIT_CORE))",
    "slow the parent": "import os\nos.setpriority(os.PRIO_PROCESS, os.getppid(), 1)",
    "pin the parent": "import os\nos.sched_setaffinity(os.getppid(), [0])",
    "existence": "import os\nos.stat(PRIVATE)",
    "size": "import os\nos.path.getsize(PRIVATE)",
    "access": "import os\nassert os.access(PRIVATE, os.F_OK)",
    "size by a raw call": """
import ctypes
# newfstatat on x86-64 and on aarch64.
call, answer = ctypes.CDLL(None).syscall, ctypes.create_string_buffer(4096)
assert 0 in [call(number, -100, PRIVATE.encode(), answer, 0) for number in (262, 79)]
""",
    "existence through an open folder": """
import itertools, os
assert any(
    os.path.exists(f"/proc/self/fd/{number}" + "/.." * height + "/" + PRIVATE.split("/", depth)[-1])
    for number, height, depth in itertools.product(range(3, 64), range(1, 12), range(1, PRIVATE.count("/") + 1))
)
""",
    "memory of the parent": "import os\nopen(f'/proc/{os.getppid()}/mem', 'rb')",
    "environment of the parent": "import os\nopen(f'/proc/{os.getppid()}/environ').read()",
    "folder of the parent": "import os\nos.readlink(f'/proc/{os.getppid()}/cwd')",
    "files through the parent": "import os\nos.stat(f'/proc/{os.getppid()}/root' + PATH)",
    "call of the x32 interface": """
import ctypes
# getpid, which is allowed by its own number.
assert ctypes.CDLL(None).syscall(0x40000000 + 39) > 0
""",
    "exit at once": "exit(0)",
    "exit of the system": "import os\nos._exit(0)",
    "right and then a crash": "print('right')\nraise ValueError",
    "10,000 digits": "print('9' * 10000)",
    "10,000 digits as a number": "print(int('9' * 10000))",
    "null byte": "print('right\\0')\n\0",
    "surrogate": "print('\ud800right')",
    "deep nesting": "(" * 5000,
    "recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
    "crash of the interpreter": "import ctypes\nctypes.string_at(0)",
    "million characters": "x = '" + "a" * 10**6,
}
"""By what they try. A program that gets away with it goes on to print the right answer."""

HARMLESS_OUTSIDE = [
    "forks",
    "subprocess",
    "multiprocessing",
    "delete",
    "overwrite",
    "append",
    "truncate",
    "change mode",
    "change time",
    "rename",
    "link",
    "new file",
    "new folder",
    "read",
    "list",
    "network",
    "datagram",
    "signal the parent",
    "signal by file owner",
    "limit the parent",
    "pin the parent",
    "environment of the parent",
    "folder of the parent",
    "files through the parent",
    "existence",
    "size",
    "access",
    "size by a raw call",
]
"""The programs that may run without a sandbox, on a file of the test, to show that they would succeed."""

ANSWERS = {
    "power tower": "\\boxed{9^{9^{9^9}}}",
    "factorial": "\\boxed{100000000!}",
    "factorials": "\\boxed{((((9!)!)!)!)!}",
    "sum": "\\boxed{\\sum_{k=1}^{10^9} \\sin(k^k)}",
    "thousands of braces": "\\boxed{" + "{" * 5000 + "1" + "}" * 5000 + "}",
    "nested fractions": "\\boxed{" + "\\frac{1}{" * 200 + "2" + "}" * 200 + "}",
    "open brace": "\\boxed{" * 5000,
    "10,000 digits": "\\boxed{" + "9" * 10000 + "}",
    "2,000 digits": "\\boxed{" + "9" * 1990 + "}",
    "million characters": "\\boxed{" + "1" * 10**6 + "}",
    "million braces": "\\boxed{" + "{" * 10**6,
    "null byte": "\\boxed{\0}",
    "surrogate": "\\boxed{\ud800}",
    "code": "\\boxed{__import__('os').kill(__import__('os').getppid(), 9)}",
    "nothing": "\\boxed{}",
    "no mark": "7",
    "several": "\\boxed{6 \\text{ or } 7}",
    "list": "\\boxed{5, 6, 7}",
}
"""Answers to a question whose answer is 7."""


def source(name: str, path: str = "/tmp/none", port: int = 9, private: str = "/tmp/none") -> str:
    """One of the programs, aimed at files outside the sandbox and a port on which something listens.

    Args:
        name: of the program.
        path: a file.
        port: on 127.0.0.1.
        private: a file in a folder that the program's user may not enter.
    """
    return f"PATH, PORT, PRIVATE = {path!r}, {port}, {private!r}\n{PROGRAMS[name]}\nprint('right')\n"


def response(name: str, path: str = "/tmp/none", port: int = 9, private: str = "/tmp/none") -> str:
    """A response that contains one of the programs."""
    return f"Here it is.\n```python\n{source(name, path, port, private)}```\n"


RIGHT = json.dumps({"inputs": [""], "outputs": ["right"]})


@contextlib.contextmanager
def canary_file() -> Iterator[Path]:
    """A world-writable file in a world-writable folder."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        path = Path(folder, "canary")
        path.write_text("right")
        path.chmod(0o666)
        yield path


@contextlib.contextmanager
def private_file(mode: int) -> Iterator[Path]:
    """A world-readable file in a folder of this mode."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "private")
        path.write_text("right")
        path.chmod(0o666)
        os.chmod(folder, mode)
        try:
            yield path
        finally:
            os.chmod(folder, 0o700)


def remaining() -> list[int]:
    """Sandboxed processes among this one's descendants."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "PR_SET_PDEATHSIG" in " ".join(process.cmdline()):
                found.append(process.pid)
    return found


def attempt(name: str, canary: Path, private: Path) -> list[str]:
    """Run one of the programs in the sandbox, as :func:`source` describes it; a line for each thing that it gained."""
    from verl_troll.tasks.rewards import code

    def state() -> dict[str, object]:
        seen = canary.stat()
        return {
            "content": canary.read_text(),
            "mode and time": (seen.st_mode, seen.st_mtime_ns),
            "folder": os.listdir(canary.parent),
            "priority": os.getpriority(os.PRIO_PROCESS, 0),
            "affinity": os.sched_getaffinity(0),
            "sandboxed processes": remaining(),
        }

    before = state()
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(type=socket.SOCK_DGRAM) as datagrams:
        port = server.getsockname()[1]
        datagrams.bind(("127.0.0.1", port))
        result = code.compute_score("x", response(name, str(canary), port, str(private)), RIGHT, processor_seconds=1)
        gained = [] if (result["score"], result["answered"]) == (0, 1) else [f"{result}"]
        for listener in (server, datagrams):
            listener.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            server.accept()
            gained.append("a connection")
        with contextlib.suppress(BlockingIOError):
            datagrams.recv(1)
            gained.append("a datagram")
    after = state()
    return gained + [f"{what}: {before[what]} became {after[what]}" for what in before if before[what] != after[what]]


OTHER_USER = 12345
CAN_BE_ANOTHER_USER = os.geteuid() == 0 and shutil.which("setpriv") is not None


def as_another_user(command: Sequence[str]) -> str:
    """What a command prints that an ordinary user runs in the repository; its own failure is an AssertionError.

    The user has one capability more than an ordinary one, since the interpreter may be in root's home. Programs in the
    sandbox must not have it.
    """
    prefix = ["setpriv", f"--reuid={OTHER_USER}", f"--regid={OTHER_USER}", "--clear-groups"]
    prefix += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    environment = {**os.environ, "HOME": "/tmp", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(ROOT)}
    result = run([*prefix, *command], env=environment, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-3000:]
    return str(result.stdout)


def gains(names: Sequence[str], *, another_user: bool) -> dict[str, list[str]]:
    """:func:`attempt` for some of the programs, by their names, in a process that may be harmed."""
    command = [sys.executable, "-m", "tests.tasks.hostile", *names]
    if another_user:
        return dict(json.loads(as_another_user(command)))
    result = run(command, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-3000:]
    return dict(json.loads(result.stdout))


if __name__ == "__main__":
    # Ordinary users own what they make: the folder is closed to its owner too.
    with canary_file() as at, private_file(0o700 if os.geteuid() == 0 else 0) as closed:
        print(json.dumps({name: attempt(name, at, closed) for name in sys.argv[1:]}))
