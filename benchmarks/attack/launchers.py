"""What starts runs: hostile words on its command line, and disks that fill while it runs."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from benchmarks import processes
from benchmarks.attack.attack import Attack, Extent, Outcome

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
SCRIPT = "examples/run_qwen3_8b_fsdp.sh"
NOTHING: Mapping[str, str] = {}

WORDS = (
    "",
    " ",
    "two  words",
    "a=b c",
    "it's",
    '"quoted"',
    "'",
    '"',
    "$(touch touched)",
    "`touch touched`",
    "; touch touched",
    "&& touch touched #",
    "| touch touched",
    "> touched",
    "$HOME",
    "${HOME}",
    "$$",
    "!!",
    "*",
    "examples/*",
    "{a,b}",
    "[a-z]*",
    "~",
    "-",
    "--",
    "--help",
    "-c",
    "-x",
    "--cfg=job",
    "line\nbreak",
    "line\r\nbreak",
    "\t",
    "\\",
    "a\\ b",
    "\\n",
    "é漢字\u202e\u2028",
    "\x1b[31m",
    "# comment",
    "a: b",
    "key=[1,2,'x y']",
    "key='a: {b: c}'",
    "~trainer.nnodes",
    "+troll.x=$(id)",
    "%s%n",
    "x" * 5000,
)
NOT_UTF8 = os.fsdecode(b"\xff\xfe")

_PYTHON = f"""#!{sys.executable} -S
import json, os, sys

given = sys.argv[1:]
if given[:2] == ["-m", "verl.trainer.main_ppo"]:
    with open(os.environ["ARRIVED"], "w") as file:
        json.dump(given[2:], file)
    sys.exit(int(os.environ.get("STATUS", "0")))
if given[:1] == ["-"] and len(given) > 1:
    sys.exit()  # slurm.sh waits for Ray's nodes
os.execv({sys.executable!r}, [{sys.executable!r}, *given])
"""
_RAY = f"""#!{sys.executable} -S
import json, os, shlex, subprocess, sys, time

given = sys.argv[1:]
if given[:2] == ["job", "submit"]:
    # As Ray does: joined, run by a shell, with the variables alone.
    values = json.loads(given[given.index("--runtime-env-json") + 1])["env_vars"]
    kept = {{name: os.environ[name] for name in ("PATH", "ARRIVED", "STATUS") if name in os.environ}}
    kept.update((name, os.path.expandvars(value)) for name, value in values.items())
    command = shlex.join(given[given.index("--") + 1:])
    sys.exit(subprocess.run(command, shell=True, env=kept).returncode)
if given[0] == "start":
    time.sleep(600)
"""
_SRUN = f"""#!{sys.executable} -S
import os, sys

words = sys.argv[1:]
while words[0].startswith("--"):
    words.pop(0)
if words[0] == "hostname":
    print("192.0.2.1")
else:
    os.execvp(words[0], words)
"""
_STAND_INS = {"python3": _PYTHON, "ray": _RAY, "srun": _SRUN, "scontrol": "#!/bin/sh\necho node1\n"}


@dataclass(frozen=True)
class Started:
    """What came of starting a launcher; ``arrived`` is verl's command line, if it was started."""

    status: int
    arrived: list[str] | None
    output: str


def _stand_ins(folder: Path) -> str:
    """A ``PATH`` with stand-ins for Python, Ray and Slurm."""
    folder.mkdir(exist_ok=True)
    for name, text in _STAND_INS.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def start(
    command: Sequence[str | Path], folder: Path, variables: Mapping[str, str] = NOTHING, cwd: Path = ROOT
) -> Started:
    """Start a launcher among stand-ins."""
    arrived = folder / "arrived.json"
    arrived.unlink(missing_ok=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "RAY_"))}
    environment = {
        **kept,
        "PATH": _stand_ins(folder / "bin"),
        "ARRIVED": str(arrived),
        "PYTHONPATH": str(ROOT),
        "HOME": str(folder),
        **variables,
    }
    done = processes.run(command, env=environment, cwd=cwd)
    words = json.loads(arrived.read_text()) if arrived.exists() else None
    return Started(done.returncode, words, done.stdout + done.stderr)


_SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NUM_NODES": "1",
    "SLURM_JOB_NODELIST": "node1",
    "SLURM_GPUS_ON_NODE": "8",
    "SLURM_CPUS_ON_NODE": "2",
}


def _run_script(words: Sequence[str], folder: Path, variables: Mapping[str, str]) -> Started:
    return start(["bash", ROOT / SCRIPT, *words], folder, variables)


def _slurm(
    words: Sequence[str], folder: Path, variables: Mapping[str, str], script: str = SCRIPT, cwd: Path = ROOT
) -> Started:
    """In an allocation of one node."""
    return start(["bash", EXAMPLES / "cluster" / "slurm.sh", script, *words], folder, {**_SLURM, **variables}, cwd)


def _ray_job(words: Sequence[str], folder: Path, variables: Mapping[str, str]) -> Started:
    return start(["bash", EXAMPLES / "cluster" / "ray_job.sh", SCRIPT, *words], folder, variables)


