"""CPU mode: verl's real trainer without an accelerator, for tests and the quickstart.

Two environment variables, set in every process of a run, enable it::

    VERL_PLATFORM=cpu VERL_USE_EXTERNAL_MODULES=verl_troll.cpu

verl then imports this package at the end of ``import verl``. It registers the platform ``cpu``
(:mod:`verl_troll.cpu.platform`) and the rollout ``hf`` (:mod:`verl_troll.embedded`, which also runs on accelerators),
and applies two patches of :mod:`verl_troll.patches.cpu`. The configuration group ``+cpu=default`` sets the rest.

Training engines are verl's own: ``VERL_ENGINE_DEVICE=cuda`` (verl's public override, set here by default) selects the
engines that verl registers for ``cuda``, which also run on CPU tensors. The platform's vendor is ``generic``, so an
engine registered for ``("cuda", "generic")`` takes precedence over the stock one. The Megatron engine needs the group
``+cpu=megatron`` instead (:mod:`verl_troll.cpu.megatron`).

Without ``VERL_PLATFORM=cpu``, importing this package changes nothing.
"""

from __future__ import annotations

import os

__all__ = ["activate", "is_active"]


def is_active() -> bool:
    """Whether this process runs in CPU mode (``VERL_PLATFORM=cpu``)."""
    return os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu"


def activate() -> None:
    """Register the platform and the rollout, select verl's engines, apply the CPU patches; idempotent.

    Raises:
        verl_troll.patches.registry.PatchError: the patches do not support the installed verl.
    """
    from verl.plugin.platform import PlatformRegistry

    from verl_troll import embedded
    from verl_troll.cpu.platform import CpuPlatform
    from verl_troll.patches import registry
    from verl_troll.patches.cpu import verl_fsdp2_cpu_offload, verl_gloo_backend

    PlatformRegistry.register(platform="cpu")(CpuPlatform)
    os.environ.setdefault("VERL_ENGINE_DEVICE", "cuda")
    for patch in (verl_gloo_backend.PATCH, verl_fsdp2_cpu_offload.PATCH):
        registry.apply(patch)
    embedded.register()


if is_active():
    activate()
elif __name__ in os.environ.get("VERL_USE_EXTERNAL_MODULES", "").split(","):
    raise RuntimeError(
        f"VERL_USE_EXTERNAL_MODULES names {__name__}, but VERL_PLATFORM is {os.environ.get('VERL_PLATFORM', '')!r}: "
        "set VERL_PLATFORM=cpu as well, or drop the module to run on an accelerator."
    )
