"""The cluster launchers: real Ray on loopback, stand-ins for Slurm's commands, schemas for the rest."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from benchmarks.attack.launchers import WORDS
from benchmarks.processes import Tree, run
from tests.test_examples import ROOT, SCRIPTS

CLUSTER = ROOT / "examples" / "cluster"
# Variables that a run script reads.
VARIABLES = {
    name for script in SCRIPTS for name in re.findall(r"\$\{([A-Z_]+):-", (ROOT / "examples" / script).read_text())
}
# Replaces a run script: prints its arguments and Ray's resources.
REPORT = """\
set -eu
python3 - "$@" <<'PYTHON'
import json, os, sys
import ray

ray.init(log_to_driver=False)
total = ray.cluster_resources()
print("REPORT", json.dumps({
    "arguments": sys.argv[1:],
    "variables": {name: os.environ.get(name) for name in ("LOSS", "NNODES", "GPUS_PER_NODE", "EXTRA", "SECRET")},
    "nodes": sum(node["Alive"] for node in ray.nodes()),
    "gpus": total.get("GPU", 0),
}), flush=True)
PYTHON
exit "${STATUS:-0}"
"""
# Stands in for Slurm's srun: runs the command locally, once per listed node.
SRUN = f"""#!{sys.executable} -S
import os, signal, subprocess, sys

options = [word for word in sys.argv[1:] if word.startswith("--")]
command = sys.argv[1:]
while command[0].startswith("--"):
    command.pop(0)
nodes = next(word for word in options if word.startswith("--nodelist=")).partition("=")[2].split(",")
assert f"--nodes={{len(nodes)}}" in options and f"--ntasks={{len(nodes)}}" in options, options
if command[0] == "hostname":
    assert command == ["hostname", "--ip-address"], command
    said = os.environ.get("HOSTNAME_SAYS", "")
    print(said or "hostname: Name or service not known", file=sys.stdout if said else sys.stderr)
    sys.exit(not said)
if command[0] == "ip":
    assert command == ["ip", "-o", "-4", "address", "show", "up"], command
    if "INTERFACES" not in os.environ:
        sys.exit("srun: error: execve(): ip: No such file or directory")
    for number, line in enumerate(os.environ["INTERFACES"].split(", ")):
        name, address = line.split()
        print(f"{{number}}: {{name}}    inet {{address}}/24 scope global {{name}}\\       valid_lft forever")
    sys.exit()
steps = [subprocess.Popen(command) for _ in nodes]
signal.signal(signal.SIGTERM, lambda *_: [step.terminate() for step in steps])
sys.exit(max(step.wait() for step in steps))
"""
# Stands in for Slurm's scontrol.
SCONTROL = f"""#!{sys.executable} -S
import sys

assert sys.argv[1:] == ["show", "hostnames", "node[1-2]"], sys.argv
print("node1\\nnode2")
"""


HOSTILE = ["a=1", "b=two words", *WORDS]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def report(output: str) -> dict[str, Any]:
    found = re.search(r"^REPORT (.*)$", output, re.MULTILINE)
    assert found, output[-4000:]
    result: dict[str, Any] = json.loads(found[1])
    return result


def executable(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """For Ray's sockets, whose paths are limited to 107 characters."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def slurm(folder: Path, *arguments: str, **variables: str) -> tuple[int, str, list[int]]:
    """Exit code, output and leftover processes of ``slurm.sh`` in an allocation of two one-GPU nodes."""
    bin_folder = folder / "bin"
    bin_folder.mkdir()
    executable(bin_folder / "srun", SRUN)
    executable(bin_folder / "scontrol", SCONTROL)
    environment = {
        **os.environ,
        "PATH": f"{bin_folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_GPUS_ON_NODE": "1",
        "SLURM_CPUS_ON_NODE": "2",
        "RAY_IP": "127.0.0.1",
        "RAY_PORT": str(free_port()),
        "RAY_TMPDIR": str(folder),
        **variables,
    }
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "SLURM_HET_SIZE"):
        if name not in variables:
            environment.pop(name, None)
    # The command waits for a line of input, so leftovers are seen before the tree is killed with it.
    command = ["bash", "-c", '(bash "$@"); echo $? >code; read', "-", str(CLUSTER / "slurm.sh"), *arguments]
    with (
        (folder / "log").open("w") as log,
        Tree(command, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, cwd=folder) as tree,
    ):
        progress = tree.progress([folder / "log"])
        while not (code := (folder / "code").read_text() if (folder / "code").exists() else ""):
            progress.check()
            time.sleep(0.1)
        # Ray's helpers notice that their raylet has ended within seconds.
        for _ in range(20):
            left = tree.processes()[1:]
            if not left:
                break
            time.sleep(1)
    (folder / "code").unlink()
    return int(code), (folder / "log").read_text(), left