def _kuberay(words: Sequence[str], folder: Path, variables: Mapping[str, str]) -> Started:
    import yaml

    # As envsubst does; the settings are quoted for a shell.
    text = (EXAMPLES / "cluster" / "kuberay.yaml").read_text().replace("${SCRIPT}", shlex.join([SCRIPT, *words]))
    try:
        command = yaml.safe_load(text)["spec"]["entrypoint"]
    except yaml.YAMLError as error:
        return Started(1, None, str(error))
    return start(["sh", "-c", command], folder, variables)


def _skypilot(
    words: Sequence[str], folder: Path, variables: Mapping[str, str], script: str = SCRIPT, cwd: Path = ROOT
) -> Started:
    """The ``run`` section, on the only node."""
    import yaml

    task = yaml.safe_load((EXAMPLES / "cluster" / "skypilot.yaml").read_text())
    for name in ("verl_troll/bin/activate", "sky_templates/ray/start_cluster"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
    given = {name: str(value) for name, value in task["envs"].items()} | {
        "SKYPILOT_NODE_RANK": "0",
        "SKYPILOT_NUM_NODES": "1",
        "SKYPILOT_NUM_GPUS_PER_NODE": "8",
        "SCRIPT": script,
        "SETTINGS": shlex.join(words),
    }
    return start(["bash", "-c", task["run"]], folder, {**given, **variables}, cwd)


def _trained(
    words: Sequence[str], folder: Path, out: Path, main_ppo: str, variables: Mapping[str, str] = NOTHING
) -> Started:
    """``train.py`` with ``main_ppo`` in place of verl."""
    package = folder / "stand-in" / "verl" / "trainer"
    package.mkdir(parents=True, exist_ok=True)
    (package / "main_ppo.py").write_text(main_ppo)
    for module in (package.parent, package):
        (module / "__init__.py").touch()
    path = os.pathsep.join([str(folder / "stand-in"), str(ROOT)])
    command: list[str | Path] = [sys.executable, EXAMPLES / "quickstart" / "train.py", "--data", folder, "--out", out]
    options = ["--model", "tiny", "--loss", "troll", "--steps", "1", "--seed", "0", "--", *words]
    return start([*command, *options], folder, {"PYTHONPATH": path, **variables})


_NOTES_WORDS = """
import json, os, sys
with open(os.environ["ARRIVED"], "w") as file:
    json.dump(sys.argv[1:], file)
sys.exit(3)
"""


def _train(words: Sequence[str], folder: Path, variables: Mapping[str, str]) -> Started:
    return _trained(words, folder, folder / "out", _NOTES_WORDS, variables)


LAUNCHERS: dict[str, Callable[..., Started]] = {
    "run script": _run_script,
    "slurm.sh": _slurm,
    "ray_job.sh": _ray_job,
    "kuberay.yaml": _kuberay,
    "skypilot.yaml": _skypilot,
    "train.py": _train,
}


def overrides(extent: Extent) -> Outcome:
    """Hostile words as settings, and as values of the run script's variables."""
    outcome = Outcome()
    dice = random.Random(extent.seed)
    touched = [ROOT / "touched", extent.folder / "touched"]

    def judge(name: str, words: Sequence[str], found: Started, expected: Callable[[list[str]], bool]) -> None:
        wrong = ""
        if any(file.exists() for file in touched):
            wrong = "a command in it was run"
            for file in touched:
                file.unlink(missing_ok=True)
        elif found.arrived is None and found.status == 0:
            wrong = "neither started nor refused"
        elif found.arrived is not None and not expected(found.arrived):
            wrong = f"arrived as {found.arrived[-len(words) :]!r:.200}"
        elif found.arrived is None and "Traceback" in found.output:
            wrong = f"not refused in words: {found.output[-300:]}"
        outcome.record(not wrong, f"{name}, {list(words)!r:.200}: {wrong}")

    for name, launch in LAUNCHERS.items():
        groups = [[word] for word in (*WORDS, NOT_UTF8)]
        groups += [dice.sample(WORDS, dice.randint(2, 6)) for _ in range(5)]
        for words in dice.sample(groups, extent.tries(len(groups))):
            settings = ["data.seed=1", *words, *(f"trainer.experiment_name={word}" for word in words)]
            found = launch(settings, extent.folder, NOTHING)
            judge(name, settings, found, lambda arrived, given=settings: arrived[-len(given) :] == given)  # type: ignore[misc]
        if launch is _train:  # it has no variables
            continue
        for word in dice.sample(WORDS, extent.tries(len(WORDS))):
            # An empty variable counts as not given.
            expected = f"actor_rollout_ref.model.path={word or 'Qwen/Qwen3-8B'}"
            found = launch([], extent.folder, {"MODEL": word})
            judge(f"MODEL to {name}", [word], found, lambda arrived, given=expected: given in arrived)  # type: ignore[misc]
    return outcome


@contextlib.contextmanager
def small_disk(folder: Path, size: int, files: int = 0) -> Iterator[Path | None]:
    """A file system of ``size`` bytes (and so many ``files``) at ``folder``; None without the right to mount one."""
    folder.mkdir(parents=True)
    options = f"size={size}" + (f",nr_inodes={files}" if files else "")
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, check=False
    )
    if not mounted or mounted.returncode != 0:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def fill(folder: Path) -> None:
    """Write until nothing more fits."""
    with (folder / "filling").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


