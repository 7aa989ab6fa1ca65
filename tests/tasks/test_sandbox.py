"""Hostile programs gain nothing, do no harm and leave nothing behind; honest ones are scored correctly."""

from __future__ import annotations

import contextlib
import ctypes.util
import json
import os
import socket
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.processes import run
from tests.tasks.hostile import (
    CAN_BE_ANOTHER_USER,
    HARMLESS_OUTSIDE,
    PROGRAMS,
    RIGHT,
    as_another_user,
    attempt,
    canary_file,
    gains,
    private_file,
    response,
    source,
)
from verl_troll.tasks.rewards import _inside, code, sandbox

SEARCH = """
import gc, os, re, sys
found = []
def look(text):
    found.extend(re.findall("SECRET-[0-9a-f]{16}", str(text)))
frame = sys._getframe()
while frame:
    look(frame.f_locals)
    look(frame.f_globals)
    frame = frame.f_back
for item in gc.get_objects():
    if isinstance(item, (dict, list, tuple)):
        look(item)
parent = f"/proc/{os.getppid()}"
paths = [PATH, "/proc/self/environ", "/proc/self/cmdline", f"{parent}/cmdline", f"{parent}/environ", f"{parent}/mem"]
for path in paths:
    try:
        look(open(path, errors="replace").read())
    except OSError:
        pass
for number in [0, *range(3, 64)]:
    try:
        look(os.pread(number, 1 << 20, 0))
    except OSError:
        pass
print(found[0] if found else "nothing")
"""


@pytest.fixture
def canary() -> Iterator[Path]:
    with canary_file() as path:
        yield path


@pytest.fixture(params=[0o700, 0o000], ids=["root's alone", "nobody's"])
def private(request: pytest.FixtureRequest) -> Iterator[Path]:
    with private_file(request.param) as path:
        yield path


@pytest.fixture(params=["all layers", pytest.param("without the user", marks=pytest.mark.slow)])
def layers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """As root, the second case leaves out the separate user: it shows what the other layers stop on their own."""
    if request.param == "without the user":
        if os.geteuid() != 0:
            pytest.skip("the layer exists for root alone")
        monkeypatch.setenv(sandbox.WITHOUT, "user")
    return str(request.param)


@pytest.mark.parametrize("name", [name for name in PROGRAMS if "PRIVATE" in PROGRAMS[name]])
def test_what_is_in_a_closed_folder_stays_unknown(name: str, private: Path, layers: str) -> None:
    if private.parent.stat().st_mode & 0o700 and (os.geteuid() != 0 or layers == "without the user"):
        pytest.skip("the folder is the program's own")
    result = code.compute_score("x", response(name, private=str(private)), RIGHT)
    assert (result["score"], result["answered"]) == (0, 1)


@pytest.mark.parametrize("name", PROGRAMS)
def test_hostile_program_scores_zero_and_does_no_harm(name: str, canary: Path, layers: str) -> None:
    begin = time.monotonic()
    assert attempt(name, canary, Path("/tmp/none")) == []
    # The wall-clock limit of 2 s, plus starting an interpreter on a busy machine.
    assert time.monotonic() - begin < 2 + 20


