"""Patch: name the CPU's communication backend once when verl builds its process group.

verl joins ``cpu:gloo`` with ``<device>:<backend>``. If the device is the CPU, it appears twice, which
``torch.distributed`` refuses. Applied in CPU mode only (``verl_troll.cpu``).
"""

from __future__ import annotations

from verl_troll.patches.registry import Patch
from verl_troll.versions import TESTED_VERL


def _install() -> None:
    from verl.utils import distributed

    original = distributed.initialize_global_process_group_ray

    def initialize_global_process_group_ray(timeout_second: int | None = None, backend: str | None = None) -> None:
        original(timeout_second=timeout_second, backend=backend or "cpu:gloo")

    distributed.initialize_global_process_group_ray = initialize_global_process_group_ray


PATCH = Patch(
    name="verl-gloo-backend",
    host="verl",
    versions=TESTED_VERL,
    why="In CPU mode verl asks torch.distributed for the backend 'cpu:gloo,cpu:gloo', which is refused as a duplicate.",
    upstream="verl/utils/distributed.py, initialize_global_process_group_ray: drop the second pair where "
    "get_device_name() is 'cpu'",
    install=_install,
    replaces={"verl.utils.distributed:initialize_global_process_group_ray": "e9ec517a0089c3c5"},
)