@pytest.mark.slow
def test_slurm_runs_the_script_on_ray_of_all_nodes_and_clears_up(short_folder: Path) -> None:
    (short_folder / "run.sh").write_text(REPORT)
    code, output, left = slurm(short_folder, "run.sh", *HOSTILE, LOSS="vanilla", STATUS="7")
    seen = report(output)
    assert seen["arguments"] == HOSTILE
    assert {name: seen["variables"][name] for name in ("LOSS", "NNODES", "GPUS_PER_NODE")} == {
        "LOSS": "vanilla",
        "NNODES": "2",
        "GPUS_PER_NODE": "1",
    }
    assert (seen["nodes"], seen["gpus"]) == (2, 2)
    # The run script's exit code, so that Slurm counts the job as failed.
    assert code == 7
    assert left == []


def test_slurm_says_what_is_missing(short_folder: Path) -> None:
    def message(*arguments: str, **variables: str) -> str:
        shutil.rmtree(short_folder / "bin", ignore_errors=True)
        code, output, left = slurm(short_folder, *arguments, **variables)
        assert code != 0
        assert left == []
        return output

    (short_folder / "run.sh").write_text("echo started\n")
    assert "name a run script" in message()
    assert "no run script elsewhere.sh" in message("elsewhere.sh")
    assert "with sbatch" in message("run.sh", SLURM_JOB_ID="")
    assert "GPUS_PER_NODE" in message("run.sh", SLURM_GPUS_ON_NODE="")


def test_slurm_gives_up_when_ray_does_not_start(short_folder: Path) -> None:
    (short_folder / "run.sh").write_text("echo started\n")
    tools = short_folder / "tools"
    tools.mkdir()
    # Stands in for a Ray that fails.
    executable(tools / "ray", "#!/bin/sh\necho ray is broken\nexit 1\n")
    path = f"{short_folder}/bin:{tools}:{os.environ['PATH']}"
    code, output, left = slurm(short_folder, "run.sh", PATH=path)
    assert (code, left) == (1, [])
    assert "ray is broken" in output
    assert "Ray's head on node1 ended" in output
    assert "started" not in output


# Stands in for Ray: prints how its head is started, and ends.
RAY = """\
#!/bin/sh
case "$1" in start) echo "RAY $*" ;; esac
exit 1
"""
INTERFACES = (
    "lo 127.0.0.1, docker0 172.17.0.1, eth0 10.0.0.5, eth1 10.0.1.5, eth10 10.0.10.5, ib0 10.9.0.5, usb0 169.254.3.1"
)


def head_address(folder: Path, **variables: str) -> tuple[str | None, str]:
    """The address that ``slurm.sh`` starts Ray's head at, None if it does not, and its output."""
    shutil.rmtree(folder / "bin", ignore_errors=True)
    (folder / "run.sh").write_text("echo started\n")
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    executable(tools / "ray", RAY)
    path = f"{folder}/bin:{tools}:{os.environ['PATH']}"
    # Whatever refuses does so at once: the head would be waited for.
    code, output, left = slurm(folder, "run.sh", PATH=path, **{"RAY_IP": "", "RAY_WAIT": "100000", **variables})
    assert (code, left) == (1, [])
    assert "started" not in output
    found = re.search(r"RAY start --head --node-ip-address=(\S*) ", output)
    return found and found[1], output