@pytest.mark.parametrize("name", HARMLESS_OUTSIDE)
def test_hostile_program_would_succeed_without_a_sandbox(name: str, canary: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        # The program's parent must be a process that may be harmed.
        shell = ["sh", "-c", '"$0" -c "$1"; true', sys.executable, source(name, str(canary), port, str(canary))]
        result = run(shell)
    assert result.stdout.endswith("right\n"), result.stderr


def test_limits_are_named_as_the_reason() -> None:
    limits = sandbox.Limits(processor_seconds=1, wall_seconds=2)
    assert sandbox.run("while True: pass", limits=limits).ended == "time"
    assert sandbox.run("import time; time.sleep(100)", limits=limits).ended == "time"
    many = sandbox.run(PROGRAMS["huge output"], limits=limits)
    assert many.ended == "output"
    assert len(many.output) <= limits.output + (1 << 16)
    memory = sandbox.run(PROGRAMS["memory in steps"], limits=sandbox.Limits(memory=1 << 28))
    assert memory.ended == "failed"
    assert "MemoryError" in memory.errors
    # As root, the kernel refuses the thread; otherwise the caller ends the program.
    threads = sandbox.run(PROGRAMS["threads"], limits=limits)
    assert threads.ended == "threads" or "can't start new thread" in threads.errors


def test_no_expected_output_is_within_reach(canary: Path) -> None:
    """The program looks for a secret in every object of its interpreter and every file it can think of."""
    secret = "SECRET-" + os.urandom(8).hex()
    canary.write_text(secret)
    search = f"PATH = {str(canary)!r}\n" + SEARCH
    outcome = sandbox.run(search, data="question")
    assert (outcome.ended, outcome.output) == ("finished", b"nothing\n"), outcome.errors
    truth = json.dumps({"inputs": ["question"], "outputs": [secret]})
    assert code.compute_score("x", f"```python\n{search}\n```", truth)["score"] == 0


def test_what_landlock_does_not_cover_is_as_documented(canary: Path) -> None:
    (canary.parent / "link").symlink_to("target")
    program = f"""
import os
PATH = {str(canary)!r}
attempts = {{
    "stat": lambda: os.stat(PATH),
    "access": lambda: os.access(PATH, os.F_OK) or os.stat(""),
    "readlink": lambda: os.readlink(os.path.dirname(PATH) + "/link"),
    "O_PATH": lambda: os.open(PATH, os.O_PATH),
    "read": lambda: open(PATH),
    "list": lambda: os.listdir(os.path.dirname(PATH)),
    "read what O_PATH names": lambda: open(f"/proc/self/fd/{{os.open(PATH, os.O_PATH)}}"),
    "attributes": lambda: os.listxattr(PATH),
    "state of the file system": lambda: os.statvfs(PATH),
    "folder of a process": lambda: os.readlink(f"/proc/{{os.getppid()}}/cwd"),
}}
for name, what in attempts.items():
    try:
        what()
        print(name)
    except OSError:
        pass
"""
    learnt = sandbox.run(program).output.decode().splitlines()
    assert learnt == ["stat", "access", "readlink", "O_PATH"]


def test_programs_run_at_once_up_to_the_number_of_slots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    held, most, lock = set[int](), [0], threading.Lock()

    def hold() -> None:
        with sandbox.slot(2) as index:
            with lock:
                assert index not in held
                held.add(index)
                most[0] = max(most[0], len(held))
            time.sleep(0.05)
            with lock:
                held.remove(index)

    threads = [threading.Thread(target=hold) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [2]


@pytest.mark.parametrize("count", [0, 257])
def test_impossible_number_of_slots_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"slots={count}: must be 1 to 256"), sandbox.slot(count):
        pass


def test_unknown_layer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(sandbox.WITHOUT, "seccomp")
    with pytest.raises(
        sandbox.SandboxError, match=r"VERL_TROLL_SANDBOX_WITHOUT='seccomp' is not a list of \['landlock'"
    ):
        sandbox.waived()


def test_kernel_without_landlock_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Landlock's version is faked: no kernel without it is available here."""
    monkeypatch.setattr(_inside, "landlock_version", lambda: 0)
    with pytest.raises(sandbox.SandboxError, match=r"no Landlock.*VERL_TROLL_SANDBOX_WITHOUT=landlock allows"):
        sandbox.require.__wrapped__()


def test_sandbox_that_lets_programs_escape_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "ALLOWED_CALLS", sandbox.ALLOWED_CALLS + " socket")
    sandbox.system_call_filter.cache_clear()
    try:
        with pytest.raises(sandbox.SandboxError, match=r"could \['network'\]"):
            sandbox.require.__wrapped__()
    finally:
        sandbox.system_call_filter.cache_clear()


def test_layer_that_cannot_be_had_is_an_error_and_not_a_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "system_call_filter", lambda: b"\xff" * 8)
    with pytest.raises(sandbox.SandboxError, match=r"(?s)did not start.*PR_SET_SECCOMP"):
        code.compute_score("x", "```python\nprint('right')\n```", RIGHT)