_FILLS = """
import os, sys, time
from pathlib import Path

place = Path(os.environ["FILLED"])
place.mkdir(exist_ok=True)
try:
    for number in range(10**6):
        with open(place / f"part{number}", "wb", buffering=0) as file:
            for _ in range(int(os.environ["BLOCKS"])):
                if file.write(bytes(4096)) < 4096:
                    raise OSError("short")
except OSError as error:
    # As a run would: to a log that lies on the same disk.
    print(error)
if os.environ.get("REMOVED"):
    time.sleep(3)
    for part in place.iterdir():
        part.unlink()
sys.exit(1)
"""
DISK_BYTES = 8 * 2**20


def disk_cases() -> dict[str, Callable[[Path, Path], str]]:
    """By name: fills a disk and returns what the launcher printed. The folders are the disk and another one."""

    def trained(out: str = "", words: Sequence[str] = (), **variables: str) -> Callable[[Path, Path], str]:
        def run(disk: Path, other: Path) -> str:
            values = {name: value.replace("DISK", str(disk)) for name, value in variables.items()}
            given = [word.replace("DISK", str(disk)) for word in words]
            where = Path(out.replace("DISK", str(disk))) if out else other / "out"
            return _trained(given, other, where, _FILLS, {"BLOCKS": "100", "FILLED": str(disk / "x"), **values}).output

        return run

    def full_before(disk: Path, other: Path) -> str:
        fill(disk)
        return _trained([], other, disk / "out", _NOTES_WORDS).output

    def cluster(launch: Callable[..., Started]) -> Callable[[Path, Path], str]:
        def run(disk: Path, other: Path) -> str:
            (disk / "run.sh").write_text(f"cat /dev/zero >{disk}/checkpoint 2>/dev/null\nexit 7\n")
            found = launch([], other, NOTHING, "run.sh", disk)
            return found.output if found.status == 7 else f"another exit status, {found.status}"

        return run

    def captured(disk: Path, other: Path) -> str:
        with mock.patch("tempfile.tempdir", str(disk)):
            return processes.run(["sh", "-c", "head -c 100M /dev/zero"]).stderr

    def installed(disk: Path, other: Path) -> str:
        for name in ("examples/quickstart.sh", "examples/vllm_cpu", "setup.cfg", "verl_troll/tools/disk.py"):
            (disk / name).parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, disk / name)
        for name in ("pyproject.toml", "README.md", "patches", "configs"):
            (disk / name).touch()
        fill(disk)
        return start(["bash", disk / "examples" / "quickstart.sh"], other, {"PYTHON": sys.executable}).output

    return {
        "train.py: log and metrics": trained("DISK/out"),
        "train.py: checkpoints": trained(words=["trainer.default_local_dir=DISK/checkpoints"]),
        "train.py: Ray's folder": trained(RAY_TMPDIR="DISK"),
        "train.py: temporary files": trained(TMPDIR="DISK"),
        "train.py: what is removed before the end": trained("DISK/out", REMOVED="1"),
        "train.py: no more files": trained("DISK/out", BLOCKS="0"),
        "train.py: full before it starts": full_before,
        "slurm.sh": cluster(_slurm),
        "skypilot.yaml": cluster(_skypilot),
        "quickstart.sh: install": installed,
        "benchmarks.processes: output": captured,
    }


def disk_full(extent: Extent) -> Outcome:
    """Real file systems that fill: the launcher's own output names them."""
    outcome = Outcome()
    cases = disk_cases()
    names = random.Random(extent.seed).sample(list(cases), min(len(cases), extent.tries(len(cases))))
    for number, name in enumerate(names):
        other = extent.folder / f"other{number}"
        other.mkdir()
        with small_disk(extent.folder / f"disk{number}", DISK_BYTES, files=200) as disk:
            if disk is None:
                return Outcome(skipped="no right to mount a file system")
            output = cases[name](disk, other)
        said = f"The file system at {disk} is " in output and "Free space there" in output
        outcome.record(said, f"{name}: {output[-400:]}")
    # No false alarm.
    with small_disk(extent.folder / "roomy", DISK_BYTES) as disk:
        if disk is not None:
            other = extent.folder / "other"
            other.mkdir()
            output = _trained([], other, disk / "out", _NOTES_WORDS).output
            outcome.record(str(disk) + " is" not in output, f"a disk with space: {output[-400:]}")
    return outcome


ATTACKS: tuple[Attack, ...] = (
    Attack("launcher_overrides", "hostile settings reach verl as they are, or are refused", overrides),
    Attack("disk_full", "the launcher names the disk that is full", disk_full),
)
