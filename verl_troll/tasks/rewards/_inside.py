"""Runs inside the sandboxed process: confines itself, then runs the program.

:mod:`verl_troll.tasks.rewards.sandbox` passes this file's text to a fresh interpreter with ``-c``, so it uses only the
standard library. The job arrives as JSON through a file descriptor. ``READY`` on standard error means that every layer
is in place; anything written before it is a setup error, not the program's output.
"""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import errno
import json
import os
import resource
import signal
import site
import stat
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NoReturn

READY = b"\0ready\n"

# Of names in several modules, the last module's counts.
PROVIDED = """
typing string re datetime heapq bisect copy math random statistics itertools functools operator io sys json collections
"""
# As graders of such problems set it: recursion over a whole input is common there.
RECURSION_LIMIT = 600_000

PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_CAPBSET_READ, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 22, 23, 24, 38
SECCOMP_MODE_FILTER = 2
LINUX_CAPABILITY_VERSION_3 = 0x20080522
AT_FDCWD, AT_RECURSIVE, OPEN_TREE_CLONE = -100, 0x8000, 1
# System call numbers, the same on every architecture.
OPEN_TREE, CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 428, 444, 445, 446
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


def read_nothing_but(roots: dict[str, int]) -> None:
    """Landlock: allow reading below ``roots`` and no other file access, no TCP, no signals to outside processes.

    Args:
        roots: open files and folders by their paths.
    """
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
    for root, handle in roots.items():
        allowed = READ_FILE | (READ_DIR if stat.S_ISDIR(os.fstat(handle).st_mode) else 0)
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
    succeed(
        "landlock_restrict_self",
        libc.syscall(ctypes.c_long(RESTRICT_SELF), ctypes.c_int(ruleset), ctypes.c_uint32(0)),
    )
    os.close(ruleset)


def open_roots(paths: list[str]) -> dict[str, int]:
    """Open those of the files and folders that exist.

    Each is a mount of its own if the caller may mount: no ``..`` leads out of a mount.
    """
    roots = {}
    for path in paths:
        handle: int = libc.syscall(
            ctypes.c_long(OPEN_TREE),
            ctypes.c_int(AT_FDCWD),
            os.fsencode(path),
            ctypes.c_uint(OPEN_TREE_CLONE | AT_RECURSIVE | os.O_CLOEXEC),
        )
        if handle < 0:
            try:
                handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
        roots[path] = handle
    return roots


def give_up_privileges(user: int | None) -> None:
    """Drop every capability, for good, and become ``user``; None keeps the user."""
    for capability in range(64):
        # Fails without CAP_SETPCAP. What remains in this set is gained by exec alone, not with PR_SET_NO_NEW_PRIVS.
        if libc.prctl(PR_CAPBSET_READ, ctypes.c_ulong(capability)) == 1:
            libc.prctl(PR_CAPBSET_DROP, ctypes.c_ulong(capability), *[ctypes.c_ulong(0)] * 3)
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    header = CapabilityHeader(LINUX_CAPABILITY_VERSION_3, 0)
    succeed("capset", libc.capset(ctypes.byref(header), ctypes.byref((CapabilityData * 2)())))


def import_paths() -> Iterator[list[str]]:
    """The lists of folders that modules and their submodules are imported from."""
    yield sys.path
    for module in sys.modules.values():
        paths = getattr(module, "__path__", None)
        if isinstance(paths, list):
            yield paths


def import_through(roots: dict[str, int]) -> None:
    """Import through an open root what the user cannot reach by its path, and close the other roots.

    The interpreter may be in root's home, which other users may not enter.
    """
    needed = set()

    def reach(path: str) -> str:
        for root, handle in roots.items():
            if (path + "/").startswith(root + "/") and not os.access(root, os.R_OK | os.X_OK):
                opened = f"/proc/self/fd/{handle}"
                if not os.access(opened, os.R_OK | os.X_OK):
                    raise PermissionError(errno.EACCES, "user ids of the sandbox may not read the libraries", root)
                needed.add(handle)
                return opened + path[len(root) :]
        return path

    for paths in import_paths():
        paths[:] = map(reach, paths)
    sys.path_importer_cache.clear()
    for handle in set(roots.values()) - needed:
        os.close(handle)


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
    roots = open_roots(job["roots"])
    give_up_privileges(job["user"] if os.geteuid() == 0 else None)
    prctl("prctl(PR_SET_PDEATHSIG)", PR_SET_PDEATHSIG, int(signal.SIGKILL))
    prctl("prctl(PR_SET_NO_NEW_PRIVS)", PR_SET_NO_NEW_PRIVS, 1)
    limit_resources(job["resources"])
    if job["landlock"]:
        read_nothing_but(roots)
    import_through(roots)
    filter_system_calls(bytes.fromhex(job["filter"]))


def provided_names() -> dict[str, Any]:
    """What graders of such problems import before a program; names of built-in functions keep their meaning."""
    names: dict[str, Any] = {}
    for name in PROVIDED.split():
        exec(f"from {name} import *", names)
    for name in dir(builtins):
        names.pop(name, None)
    return names | {name: sys.modules[name] for name in PROVIDED.split()}


def flush_at_exit() -> None:
    """Let ``os._exit`` write what was printed: in a pipe, unlike in a terminal, it would be lost."""
    leave = os._exit

    def flush_and_leave(status: int) -> NoReturn:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        leave(status)

    os._exit = flush_and_leave


def run(job: dict[str, Any], result: int | None) -> None:
    """Run the program; if the job has a function, call it and write its result as JSON to ``result``."""
    function = job["function"]
    module = ModuleType("solution" if function else "__main__")
    sys.modules[module.__name__] = module
    sys.argv = ["solution.py"]
    # exit and quit, which an interpreter without site lacks.
    site.setquit()
    flush_at_exit()
    module.__dict__.update(provided_names())
    code = compile(job["source"], "solution.py", "exec")
    sys.setrecursionlimit(RECURSION_LIMIT)
    exec(code, module.__dict__)
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
    for paths in import_paths():
        paths[:] = map(os.path.realpath, paths)
    confine(job)
    os.write(2, READY)
    run(job, result)


if __name__ == "__main__":
    main()