@pytest.mark.parametrize(
    ("variables", "address"),
    [
        ({"HOSTNAME_SAYS": "10.0.0.5"}, "10.0.0.5"),
        ({"HOSTNAME_SAYS": "fe80::1%eth0 2001:db8::5 10.0.0.5 10.0.1.5"}, "10.0.0.5"),
        ({"HOSTNAME_SAYS": "127.0.1.1 169.254.3.1 ::1 10.0.0.5"}, "10.0.0.5"),
        # The named interface, whatever the host's name resolves to.
        ({"HOSTNAME_SAYS": "10.0.0.5", "NCCL_SOCKET_IFNAME": "ib"}, "10.9.0.5"),
        ({"HOSTNAME_SAYS": "127.0.1.1", "NCCL_SOCKET_IFNAME": "=eth1"}, "10.0.1.5"),
        ({"NCCL_SOCKET_IFNAME": "=eth1,eth10"}, "10.0.1.5"),
        ({"NCCL_SOCKET_IFNAME": "bond,eth"}, "10.0.0.5"),
        ({"NCCL_SOCKET_IFNAME": "eth1"}, "10.0.1.5"),
        ({"HOSTNAME_SAYS": "10.0.10.5", "NCCL_SOCKET_IFNAME": "eth1"}, "10.0.10.5"),
        ({"NCCL_SOCKET_IFNAME": "^docker,lo"}, "10.0.0.5"),
        ({"HOSTNAME_SAYS": "10.9.0.5", "NCCL_SOCKET_IFNAME": "^lo"}, "10.9.0.5"),
        ({"NCCL_SOCKET_IFNAME": "^=docker0,eth0,eth1"}, "10.0.10.5"),
        ({"NCCL_SOCKET_IFNAME": ",ib0,"}, "10.9.0.5"),
        ({"GLOO_SOCKET_IFNAME": "eth1"}, "10.0.1.5"),
        ({"GLOO_SOCKET_IFNAME": "bond0,eth10", "NCCL_SOCKET_IFNAME": "ib0"}, "10.0.10.5"),
        ({"NCCL_SOCKET_IFNAME": "eth", "INTERFACES": "lo 127.0.0.1, eth0.7@eth0 10.0.7.5"}, "10.0.7.5"),
        # An address of the user's.
        ({"HOSTNAME_SAYS": "10.0.0.5", "NCCL_SOCKET_IFNAME": "ib0", "RAY_IP": "10.3.3.3"}, "10.3.3.3"),
        ({"RAY_IP": "10.3.3.3"}, "10.3.3.3"),
    ],
    ids=str,
)
def test_slurm_takes_an_address_that_other_nodes_reach(
    short_folder: Path, variables: dict[str, str], address: str
) -> None:
    assert head_address(short_folder, **{"INTERFACES": INTERFACES, **variables})[0] == address


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"HOSTNAME_SAYS": "fe80::1%eth0"}, "'fe80::1%eth0'"),
        ({"HOSTNAME_SAYS": "2001:db8::5"}, "'2001:db8::5'"),
        ({"HOSTNAME_SAYS": "127.0.1.1"}, "'127.0.1.1'"),
        ({"HOSTNAME_SAYS": "127.0.0.1 ::1 169.254.3.1"}, "'127.0.0.1 ::1 169.254.3.1'"),
        ({}, "hostname: Name or service not known"),
        ({"NCCL_SOCKET_IFNAME": "bond0", "HOSTNAME_SAYS": "10.0.0.5"}, "NCCL_SOCKET_IFNAME=bond0 names"),
        ({"NCCL_SOCKET_IFNAME": "=eth"}, "NCCL_SOCKET_IFNAME==eth names"),
        ({"GLOO_SOCKET_IFNAME": "eth"}, "GLOO_SOCKET_IFNAME=eth names"),
        ({"NCCL_SOCKET_IFNAME": "lo,usb"}, "NCCL_SOCKET_IFNAME=lo,usb names"),
        ({"NCCL_SOCKET_IFNAME": "^eth,ib,docker"}, "NCCL_SOCKET_IFNAME=^eth,ib,docker names"),
    ],
    ids=str,
)
@pytest.mark.parametrize("has_ip", [True, False])
def test_slurm_refuses_when_no_other_node_reaches_the_address(
    short_folder: Path, variables: dict[str, str], said: str, has_ip: bool
) -> None:
    address, output = head_address(short_folder, **variables, **({"INTERFACES": INTERFACES} if has_ip else {}))
    assert address is None
    assert said in output
    (line,) = (line for line in output.splitlines() if line.startswith("slurm.sh: "))
    assert line.startswith("slurm.sh: found no IPv4 address at which other nodes reach node1")
    assert "Set RAY_IP to its address, or NCCL_SOCKET_IFNAME to its interface" in line
    assert (INTERFACES in line) == has_ip


