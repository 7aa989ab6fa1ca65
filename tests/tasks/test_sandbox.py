"""Hostile programs gain nothing, do no harm and leave nothing behind; honest ones are scored correctly."""

from __future__ import annotations

import contextlib
import ctypes.util
import json
import os
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from benchmarks.processes import run
from tests.tasks.hostile import HARMLESS_OUTSIDE, PROGRAMS, response, source
from verl_troll.tasks.rewards import _inside, code, sandbox

RIGHT = json.dumps({"inputs": [""], "outputs": ["right"]})
ROOT = Path(__file__).resolve().parents[2]
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
    """A world-writable file in a world-writable folder."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        path = Path(folder, "canary")
        path.write_text("right")
        path.chmod(0o666)
        yield path


def remaining() -> list[int]:
    """Sandboxed processes among this one's descendants."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "PR_SET_PDEATHSIG" in " ".join(process.cmdline()):
                found.append(process.pid)
    return found


@pytest.fixture(params=["all layers", pytest.param("without the user", marks=pytest.mark.slow)])
def layers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """As root, the second case leaves out the separate user: it shows what the other layers stop on their own."""
    if request.param == "without the user":
        if os.geteuid() != 0:
            pytest.skip("the layer exists for root alone")
        monkeypatch.setenv(sandbox.WITHOUT, "user")
    return str(request.param)


@pytest.mark.parametrize("name", PROGRAMS)
def test_hostile_program_scores_zero_and_does_no_harm(name: str, canary: Path, layers: str) -> None:
    before = canary.stat()
    priority, affinity = os.getpriority(os.PRIO_PROCESS, 0), os.sched_getaffinity(0)
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(type=socket.SOCK_DGRAM) as datagrams:
        port = server.getsockname()[1]
        datagrams.bind(("127.0.0.1", port))
        begin = time.monotonic()
        result = code.compute_score("x", response(name, str(canary), port), RIGHT, processor_seconds=1)
        elapsed = time.monotonic() - begin
        for listener in (server, datagrams):
            listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()
        with pytest.raises(BlockingIOError):
            datagrams.recv(1)
    assert result["score"] == 0
    assert result["answered"] == 1
    # The wall-clock limit of 2 s, plus starting an interpreter on a busy machine.
    assert elapsed < 2 + 20
    assert canary.read_text() == "right"
    assert (canary.stat().st_mode, canary.stat().st_mtime_ns) == (before.st_mode, before.st_mtime_ns)
    assert os.listdir(canary.parent) == [canary.name]
    assert os.getpriority(os.PRIO_PROCESS, 0) == priority
    assert os.sched_getaffinity(0) == affinity
    assert not remaining()


@pytest.mark.parametrize("name", HARMLESS_OUTSIDE)
def test_hostile_program_would_succeed_without_a_sandbox(name: str, canary: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        # The program's parent must be a process that may be harmed.
        shell = ["sh", "-c", '"$0" -c "$1"; true', sys.executable, source(name, str(canary), port)]
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
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="another user can only be had by root")
def test_caller_that_is_not_root(tmp_path: Path) -> None:
    """The caller has one capability more than an ordinary user, since the interpreter may be in root's home."""
    names = ["forks", "overwrite", "read", "network", "kill the parent", "limit the parent", "memory of the parent"]
    canary = tmp_path / "canary"
    canary.write_text("right")
    os.chown(canary, 12345, 12345)
    script = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from tests.tasks.hostile import response
from verl_troll.tasks.rewards import code
assert os.geteuid() == 12345
for name in {names!r}:
    assert code.compute_score("x", response(name, {str(canary)!r}), {RIGHT!r}, processor_seconds=1)["score"] == 0, name
assert code.compute_score("x", "```python\\nprint('right')\\n```", {RIGHT!r})["score"] == 1
print("done")
"""
    command = ["setpriv", "--reuid=12345", "--regid=12345", "--clear-groups", "--inh-caps=+dac_read_search"]
    command += ["--ambient-caps=+dac_read_search", sys.executable, "-c", script]
    environment = {**os.environ, "HOME": "/tmp", "PYTHONDONTWRITEBYTECODE": "1"}
    result = run(command, env=environment)
    assert result.stdout.strip().endswith("done"), result.stderr[-3000:]
    assert canary.read_text() == "right"
