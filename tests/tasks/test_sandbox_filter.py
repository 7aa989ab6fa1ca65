"""What the sandbox's seccomp filter allows, on machines that are not at hand too."""

from __future__ import annotations

import errno
import os
import platform

import pyseccomp
import pytest

from tests.tasks import bpf
from verl_troll.tasks.rewards import sandbox

# Number and arguments of a call in the kernel's generic table, and whether it is allowed.
AARCH64: dict[str, tuple[tuple[int, ...], bool]] = {
    "openat for reading": ((56, -100, 0, os.O_RDONLY | os.O_CLOEXEC), True),
    "openat for writing": ((56, -100, 0, os.O_WRONLY), False),
    "openat for both": ((56, -100, 0, os.O_RDWR), False),
    "openat that creates": ((56, -100, 0, os.O_RDONLY | os.O_CREAT), False),
    "openat that truncates": ((56, -100, 0, os.O_RDONLY | os.O_TRUNC), False),
    "openat of an unnamed file": ((56, -100, 0, os.O_TMPFILE | os.O_RDWR), False),
    "openat2": ((437,), False),
    "newfstatat": ((79,), True),
    "getdents64": ((61,), True),
    "readlinkat": ((78,), True),
    "faccessat": ((48,), True),
    "read": ((63,), True),
    "write": ((64,), True),
    "mmap": ((222,), True),
    "futex": ((98,), True),
    "exit_group": ((94,), True),
    "clone of a thread": ((220, 0x3D0F00), True),
    "clone of a process": ((220, 17), False),
    "clone3": ((435,), False),
    "execve": ((221,), False),
    "execveat": ((281,), False),
    "unlinkat": ((35,), False),
    "renameat2": ((276,), False),
    "linkat": ((37,), False),
    "mkdirat": ((34,), False),
    "truncate": ((45,), False),
    "fchmodat": ((53,), False),
    "utimensat": ((88,), False),
    "kill": ((129,), False),
    "tgkill": ((131,), False),
    "socket": ((198,), False),
    "ptrace": ((117,), False),
    "process_vm_readv": ((270,), False),
    "mount": ((40,), False),
    "open_tree": ((428,), False),
    "unshare": ((97,), False),
    "setns": ((268,), False),
    "chroot": ((51,), False),
    "chdir": ((49,), False),
    "setresuid": ((147,), False),
    "capset": ((91,), False),
    "prctl": ((167,), False),
    "seccomp": ((277,), False),
    "bpf": ((280,), False),
    "io_uring_setup": ((425,), False),
    "memfd_create": ((279,), False),
    "landlock_restrict_self": ((446,), False),
    "own limits": ((261, 0), True),
    "limits of another process": ((261, 1), False),
    "fcntl that reads flags": ((25, 0, 3), True),
    "fcntl that names an owner": ((25, 0, 8), False),
    "ioctl of a terminal": ((29, 0, 0x5401), True),
    "ioctl that types into a terminal": ((29, 0, 0x5412), False),
}


@pytest.mark.parametrize("name", AARCH64)
def test_filter_of_aarch64(name: str) -> None:
    """No machine of that kind is needed: libseccomp builds the filter, and it is run here."""
    call, allowed = AARCH64[name]
    decision = bpf.decide(sandbox.system_call_filter("aarch64"), bpf.AUDIT_ARCH["aarch64"], *call)
    assert decision == (bpf.ALLOW if allowed else 0x50000 | errno.ENOSYS)


def test_every_allowed_call_is_one() -> None:
    for name in sandbox.ALLOWED_CALLS.split():
        assert pyseccomp.resolve_syscall(pyseccomp.Arch.X86_64, name) >= 0, name


@pytest.mark.parametrize("machine", bpf.AUDIT_ARCH)
def test_filter_allows_the_named_calls_and_no_other(machine: str) -> None:
    architecture = getattr(pyseccomp.Arch, sandbox.ARCHITECTURES[machine])
    conditional = ["open", "openat", "clone", "prlimit64", "fcntl", "ioctl"]
    named = {pyseccomp.resolve_syscall(architecture, name) for name in sandbox.ALLOWED_CALLS.split() + conditional}
    program = sandbox.system_call_filter(machine)
    patterns = [(0,) * 6, (0, 0x5401, 0x5401, 0, 0, 0), (0x10000, 3, 0, 0, 0, 0)]
    # libseccomp's numbers for what an architecture lacks lie around -10,000.
    for call in (*range(-10400, -9990), *range(-10, 600)):
        allowed = any(bpf.decide(program, bpf.AUDIT_ARCH[machine], call, *values) == bpf.ALLOW for values in patterns)
        assert allowed == (call >= 0 and call in named), call


@pytest.mark.parametrize("machine", bpf.AUDIT_ARCH)
def test_calls_of_another_architecture_are_fatal(machine: str) -> None:
    """32-bit processes of the same machine among them: i386 and arm."""
    for other in {*bpf.AUDIT_ARCH.values(), 0x40000003, 0x40000028} - {bpf.AUDIT_ARCH[machine]}:
        assert bpf.decide(sandbox.system_call_filter(machine), other, 0) == bpf.KILL


KERNEL_CASES: list[tuple[str, tuple[int, ...]]] = [
    ("getpid", (0,)),
    ("socket", (2, 1, 0)),
    ("openat", (-100, 0, os.O_RDONLY)),
    ("openat", (-100, 0, os.O_WRONLY)),
    ("openat", (-100, 0, os.O_RDWR | os.O_CREAT)),
    ("fcntl", (0, 3, 0)),
    ("fcntl", (0, 8, 1)),
    ("ioctl", (0, 0x5401, 0)),
    ("ioctl", (0, 0x5412, 0)),
    ("prlimit64", (0, 4, 0, 0)),
    ("prlimit64", (1, 4, 0, 0)),
    ("kill", (1, 0)),
    ("unlinkat", (-100, 0, 0)),
    ("landlock_restrict_self", (-1, 0)),
]


def test_simulated_filter_decides_as_the_kernel() -> None:
    """The same calls, made in the sandbox and given to the simulation."""
    machine = platform.machine()
    architecture = getattr(pyseccomp.Arch, sandbox.ARCHITECTURES[machine])
    numbers = [(pyseccomp.resolve_syscall(architecture, name), *values) for name, values in KERNEL_CASES]
    program = f"""
import ctypes
call = ctypes.CDLL(None, use_errno=True).syscall
for number, *values in {numbers!r}:
    ctypes.set_errno(0)
    call(ctypes.c_long(number), *map(ctypes.c_long, values))
    print(ctypes.get_errno() != {errno.ENOSYS})
"""
    expected = [
        bpf.decide(sandbox.system_call_filter(), bpf.AUDIT_ARCH[machine], *case) == bpf.ALLOW for case in numbers
    ]
    assert True in expected
    assert False in expected
    assert sandbox.run(program).output.decode().split() == [str(allowed) for allowed in expected]