@pytest.mark.parametrize("address", ["fe80::1", "node1", "10.0.0", " ", "10.0.0.5 10.0.0.6"])
def test_slurm_refuses_another_kind_of_address(short_folder: Path, address: str) -> None:
    assert head_address(short_folder, RAY_IP=address, HOSTNAME_SAYS="10.0.0.5") == (
        None,
        f"slurm.sh: RAY_IP={address} is not an IPv4 address\n",
    )


def test_slurm_warns_of_a_heterogeneous_job(short_folder: Path) -> None:
    address, output = head_address(short_folder, HOSTNAME_SAYS="10.0.0.5", SLURM_HET_SIZE="3")
    assert address == "10.0.0.5"
    assert "warning: of this heterogeneous job's 3 components only the first one's 2 nodes are used" in output
    assert "heterogeneous" not in head_address(short_folder, HOSTNAME_SAYS="10.0.0.5")[1]


@pytest.mark.slow
def test_ray_job_takes_script_arguments_and_variables_to_the_cluster(short_folder: Path) -> None:
    folder = short_folder / "work"
    folder.mkdir()
    (folder / "run.sh").write_text(REPORT)
    (folder / "fails.sh").write_text("exit 5\n")
    dashboard = free_port()
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_TMPDIR": str(short_folder),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
    ports = [f"--port={free_port()}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={free_port()}"]

    def submit(script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return run(
            ["bash", str(CLUSTER / "ray_job.sh"), script, *arguments],
            env={**environment, "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}", **variables},
            cwd=folder,
        )

    command = ["ray", "start", "--head", *ports, "--node-ip-address=127.0.0.1", "--num-cpus=2", "--block"]
    with Tree(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT) as head:
        progress = head.progress()
        while socket.socket().connect_ex(("127.0.0.1", dashboard)) != 0:
            progress.check()
            time.sleep(1)
        done = submit("run.sh", *HOSTILE, LOSS="vanilla", NNODES="3", EXTRA="x", SECRET="y", FORWARD="EXTRA")
        seen = report(done.stdout)
        assert done.returncode == 0
        assert seen["arguments"] == HOSTILE
        # Only named variables are passed on.
        assert seen["variables"] == {
            "LOSS": "vanilla",
            "NNODES": "3",
            "GPUS_PER_NODE": None,
            "EXTRA": "x",
            "SECRET": None,
        }
        assert submit("fails.sh").returncode != 0


@pytest.mark.parametrize("value", ["$HOME/model", "${HOME}", "a $_x"])
def test_ray_job_refuses_a_variable_that_ray_would_change(value: str) -> None:
    done = subprocess.run(
        ["bash", str(CLUSTER / "ray_job.sh"), "examples/run_qwen3_8b_fsdp.sh"],
        env={"PATH": os.environ["PATH"], "MODEL": value},
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 1
    assert done.stderr == f"ray_job.sh: MODEL is {value!r}, in which Ray would replace variables: leave `$` out\n"


def test_ray_job_knows_every_variable_of_the_run_scripts() -> None:
    (line,) = (line for line in (CLUSTER / "ray_job.sh").read_text().splitlines() if line.startswith("names = "))
    assert set(line.split('"')[1].split()) == VARIABLES


@pytest.mark.parametrize("script", ["nowhere.sh", str(ROOT / "examples" / "run_qwen3_8b_fsdp.sh")])
def test_ray_job_refuses_a_script_that_it_cannot_upload(script: str) -> None:
    done = subprocess.run(
        ["bash", str(CLUSTER / "ray_job.sh"), script], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 1
    assert "below the current folder" in done.stderr


@pytest.fixture(scope="module")
def ray_job() -> Any:
    text = (CLUSTER / "kuberay.yaml").read_text()
    for name, value in {"IMAGE": "registry/image:tag", "SCRIPT": "examples/run_qwen3_8b_fsdp.sh"}.items():
        text = text.replace(f"${{{name}}}", value)
    return yaml.safe_load(text)


def test_kuberay_pods_are_what_kubernetes_takes(ray_job: Any) -> None:
    cluster = ray_job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    assert len(groups) == 2
    for group in groups:
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": group["template"]}
        kubernetes_validate.validate(pod, "1.31", strict=True)
        volumes = {volume["name"] for volume in group["template"]["spec"]["volumes"]}
        (container,) = group["template"]["spec"]["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        assert container["image"] == "registry/image:tag"
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


def test_kuberay_job_agrees_with_its_workers(ray_job: Any) -> None:
    assert (ray_job["apiVersion"], ray_job["kind"]) == ("ray.io/v1", "RayJob")
    spec = ray_job["spec"]
    assert spec["entrypoint"] == "bash examples/run_qwen3_8b_fsdp.sh"
    variables = yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]
    assert all(isinstance(value, str) for value in variables.values())
    assert set(variables) - {"HOME"} <= VARIABLES
    (workers,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert int(variables["NNODES"]) == workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"]
    (container,) = workers["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == variables["GPUS_PER_NODE"]


@pytest.fixture(scope="module")
def sky_task() -> Any:
    return yaml.safe_load((CLUSTER / "skypilot.yaml").read_text())


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize(
    ("settings", "arrived", "code"),
    [("a=1 b=2", "a=1 b=2", 0), ("""a='two  words' "b=*" $(id)""", "a=two  words b=* $(id)", 0), ("a='", "", 1)],
)
def test_skypilot_runs_the_script_on_the_first_node(
    sky_task: Any, tmp_path: Path, rank: str, settings: str, arrived: str, code: int
) -> None:
    assert set(sky_task["envs"]) - {"SCRIPT", "SETTINGS"} <= VARIABLES
    (tmp_path / "verl_troll" / "bin").mkdir(parents=True)
    (tmp_path / "verl_troll" / "bin" / "activate").touch()
    (tmp_path / "sky_templates" / "ray").mkdir(parents=True)
    # Stands in for SkyPilot's script of that name.
    executable(tmp_path / "sky_templates" / "ray" / "start_cluster", "#!/bin/sh\necho ray started\n")
    (tmp_path / "run.sh").write_text('echo "ran: $* $NNODES $GPUS_PER_NODE $LOSS $RAY_ADDRESS"\n')
    variables = {"SKYPILOT_NODE_RANK": rank, "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "8"}
    done = subprocess.run(
        ["bash", "-c", sky_task["run"]],
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(tmp_path),
            **{name: str(value) for name, value in sky_task["envs"].items()},
            **variables,
            "SCRIPT": "run.sh",
            "SETTINGS": settings,
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    ran = f"ran: {arrived} 2 8 troll 127.0.0.1:6379\n" if rank == "0" and code == 0 else ""
    assert done.stdout == f"ray started\n{ran}"
    assert done.returncode == (code if rank == "0" else 0)


@pytest.mark.parametrize("part", ["setup", "run"])
def test_skypilot_shell_is_clean(sky_task: Any, part: str) -> None:
    # SETTINGS is word-split on purpose; the environment does not exist here.
    done = subprocess.run(
        ["shellcheck", "--shell=bash", "--exclude=SC2086,SC1090,SC1091", "-"],
        input=sky_task[part],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_skypilot_reads_its_task(tmp_path: Path) -> None:
    # In its own environment, because SkyPilot brings forty packages.
    python = tmp_path / "venv" / "bin" / "python"
    for command in (
        [sys.executable, "-m", "venv", str(tmp_path / "venv")],
        [str(python), "-m", "pip", "install", "--quiet", "skypilot==0.14.1"],
    ):
        subprocess.run(command, check=True, capture_output=True)
    program = """
import sys
import sky

task = sky.Task.from_yaml(sys.argv[1])
print("READ", task.num_nodes, task.envs["SCRIPT"])
"""
    done = subprocess.run(
        [str(python), "-c", program, str(CLUSTER / "skypilot.yaml")],
        env={**os.environ, "HOME": str(tmp_path), "WANDB_API_KEY": "x"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "READ 2 examples/run_qwen3_8b_fsdp.sh" in done.stdout, done.stderr[-3000:]
