"""The device that the tests' engines and trainers run on: the CPU, or with TROLL_TEST_DEVICE=cuda a GPU."""

from __future__ import annotations

import os

DEVICE = os.environ.get("TROLL_TEST_DEVICE", "cpu")
if DEVICE not in ("cpu", "cuda"):
    raise ValueError(f"TROLL_TEST_DEVICE={DEVICE!r}: must be 'cpu' or 'cuda'")


def environment(device: str = DEVICE) -> dict[str, str]:
    """Variables with which verl runs on ``device`` and knows the rollout ``hf``."""
    if device == "cpu":
        return {"VERL_PLATFORM": "cpu", "VERL_USE_EXTERNAL_MODULES": "verl_troll.cpu"}
    return {"VERL_USE_EXTERNAL_MODULES": "verl_troll.embedded"}


def backend(device: str = DEVICE) -> str:
    """What torch.distributed is started with, as verl does it."""
    return "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
