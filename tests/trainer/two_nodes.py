"""A Ray cluster of several nodes on the loopback of one machine, each started by ``ray start`` with its own Python."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

from benchmarks.processes import Tree
from tests.trainer.run import ROOT


@dataclass(frozen=True)
class Node:
    """One node of the cluster.

    Attributes:
        python: runs its raylet, and so its workers.
        environment: added to this process's environment, without the variables that switch on CPU mode.
    """

    python: str = sys.executable
    environment: Mapping[str, str] = field(default_factory=dict)


def equipped(out: Path, modules: Sequence[str] = ("verl_troll.cpu",)) -> Node:
    """A node made for CPU mode; ``out`` receives verl's log and the probe's output.

    Ray's workers get the environment of their node's raylet, not the driver's.
    """
    return Node(
        environment={
            "VERL_PLATFORM": "cpu",
            "VERL_USE_EXTERNAL_MODULES": ",".join(modules),
            "VERL_FILE_LOGGER_PATH": str(out / "metrics.jsonl"),
            "TROLL_TEST_PROBE": str(out),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "TQ_NUM_THREADS": "1",
        }
    )


@contextlib.contextmanager
def cluster(nodes: Sequence[Node]) -> Iterator[list[str]]:
    """Overrides that make verl's trainer run on ``nodes``, one rank on each; the first is the head.

    Raises:
        AssertionError: a node did not start; the message contains its output.
    """
    with socket.socket() as one, socket.socket() as other:
        ports = []
        for free in (one, other):
            free.bind(("127.0.0.2", 0))
            ports.append(free.getsockname()[1])
    address = f"127.0.0.2:{ports[0]}"
    # Ray listens on every interface; a token restricts the cluster to the processes that were given it.
    access = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    # Ray's sockets are in this folder, and their paths must not exceed 107 characters.
    with (
        mock.patch.dict(os.environ, access),
        tempfile.TemporaryDirectory(prefix="ray-") as folder,
        contextlib.ExitStack() as running,
    ):
        place = [
            *("--head", f"--port={ports[0]}", f"--ray-client-server-port={ports[1]}"),
            *(f"--temp-dir={folder}", "--include-dashboard=false"),
        ]
        # One after another: nodes on one machine share files in the folder.
        for number, node in enumerate(nodes, start=2):
            _start(node, f"127.0.0.{number}", place, Path(folder), running)
            place = [f"--address={address}"]
        yield [
            f"ray_kwargs.ray_init.address={address}",
            # Ray refuses these when joining a cluster.
            "~ray_kwargs.ray_init.num_cpus",
            "~ray_kwargs.ray_init.num_gpus",
            f"trainer.nnodes={len(nodes)}",
        ]


def _start(node: Node, ip: str, place: Sequence[str], folder: Path, running: contextlib.ExitStack) -> None:
    """Run ``ray start`` for one node until it has joined; the node ends with ``running``."""
    command = [
        *(node.python, "-m", "ray.scripts.scripts", "start", "--block", *place),
        *(f"--node-ip-address={ip}", "--num-cpus=8", "--num-gpus=1", "--object-store-memory=200000000"),
        *("--dashboard-agent-listen-port=0", "--disable-usage-stats"),
    ]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("VERL_", "PYTHONPATH"))}
    log = folder / f"{ip}.log"
    with log.open("w") as file:
        tree = running.enter_context(
            Tree(command, cwd=folder, env={**inherited, **node.environment}, stdout=file, stderr=subprocess.STDOUT)
        )
    progress = tree.progress([log])
    while "Ray runtime started" not in log.read_text():
        assert tree.process.poll() is None, f"node {ip} did not start:\n{log.read_text()}"
        progress.check()
        time.sleep(0.1)


def other_python(folder: Path, version: str | None) -> str:
    """The interpreter of a second environment: this one's packages, but verl_troll in ``version``, or missing."""
    venv.create(folder, symlinks=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if "verl_troll" not in entry.name and not (packages / entry.name).exists():
            (packages / entry.name).symlink_to(entry)
    if version is not None:
        shutil.copytree(ROOT / "verl_troll", packages / "verl_troll")
        module = packages / "verl_troll" / "__init__.py"
        module.write_text(re.sub('__version__ = ".*"', f'__version__ = "{version}"', module.read_text()))
    return str(folder / "bin" / "python")
