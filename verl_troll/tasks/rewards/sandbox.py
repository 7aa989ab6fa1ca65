"""Runs untrusted programs: one process, no network, no writing, only libraries to read.

The operating system provides the layers, without root or a container runtime:

- seccomp: allows only the system calls that a computation needs: no new processes, no sockets, no signals, no files
  opened for writing.
- Landlock: only the interpreter's libraries can be read.
- resource limits: memory, CPU time, open files, file size.
- no capabilities; if the caller is root: a separate user, for which the kernel also limits the number of threads.
- the caller: limits wall-clock time, output size and number of threads, and ends the program by SIGKILL. Since the
  program has one process, nothing of it survives.

:func:`require` fails if a layer is missing. ``VERL_TROLL_SANDBOX_WITHOUT`` lists layers that may be missing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import os
import platform
import selectors
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from verl_troll.tasks.rewards import _inside

WITHOUT = "VERL_TROLL_SANDBOX_WITHOUT"
WAIVABLE = {"landlock": "programs can then read every file that their user can", "user": "programs then run as root"}

FIRST_USER = 60706
"""First of the user ids, one per slot; outside the ranges that Debian and systemd allocate."""
MAX_SLOTS = 256
ARCHITECTURES = {"x86_64": "X86_64", "aarch64": "AARCH64"}
"""libseccomp's names, by :func:`platform.machine`."""
START_SECONDS = 60.0
"""How long an interpreter may take to set up the sandbox, even on a busy machine."""

ALLOWED_CALLS = """
read write readv writev pread64 pwrite64 lseek close close_range dup dup2 dup3
fstat stat lstat newfstatat statx access faccessat faccessat2 readlink readlinkat getdents64 getcwd
mmap munmap mremap mprotect madvise brk membarrier
rt_sigaction rt_sigprocmask rt_sigreturn rt_sigtimedwait sigaltstack restart_syscall
alarm setitimer getitimer pause
futex set_robust_list get_robust_list rseq gettid getpid getppid getuid geteuid getgid getegid
sched_yield sched_getaffinity getcpu
clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time times getrusage getrandom uname sysinfo getrlimit
poll ppoll select pselect6 epoll_create1 epoll_ctl epoll_wait epoll_pwait eventfd2 pipe2
exit exit_group
"""


class SandboxError(RuntimeError):
    """The sandbox itself failed; never caused by the program inside."""


