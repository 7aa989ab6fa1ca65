"""The device for the tests' engines and trainers: the CPU, or a GPU with TROLL_TEST_DEVICE=cuda."""

from __future__ import annotations

import os

DEVICE = os.environ.get("TROLL_TEST_DEVICE", "cpu")
if DEVICE not in ("cpu", "cuda"):
    raise ValueError(f"TROLL_TEST_DEVICE={DEVICE!r}: must be 'cpu' or 'cuda'")


def environment(device: str = DEVICE) -> dict[str, str]:
    """Environment variables that make verl run on ``device`` and register the rollout ``hf``."""
    if device == "cpu":
        return {"VERL_PLATFORM": "cpu", "VERL_USE_EXTERNAL_MODULES": "verl_troll.cpu"}
    return {"VERL_USE_EXTERNAL_MODULES": "verl_troll.embedded"}


def backend(device: str = DEVICE) -> str:
    """torch.distributed's backend, as verl chooses it."""
    return "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
