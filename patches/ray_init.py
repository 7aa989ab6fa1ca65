"""Patch: check the versions of all nodes of the Ray cluster as soon as the driver connects.

Otherwise a node without verl_troll fails only when a process lands on it, with that process's traceback.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from verl_troll.patches.registry import Patch


def _install(check_cluster: Callable[[], None]) -> None:
    import ray

    connect = ray.init

    @functools.wraps(connect)
    def init(*args: Any, **kwargs: Any) -> Any:
        context = connect(*args, **kwargs)
        check_cluster()
        return context

    ray.init = init
    # A driver may connect before it loads the plugin. verl's processes in the cluster are actors.
    if ray.is_initialized() and ray.get_runtime_context().get_actor_id() is None:
        check_cluster()


PATCH = Patch(
    name="ray-init",
    host="ray",
    # verl's own range: the patch assumes only that ray.init returns once the driver is connected.
    versions=">=2.41",
    why="A node without this package, or with another version of it or of verl, is refused by name before verl starts "
    "anything there.",
    upstream="verl/trainer/main_ppo.py, run_ppo: a hook between ray.init and the task runner",
    install=_install,
    replaces={"verl.trainer.main_ppo:run_ppo": "16cd2df01be6db77"},
)