@dataclass(frozen=True)
class Limits:
    """Limits of one run.

    Attributes:
        processor_seconds: CPU time over all threads, at least 1.
        wall_seconds: wall-clock time from the program's start.
        memory: address space, in bytes.
        output: bytes on standard output.
        threads: number of threads.
    """

    processor_seconds: int = 6
    wall_seconds: float = 12.0
    memory: int = 1 << 30
    output: int = 1 << 20
    threads: int = 64


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        ended: ``finished`` with status 0, ``failed`` with another status or a signal, or the limit that ended it.
        output: standard output; for a function, its result as JSON.
        errors: the beginning of standard error.
    """

    ended: Literal["finished", "failed", "time", "output", "threads"]
    output: bytes
    errors: str


@functools.cache
def system_call_filter(machine: str | None = None) -> bytes:
    """The seccomp program.

    Args:
        machine: of the machines in :data:`ARCHITECTURES`; default: this one.

    Raises:
        SandboxError: libseccomp is missing.
    """
    try:
        import pyseccomp
    except (ImportError, RuntimeError, OSError) as error:
        raise SandboxError(
            f"the sandbox needs libseccomp and its Python binding ({error}): apt-get install libseccomp2 and "
            "pip install 'verl_troll[tasks]'"
        ) from error
    argument, same, masked = pyseccomp.Arg, pyseccomp.EQ, pyseccomp.MASKED_EQ
    # The C library falls back if a call does not exist (ENOSYS), but not if it is forbidden (EPERM).
    rules = pyseccomp.SyscallFilter(pyseccomp.ERRNO(errno.ENOSYS))
    architecture = getattr(pyseccomp.Arch, ARCHITECTURES[machine or platform.machine()])
    if architecture != pyseccomp.system_arch():
        rules.add_arch(architecture)
        rules.remove_arch(pyseccomp.Arch.NATIVE)

    def allow(name: str, *conditions: Any) -> None:
        # Negative: the architecture has no such call (aarch64 has no open), or this libseccomp does not know it.
        if pyseccomp.resolve_syscall(architecture, name) >= 0:
            rules.add_rule(pyseccomp.ALLOW, name, *conditions)

    for name in ALLOWED_CALLS.split():
        allow(name)
    not_reading = os.O_ACCMODE | os.O_CREAT | os.O_TRUNC
    allow("open", argument(1, masked, not_reading, 0))
    allow("openat", argument(2, masked, not_reading, 0))
    clone_thread = 0x10000
    allow("clone", argument(0, masked, clone_thread, clone_thread))
    allow("prlimit64", argument(0, same, 0))
    for command in (fcntl.F_DUPFD, fcntl.F_DUPFD_CLOEXEC, fcntl.F_GETFD, fcntl.F_SETFD, fcntl.F_GETFL, fcntl.F_SETFL):
        allow("fcntl", argument(1, same, command))
    tcgets, fioclex, fionbio, fionread = 0x5401, 0x5451, 0x5421, 0x541B
    for command in (tcgets, fioclex, fionbio, fionread):
        allow("ioctl", argument(1, same, command))
    with tempfile.TemporaryFile() as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()


@functools.cache
def readable_roots() -> tuple[str, ...]:
    """Files and folders that programs may read: the libraries of the system and of this interpreter."""
    paths = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    paths += [os.path.join(sys.base_prefix, "lib"), "/usr/lib", "/usr/lib64", "/lib", "/lib64"]
    paths += ["/etc/ld.so.cache", "/dev/null", "/dev/zero", "/dev/urandom"]
    return tuple(dict.fromkeys(os.path.realpath(path) for path in paths if os.path.exists(path)))


def waived() -> frozenset[str]:
    """Layers that the user allows to be missing.

    Raises:
        SandboxError: a name is not a waivable layer.
    """
    names = frozenset(name.strip() for name in os.environ.get(WITHOUT, "").split(",") if name.strip())
    if not names <= WAIVABLE.keys():
        raise SandboxError(
            f"{WITHOUT}={os.environ[WITHOUT]!r} is not a list of {sorted(WAIVABLE)}, separated by commas"
        )
    return names


def default_slots() -> int:
    """One slot per core of this process."""
    return min(len(os.sched_getaffinity(0)), MAX_SLOTS)


@contextlib.contextmanager
def slot(count: int) -> Iterator[int]:
    """Hold one of ``count`` slots, shared by all processes of this user on this machine; waits for a free one.

    Raises:
        SandboxError: the folder of the slots belongs to another user.
    """
    if not 1 <= count <= MAX_SLOTS:
        raise ValueError(f"slots={count}: must be 1 to {MAX_SLOTS}")
    folder = Path(tempfile.gettempdir(), f"verl_troll-sandbox-{os.geteuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.lstat().st_uid != os.geteuid():
        raise SandboxError(f"{folder} belongs to another user: remove it, or set TMPDIR")
    while True:
        for index in range(count):
            with open(folder / str(index), "wb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                yield index
                return
        time.sleep(0.01)


def run(
    source: str,
    *,
    data: str = "",
    function: str | None = None,
    arguments: list[Any] | None = None,
    limits: Limits | None = None,
    slot_index: int = 0,
) -> Outcome:
    """Run a program, or one of its functions.

    Args:
        source: Python code. Characters that UTF-8 cannot encode are replaced.
        data: the program's standard input.
        function: call this function, or method of a class ``Solution``, instead of running a script.
        arguments: the function's arguments, as JSON values.
        limits: default :class:`Limits`.
        slot_index: from :func:`slot`; selects the user id if the caller is root.

    Raises:
        SandboxError: the sandbox could not be set up.
    """
    limits = limits or Limits()
    without = waived()
    resources = {
        "RLIMIT_AS": limits.memory,
        "RLIMIT_CPU": limits.processor_seconds,
        "RLIMIT_FSIZE": 0,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_CORE": 0,
        "RLIMIT_STACK": 64 << 20,
        "RLIMIT_MEMLOCK": 0,
        "RLIMIT_MSGQUEUE": 0,
    }
    if os.geteuid() == 0 and "user" not in without:
        # For the caller's own user, the limit would count the caller's threads too.
        resources["RLIMIT_NPROC"] = limits.threads
    job = {
        "source": source,
        "function": function,
        "arguments": arguments or [],
        "resources": resources,
        "landlock": "landlock" not in without,
        "roots": readable_roots(),
        "libraries": [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")],
        "user": None if "user" in without else FIRST_USER + slot_index,
        "filter": system_call_filter().hex(),
    }
    with _memory_file(json.dumps(job).encode()) as job_file, _memory_file(data.encode(errors="replace")) as input_file:
        process = subprocess.Popen(
            [sys.executable, "-S", "-s", "-B", "-c", _inside_text(), str(job_file)],
            stdin=input_file,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(job_file,),
            cwd="/",
            env=_environment(),
            start_new_session=True,
        )
    with process:
        try:
            ended, output, errors = _watch(process, limits)
        finally:
            process.kill()
    if not errors.startswith(_inside.READY):
        text = errors.decode(errors="replace")[-2000:]
        raise SandboxError(f"the sandbox did not start ({ended}, status {process.returncode}): {text}")
    return Outcome(ended, output, errors[len(_inside.READY) :].decode(errors="replace"))


def _watch(
    process: subprocess.Popen[bytes], limits: Limits
) -> tuple[Literal["finished", "failed", "time", "output", "threads"], bytes, bytes]:
    assert process.stdout is not None
    assert process.stderr is not None
    deadline = time.monotonic() + START_SECONDS
    started = False
    output, errors = bytearray(), bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ, output)
        selector.register(process.stderr, selectors.EVENT_READ, errors)
        while process.poll() is None or selector.get_map():
            if time.monotonic() > deadline:
                return "time", bytes(output), bytes(errors)
            if not selector.get_map():
                time.sleep(0.005)
            for key, _ in selector.select(0.05):
                chunk = os.read(key.fd, 1 << 16)
                if not chunk:
                    selector.unregister(key.fileobj)
                elif key.data is output:
                    output += chunk
                elif len(errors) < 4096:
                    errors += chunk
            if not started and errors.startswith(_inside.READY):
                started, deadline = True, time.monotonic() + limits.wall_seconds
            if len(output) > limits.output:
                return "output", bytes(output), bytes(errors)
            if _threads(process.pid) > limits.threads:
                return "threads", bytes(output), bytes(errors)
    if process.returncode in (-signal.SIGKILL, -signal.SIGXCPU):
        return "time", bytes(output), bytes(errors)
    return ("finished" if process.returncode == 0 else "failed"), bytes(output), bytes(errors)


def _threads(pid: int) -> int:
    try:
        # The pid cannot be reused before this process has waited for its child.
        return len(os.listdir(f"/proc/{pid}/task"))
    except OSError:
        return 0


@functools.cache
def _inside_text() -> str:
    return Path(_inside.__file__).read_text()


def _environment() -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "PYTHONHOME") if name in os.environ}
    return {
        **kept,
        "PATH": "/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "PYTHONUTF8": "1",
        # Make the output reproducible.
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }


@contextlib.contextmanager
def _memory_file(content: bytes) -> Iterator[int]:
    """An anonymous, sealed file, positioned at its start."""
    handle = os.memfd_create("sandbox", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with open(handle, "wb", closefd=False) as file:
            file.write(content)
        os.lseek(handle, 0, os.SEEK_SET)
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
        fcntl.fcntl(handle, fcntl.F_ADD_SEALS, seals)
        yield handle
    finally:
        os.close(handle)


# Prints the forbidden actions that were possible.
_PROBE = """
import os, socket, sys
def possible(what):
    try:
        what()
    except OSError:
        return False
    return True
