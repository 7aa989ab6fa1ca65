"""Checks that every node of a Ray cluster has the driver's versions before verl starts anything there, and names at the
end of a run the nodes that were lost.

verl spreads its processes, the trainer's included, over all nodes, and each process imports the plugin.
"""

from __future__ import annotations

import atexit
import socket
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

__all__ = ["ClusterError", "check_cluster"]


class ClusterError(RuntimeError):
    """A node of the Ray cluster lacks this package or verl, or its version differs from the driver's."""


def _question() -> Callable[[], dict[str, str]]:
    """A function without arguments that returns the versions an import would find, or ``missing``."""

    # Nested, so that Ray pickles its code: a node without this package could not import it.
    def versions() -> dict[str, str]:
        import ast
        import contextlib
        import importlib.metadata
        import importlib.util
        from pathlib import Path

        found = {"verl_troll": "missing", "verl": "missing"}
        spec = importlib.util.find_spec("verl_troll")
        # Parsed, not imported: the import would load torch, which takes seconds.
        if spec is not None and spec.origin is not None:
            for statement in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
                if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__version__":
                    found["verl_troll"] = ast.literal_eval(statement.value)
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found["verl"] = importlib.metadata.version("verl")
        return found

    return versions


def check_cluster() -> None:
    """Ask every node that verl may use, unless the driver's is the only one. Ray must be connected.

    Each node runs one task without resources, in the environment of the run's own processes.

    Raises:
        ClusterError: names each node that differs from the driver, how it differs, and what to do.
    """
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) > 0]
    if [node["NodeID"] for node in nodes] == [ray.get_runtime_context().get_node_id()]:
        return
    question = _question()
    here = question()
    ask = ray.remote(num_cpus=0)(question)
    answers = ray.get(
        [
            ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote()
            for node in nodes
        ]
    )
    differing = [
        f"  node {node['NodeManagerAddress']} ({node['NodeID']}): {_listed(answer)}"
        for node, answer in zip(nodes, answers, strict=True)
        if answer != here
    ]
    if differing:
        raise ClusterError(
            f"{len(differing)} of {len(nodes)} nodes of the Ray cluster do not have this driver's {_listed(here)}:\n"
            + "\n".join(differing)
            + "\nEvery node runs verl with TROLL. On each of these, in the Python environment that 'ray start' runs "
            f"in: pip install 'verl=={here['verl']}', and verl_troll {here['verl_troll']} from the driver's clone or "
            "wheel"
        )
    atexit.register(name_lost, nodes)


def name_lost(nodes: Iterable[Mapping[str, Any]]) -> None:
    """Print which of these nodes does not answer any more.

    A run whose node is lost ends with the error of whatever waited for it, which may name neither. Ray itself takes
    longer to notice.
    """
    for node in nodes:
        try:
            socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=5).close()
        except OSError as error:
            print(
                f"node {node['NodeManagerAddress']} ({node['NodeID']}) of the Ray cluster does not answer ({error}): "
                "it was lost, or has left. A run that ended with an error resumes from its last checkpoint, if it has "
                "one.",
                file=sys.stderr,
                flush=True,
            )


def _listed(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())
