"""Runs inside the sandboxed process: confines itself, then runs the program.

:mod:`verl_troll.tasks.rewards.sandbox` passes this file's text to a fresh interpreter with ``-c``, so it uses only the
standard library. The job arrives as JSON through a file descriptor. ``READY`` on standard error means that every layer
is in place; anything written before it is a setup error, not the program's output.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
from types import ModuleType
from typing import Any

READY = b"\0ready\n"

PR_SET_PDEATHSIG, PR_SET_KEEPCAPS, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 8, 22, 38
SECCOMP_MODE_FILTER = 2
LINUX_CAPABILITY_VERSION_3 = 0x20080522
CAP_DAC_READ_SEARCH = 2
# System call numbers, the same on every architecture.
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
LANDLOCK_CREATE_RULESET_VERSION = 1
LANDLOCK_RULE_PATH_BENEATH = 1
READ_FILE, READ_DIR = 1 << 2, 1 << 3
# Number of file-system rights in each Landlock ABI version.
FILE_SYSTEM_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}

libc = ctypes.CDLL(None, use_errno=True)


class RulesetAttributes(ctypes.Structure):
    _fields_ = [("file_system", ctypes.c_uint64), ("network", ctypes.c_uint64), ("scoped", ctypes.c_uint64)]


class PathBeneath(ctypes.Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = [("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32)]


class FilterProgram(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p)]


class CapabilityHeader(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


class CapabilityData(ctypes.Structure):
    _fields_ = [("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32)]


def succeed(what: str, result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def prctl(what: str, option: int, *arguments: Any) -> None:
    values = [ctypes.c_ulong(value) if isinstance(value, int) else value for value in arguments]
    values += [ctypes.c_ulong(0)] * (4 - len(values))
    succeed(what, libc.prctl(ctypes.c_int(option), *values))


def landlock_version() -> int:
    """The kernel's Landlock ABI version; 0 without Landlock."""
    version: int = libc.syscall(ctypes.c_long(CREATE_RULESET), None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    return max(version, 0)


def read_nothing_but(roots: list[str]) -> None:
    """Landlock: allow reading below ``roots`` and no other file access, no TCP, no signals to outside processes."""
    version = landlock_version()
    rights = (1 << FILE_SYSTEM_RIGHTS.get(version, 16)) - 1
    attributes = RulesetAttributes(rights, 0b11 if version >= 4 else 0, 0b11 if version >= 6 else 0)
    size = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = succeed(
        "landlock_create_ruleset",
        libc.syscall(
            ctypes.c_long(CREATE_RULESET), ctypes.byref(attributes), ctypes.c_size_t(size), ctypes.c_uint32(0)
        ),
    )
    for root in roots:
        try:
            handle = os.open(root, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        allowed = READ_FILE | (READ_DIR if os.path.isdir(root) else 0)
        rule = PathBeneath(allowed, handle)
        succeed(
            f"landlock_add_rule for {root}",
            libc.syscall(
                ctypes.c_long(ADD_RULE),
                ctypes.c_int(ruleset),
                ctypes.c_int(LANDLOCK_RULE_PATH_BENEATH),
                ctypes.byref(rule),
                ctypes.c_uint32(0),
            ),
        )
        os.close(handle)
    succeed(
        "landlock_restrict_self",
        libc.syscall(ctypes.c_long(RESTRICT_SELF), ctypes.c_int(ruleset), ctypes.c_uint32(0)),
    )
    os.close(ruleset)


def keep_capabilities(mask: int) -> None:
    header = CapabilityHeader(LINUX_CAPABILITY_VERSION_3, 0)
    data = (CapabilityData * 2)(CapabilityData(mask, mask, 0), CapabilityData(0, 0, 0))
    succeed("capset", libc.capset(ctypes.byref(header), ctypes.byref(data)))


def give_up_root(user: int | None, *, read_libraries: bool) -> None:
    """Become ``user`` without capabilities.

    Args:
        user: None keeps the user and only drops capabilities.
        read_libraries: keep the capability to read other users' files, which Landlock then restricts. The interpreter
            may be in root's home.
    """
    if user is not None:
        prctl("prctl(PR_SET_KEEPCAPS)", PR_SET_KEEPCAPS, 1)
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    keep_capabilities(1 << CAP_DAC_READ_SEARCH if read_libraries else 0)


def limit_resources(limits: dict[str, int]) -> None:
    for name, value in limits.items():
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def filter_system_calls(program: bytes) -> None:
    instructions = ctypes.create_string_buffer(program, len(program))
    attributes = FilterProgram(len(program) // 8, ctypes.cast(instructions, ctypes.c_void_p))
    prctl("prctl(PR_SET_SECCOMP)", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(attributes))


def confine(job: dict[str, Any]) -> None:
    """Put every layer in place; raises OSError if one fails."""
    if os.getuid() == 0:
        give_up_root(job["user"], read_libraries=job["landlock"])
    prctl("prctl(PR_SET_PDEATHSIG)", PR_SET_PDEATHSIG, int(signal.SIGKILL))
    prctl("prctl(PR_SET_NO_NEW_PRIVS)", PR_SET_NO_NEW_PRIVS, 1)
    limit_resources(job["resources"])
    if job["landlock"]:
        read_nothing_but(job["roots"])
    filter_system_calls(bytes.fromhex(job["filter"]))


def run(job: dict[str, Any], result: int | None) -> None:
    """Run the program; if the job has a function, call it and write its result as JSON to ``result``."""
    function = job["function"]
    module = ModuleType("solution" if function else "__main__")
    sys.modules[module.__name__] = module
    sys.argv = ["solution.py"]
    exec("from typing import *\nfrom collections import *\n", module.__dict__)
    exec(compile(job["source"], "solution.py", "exec"), module.__dict__)
    if function:
        solution: Any = getattr(module, "Solution", None)
        owner: Any = solution() if hasattr(solution, function) else module
        value = getattr(owner, function)(*job["arguments"])
        # numpy scalars and arrays convert with tolist().
        text = json.dumps(value, default=lambda other: other.tolist())
        assert result is not None
        with os.fdopen(result, "w") as file:
            file.write(text)


def main() -> None:
    with open(int(sys.argv[1]), "rb") as file:
        job = json.load(file)
    result = None
    if job["function"]:
        result = os.dup(1)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.close(nowhere)
    # Drop the empty entry, which means the working directory.
    sys.path[:] = [folder for folder in sys.path if folder] + job["libraries"]
    confine(job)
    os.write(2, READY)
    run(job, result)


if __name__ == "__main__":
    main()