attempts = {
    "read": lambda: open(sys.stdin.readline().strip()),
    "write": lambda: open("/dev/null", "w"),
    "network": lambda: socket.socket(),
    "process": lambda: os.fork() or os._exit(0),
    "signal": lambda: os.kill(os.getppid(), 0),
}
print(" ".join(name for name, what in attempts.items() if possible(what)))
"""


@functools.cache
def require() -> None:
    """Check with a real run that this machine has every layer that is not waived.

    Raises:
        SandboxError: says which layer is missing and what to do.
    """
    without = waived()
    waiver = f"; {WITHOUT}={{}} allows it to be missing ({{}})"
    if sys.platform != "linux" or platform.machine() not in ARCHITECTURES:
        raise SandboxError(f"the sandbox runs on Linux, x86_64 and aarch64, not on {sys.platform} {platform.machine()}")
    if "landlock" not in without and _inside.landlock_version() == 0:
        raise SandboxError(
            "the kernel offers no Landlock, which keeps programs from reading files: it needs Linux 5.13 with landlock "
            "among the security modules (lsm=), and a container runtime that allows its system calls"
            + waiver.format("landlock", WAIVABLE["landlock"])
        )
    with tempfile.NamedTemporaryFile() as canary:
        try:
            with slot(default_slots()) as index:
                outcome = run(_PROBE, data=canary.name, slot_index=index, limits=Limits(wall_seconds=30))
        except SandboxError as error:
            hint = waiver.format("user", WAIVABLE["user"]) if os.geteuid() == 0 and "user" not in without else ""
            raise SandboxError(f"{error}{hint}") from error
    escaped = set(outcome.output.decode().split())
    if outcome.ended != "finished":
        raise SandboxError(f"the sandbox's probe ended with {outcome.ended}: {outcome.errors}")
    if "landlock" in without:
        escaped.discard("read")
    if escaped:
        raise SandboxError(f"programs in the sandbox could {sorted(escaped)}: this machine does not enforce its limits")
