"""The embedded rollout outside CPU mode: how it is registered, and where its server runs on an accelerator."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from tests.cpu.test_platform import in_process


def test_the_module_makes_the_rollout_known_on_any_platform() -> None:
    assert in_process(
        """
        import os, sys
        import verl
        early = [name for name in ("verl.workers.engine", "verl_troll.embedded.rollout") if name in sys.modules]
        from verl.plugin.platform import PlatformRegistry
        from verl.workers.rollout.base import get_rollout_class
        from verl.workers.rollout.replica import RolloutReplicaRegistry
        from verl_troll.patches import registry
        result = {
            "early": early,
            "cpu": PlatformRegistry.get("cpu"),
            "engine device": os.environ.get("VERL_ENGINE_DEVICE"),
            "rollout": [get_rollout_class("hf").__name__, RolloutReplicaRegistry.get("hf").__name__],
            "patches": [patch.name for patch in registry.applied()],
        }
        """,
        VERL_USE_EXTERNAL_MODULES="verl_troll.embedded",
    ) == {
        "early": [],
        "cpu": None,
        "engine device": None,
        "rollout": ["EmbeddedRollout", "EmbeddedReplica"],
        "patches": ["verl-rollout-table"],
    }


def test_without_the_variable_nothing_changes() -> None:
    assert (
        in_process(
            """
            import verl
            import verl_troll.embedded
            from verl_troll.patches import registry
            result = list(registry.applied())
            """
        )
        == []
    )


class Remote:
    """Mimics a Ray method: ``remote`` returns an awaitable."""

    def __init__(self, function: Any) -> None:
        self.function = function

    async def remote(self, *arguments: Any) -> Any:
        return self.function(*arguments)


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("cuda", {"env_vars": {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1", "CUDA_VISIBLE_DEVICES": "3"}}),
        ("cpu", None),
    ],
)
def test_the_server_sees_its_first_workers_accelerator(
    monkeypatch: pytest.MonkeyPatch, device: str, expected: dict[str, Any] | None
) -> None:
    from verl.workers.rollout.replica import RolloutMode

    from verl_troll.embedded import rollout

    given: dict[str, Any] = {}

    class Server:
        address = Remote(lambda: "host")

        def options(self, **options: Any) -> Server:
            given.update(options)
            return self

        def remote(self, *arguments: Any) -> Server:
            return self

    # The server asks for these through the first worker.
    context = SimpleNamespace(get_node_id=lambda: "0" * 56, get_accelerator_ids=lambda: {"GPU": ["3"]})
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(ray, "remote", lambda server: Server())
    platform = SimpleNamespace(
        device_name=device,
        ray_noset_envvars=lambda: ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"],
        visible_devices_envvar=lambda: "CUDA_VISIBLE_DEVICES",
        ray_resource_name=lambda: "GPU",
    )
    monkeypatch.setattr(rollout, "get_platform", lambda: platform)
    replica = rollout.EmbeddedReplica.__new__(rollout.EmbeddedReplica)
    replica.rollout_mode = RolloutMode.HYBRID
    replica.is_reward_model = replica.is_teacher_model = False
    replica.replica_rank = 0
    replica.config, replica.model_config = SimpleNamespace(max_num_seqs=4), None
    replica.workers = [SimpleNamespace(__ray_call__=Remote(lambda function: function(None)))]
    asyncio.run(replica.launch_servers())
    assert given.get("runtime_env") == expected
    assert given["num_cpus"] == 0 and "num_gpus" not in given
    assert replica.server_address == "host:0"