def test_missing_libseccomp_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: None)
    monkeypatch.delitem(sys.modules, "pyseccomp", raising=False)
    sandbox.system_call_filter.cache_clear()
    try:
        with pytest.raises(sandbox.SandboxError, match="apt-get install libseccomp2"):
            sandbox.system_call_filter()
    finally:
        sandbox.system_call_filter.cache_clear()


@pytest.mark.slow
@pytest.mark.skipif(not CAN_BE_ANOTHER_USER, reason="another user can only be had by root, with setpriv")
def test_caller_that_is_not_root() -> None:
    assert gains(list(PROGRAMS), another_user=True) == {name: [] for name in PROGRAMS}
    right = "from verl_troll.tasks.rewards import sandbox\nprint(sandbox.run('print(7)').output)"
    assert as_another_user([sys.executable, "-c", right]) == "b'7\\n'\n"


CAP_SETPCAP = 8


def test_program_has_no_capability_and_can_gain_none(monkeypatch: pytest.MonkeyPatch, layers: str) -> None:
    seen: list[dict[str, str]] = []

    def look(pid: int) -> int:
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            seen.append({key: value.strip() for key, _, value in (line.partition(":") for line in lines)})
        return 1

    monkeypatch.setattr(sandbox, "_threads", look)
    assert sandbox.run("import time\ntime.sleep(1)\nprint('right')").output == b"right\n"
    # Those before it are of the start; the filter is the last layer.
    status = next(status for status in seen if status["Seccomp"] == "2")
    assert status["NoNewPrivs"] == "1"
    sets = ["CapInh", "CapPrm", "CapEff", "CapAmb"]
    if int(Path("/proc/self/status").read_text().split("CapEff:")[1].split()[0], 16) >> CAP_SETPCAP & 1:
        sets.append("CapBnd")
    assert {name: int(status[name], 16) for name in sets} == dict.fromkeys(sets, 0)
    if os.geteuid() == 0 and layers == "all layers":
        assert status["Uid"].split() == status["Gid"].split() == [str(sandbox.FIRST_USER)] * 4
        assert status["Groups"] == ""


@pytest.fixture
def closed_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The only library of the sandbox, in a folder of a folder that is root's alone."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "project", "library")
        package = library / "hidden"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("")
        (package / "part.py").write_text("VALUE = 7")
        (library.parent / "neighbour").write_text("right")
        roots = (*sandbox.readable_roots(), str(library))
        monkeypatch.setattr(sandbox, "readable_roots", lambda: roots)
        monkeypatch.setattr(sysconfig, "get_path", lambda name: str(library))
        yield library


@pytest.mark.skipif(os.geteuid() != 0, reason="folders of one's own are not closed")
@pytest.mark.parametrize("mounts", [True, False])
def test_libraries_in_root_s_home_are_read_and_their_neighbours_stay_unknown(
    closed_library: Path, mounts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if mounts and _inside.libc.syscall(_inside.OPEN_TREE, _inside.AT_FDCWD, b"/usr", _inside.OPEN_TREE_CLONE) < 0:
        pytest.skip("this root may not mount")
    if not mounts:
        # A number that no call has, as where the call is forbidden.
        inside = sandbox._inside_text().replace("= 428,", "= 999_999,")
        monkeypatch.setattr(sandbox, "_inside_text", lambda: inside)
    program = "import hidden.part\nprint(hidden.part.VALUE)\n"
    assert sandbox.run(program).output == b"7\n"
    outcome = sandbox.run(f"import os\nos.stat({str(closed_library.parent / 'neighbour')!r})")
    assert (outcome.ended, "PermissionError" in outcome.errors) == ("failed", True)
    through = "import os, hidden\nprint(os.path.exists(os.path.dirname(hidden.__path__[0]) + '/../neighbour'))"
    # docs/tasks.md says so of a root that may not mount.
    assert sandbox.run(through).output == (b"False\n" if mounts else b"True\n")


@pytest.mark.skipif(os.geteuid() != 0, reason="folders of one's own are not closed")
def test_libraries_that_another_user_may_not_read_are_an_error(closed_library: Path) -> None:
    closed_library.chmod(0o700)
    with pytest.raises(sandbox.SandboxError, match="user ids of the sandbox may not read the libraries"):
        sandbox.run("print('right')")
