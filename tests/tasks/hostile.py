"""Programs that try to do harm, for the sandbox's tests and the trainer's run on them."""

from __future__ import annotations

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
    "memory of the parent": "import os\nopen(f'/proc/{os.getppid()}/mem', 'rb')",
    "environment of the parent": "import os\nopen(f'/proc/{os.getppid()}/environ').read()",
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


def source(name: str, path: str = "/tmp/none", port: int = 9) -> str:
    """One of the programs, aimed at a file outside the sandbox and a port on which something listens."""
    return f"PATH, PORT = {path!r}, {port}\n{PROGRAMS[name]}\nprint('right')\n"


def response(name: str, path: str = "/tmp/none", port: int = 9) -> str:
    """A response that contains one of the programs."""
    return f"Here it is.\n```python\n{source(name, path, port)}```\n"
