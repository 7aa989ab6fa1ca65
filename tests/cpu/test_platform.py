"""CPU mode, in a fresh process: what importing ``verl_troll.cpu`` registers, and what it leaves alone."""

from __future__ import annotations

import json
import os
import sys
import textwrap
from typing import Any

import pytest

from benchmarks.processes import run
from verl_troll.versions import OVERRIDE_VARIABLE

CPU_MODE = {"VERL_PLATFORM": "cpu", "VERL_USE_EXTERNAL_MODULES": "verl_troll.cpu"}


def in_process(code: str, **environment: str) -> Any:
    """Run ``code`` in a fresh interpreter and return what it leaves in ``result``.

    verl reads its environment once per process, and patches cannot be undone.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith("VERL_") or k == OVERRIDE_VARIABLE}
    script = f"import json\n{textwrap.dedent(code)}\nprint('RESULT' + json.dumps(result))"
    done = run(
        [sys.executable, "-c", script],
        env={**kept, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **environment},
    )
    if done.returncode != 0:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.rpartition("RESULT")[2])


@pytest.fixture(scope="module")
def cpu_mode() -> dict[str, Any]:
    """Facts from one process in CPU mode, shared because starting one takes seconds."""
    facts = in_process(
        """
        import os, sys
        import verl
        facts = {"early": [n for n in ("verl.workers.engine", "verl_troll.embedded.rollout") if n in sys.modules]}

        import torch
        from verl.plugin.platform import get_platform
        from verl.utils import device, distributed
        from verl.workers.rollout.base import get_rollout_class
        from verl.workers.rollout.replica import RolloutReplicaRegistry
        from verl_troll import cpu
        from verl_troll.patches import registry
        platform = get_platform()
        facts["device"] = [
            device.get_device_name(), device.get_device_id(), device.get_vendor(), platform.ray_resource_name()
        ]
        facts["rollout"] = [get_rollout_class("hf").__name__, RolloutReplicaRegistry.get("hf").__name__]
        facts["patches"] = [patch.name for patch in registry.applied()]
        before = distributed.initialize_global_process_group_ray, registry.applied()
        cpu.activate()
        facts["idempotent"] = before == (distributed.initialize_global_process_group_ray, registry.applied())

        # Members that verl uses without asking whether an accelerator is there.
        module = device.get_torch_device()
        device.set_expandable_segments(True)
        module.set_rng_state(module.get_rng_state())
        module.empty_cache(); module.ipc_collect(); module.synchronize(); module.set_device(0)
        with module.stream(module.current_stream()):
            pass
        free, total = module.mem_get_info()
        sizes = [free, total - free, module.memory_allocated(), module.max_memory_allocated()]
        facts["module"] = [min(sizes) > 0, module.is_available(), module.get_device_name()]

        os.environ.update(DIST_INIT_METHOD="tcp://127.0.0.1:0", RANK="0", WORLD_SIZE="1")
        distributed.initialize_global_process_group_ray(timeout_second=None)
        facts["backend"] = torch.distributed.get_backend()

        from verl.workers.engine import EngineRegistry, FSDPEngineWithLMHead
        from verl.workers.engine.fsdp import transformer_impl
        kinds = ("language_model", "value_model")
        facts["stock"] = sorted({EngineRegistry.get_engine_cls(kind, "fsdp2").__module__ for kind in kinds})
        class Own(FSDPEngineWithLMHead):
            pass
        EngineRegistry.register("language_model", ["fsdp", "fsdp2"], device="cuda", vendor="generic")(Own)
        facts["own"] = EngineRegistry.get_engine_cls("language_model", "fsdp2") is Own
        facts["pins"] = transformer_impl.CPUOffloadPolicy(pin_memory=True).pin_memory
        result = facts
        """,
        **CPU_MODE,
    )
    assert isinstance(facts, dict)
    return facts


def test_importing_verl_registers_everything_and_imports_nothing_heavy(cpu_mode: dict[str, Any]) -> None:
    assert cpu_mode["early"] == []
    assert cpu_mode["device"] == ["cpu", "cpu", "generic", "GPU"]
    assert cpu_mode["rollout"] == ["EmbeddedRollout", "EmbeddedReplica"]
    assert cpu_mode["patches"] == ["verl-gloo-backend", "verl-fsdp2-cpu-offload", "verl-rollout-table"]


def test_activating_twice_changes_nothing(cpu_mode: dict[str, Any]) -> None:
    assert cpu_mode["idempotent"]


def test_device_module_has_what_verl_uses(cpu_mode: dict[str, Any]) -> None:
    assert cpu_mode["module"] == [True, False, "CPU"]


def test_process_group_starts_with_gloo(cpu_mode: dict[str, Any]) -> None:
    assert cpu_mode["backend"] == "cpu:gloo"


def test_stock_engines_serve_the_cpu_unless_a_generic_one_is_registered(cpu_mode: dict[str, Any]) -> None:
    assert cpu_mode["stock"] == ["verl.workers.engine.fsdp.transformer_impl"]
    assert cpu_mode["own"]


def test_offload_policy_never_pins(cpu_mode: dict[str, Any]) -> None:
    assert cpu_mode["pins"] is False


def test_offload_policy_never_pins_in_an_engine_imported_before() -> None:
    assert in_process(
        """
        import verl.workers.engine.fsdp.transformer_impl as engine
        from torch.distributed.fsdp import OffloadPolicy
        from verl_troll import cpu
        pinned = engine.CPUOffloadPolicy(pin_memory=True).pin_memory
        cpu.activate()
        policy = engine.CPUOffloadPolicy(pin_memory=True)
        result = [pinned, policy.pin_memory, isinstance(policy, OffloadPolicy)]
        """
    ) == [True, False, True]


def test_without_cpu_mode_nothing_changes() -> None:
    assert in_process(
        """
        import os, verl
        import verl_troll.cpu
        from verl.plugin.platform import PlatformRegistry
        from verl_troll.patches import registry
        result = [PlatformRegistry.get("cpu"), list(registry.applied()), os.environ.get("VERL_ENGINE_DEVICE")]
        """
    ) == [None, [], None]


def test_half_a_switch_is_refused() -> None:
    with pytest.raises(RuntimeError, match="set VERL_PLATFORM=cpu as well"):
        in_process("import verl\nresult = None", VERL_USE_EXTERNAL_MODULES="verl_troll.cpu")


@pytest.mark.parametrize(("mode", "name"), [("sync", "ReplayBuffer"), ("colocate_async", "ReplayBufferAsync")])
def test_replay_buffer_keeps_verls_class_for_each_trainer(mode: str, name: str) -> None:
    from omegaconf import OmegaConf

    from verl_troll.embedded.replay_buffer import POLL_SECONDS, frequent_replay_buffer

    buffer = frequent_replay_buffer(
        trainer_mode=mode,
        trainer_config=OmegaConf.create({}),
        max_off_policy_threshold=8,
        max_off_policy_strategy="drop",
        sampler_kwargs=OmegaConf.create({}),
        refill_fn=lambda count: count,
    )
    assert (type(buffer).__name__, buffer.poll_interval) == (name, POLL_SECONDS)
